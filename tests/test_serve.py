"""The serve command: wrong words are reported at once, and it answers over HTTP until a signal ends it."""

import importlib.util
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from retool_jax import serve, train
from retool_jax.errors import UserError
from retool_jax.models.huggingface import save_params
from retool_jax.run.load import load
from retool_jax.tokens.tokenizer import MINIATURE

GRPC = all(map(importlib.util.find_spec, ("grpc", "jetstream")))  # what the second protocol needs
SMALL = ["sandbox.backend=[process]", "sandbox.slots=1", "engine.slots=2", "engine.max_length=64", "engine.pages=8"]
SMALL += ["rollout.max_prompt_tokens=40", "engine.decode_steps=2", "engine.token_buckets=[64]"]


def error_of(main, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        main(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("port=70000", "serve.port=70000 must be between 0 and 65535"),
        ("prot=8000", "unknown key prot"),
        ("serve.streems=3", "did you mean serve.streams?"),
        ("serve.answer_s=0", "serve.answer_s=0.0 must be between 0.1 and 604800"),
        ("init_from=", "init_from is empty, and a server needs weights"),
        ("init_from=runs/nothing", "no checkpoint at runs/nothing: expected checkpoints of a run"),
        ("engine.tool_lag=1", "set engine.tool_lag=-1"),
        ("rollout.max_prompt_tokens=256", "leaves no room in engine.max_length=256; lower it"),
        ("rl.steps=3", "it belongs to configs of task grpo"),
        ("tools=pyton", "tools=pyton is not one of"),
    ],
)
def test_a_wrong_word_is_told_with_the_way_out(word, told):
    assert told in error_of(serve.main, "config=serve", word)


def test_a_server_on_several_hosts_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    said = error_of(serve.main, "config=serve")
    assert "JAX_NUM_PROCESSES=2" in said and "start a server on each host" in said and "balancer" in said


def test_each_command_refuses_the_others_configs():
    assert "run python -m retool_jax.serve" in error_of(train.main, "config=serve")
    assert "task grpo and serves nothing" in error_of(serve.main, "config=grpo")


def test_help_names_every_key_and_words_are_read(capsys):
    serve.main(["--help"])
    said = capsys.readouterr().out
    assert "python -m retool_jax.serve config=NAME" in said and "  serve.port=8000 " in said
    assert load(["config=serve", "serve.port=0"]).serve.port == 0


def test_a_checkpoint_is_served_until_sigterm(tmp_path, model, params, one_device):
    save_params(model, params, tmp_path / "tiny", MINIATURE)
    command = [sys.executable, "-m", "retool_jax.serve", "config=serve", f"init_from={tmp_path / 'tiny'}", "port=0"]
    command += ["serve.grpc_port=0"] if GRPC else []
    environment = one_device | {"RETOOL_SERVE_TOKEN": "secret"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *SMALL], env=environment, cwd=Path(__file__).parents[1], **pipes) as process:
        try:
            said = {}
            while not said.keys() & {"serving", ""}:
                line = process.stdout.readline()
                said[line.partition(" ")[0]] = line.split()[-1:]
            assert "serving" in said, process.stderr.read()
            (address,) = said["serving"]
            if GRPC:
                import grpc
                from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

                with grpc.insecure_channel(*said["JetStream's"]) as channel:
                    stub = jetstream_pb2_grpc.OrchestratorStub(channel)
                    assert stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=60).is_live
            asked = {"messages": [{"role": "user", "content": "2+2?"}], "max_tokens": 5, "seed": 1}

            def ask(token: str) -> dict:
                headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                request = urllib.request.Request(f"{address}/chat/completions", json.dumps(asked).encode(), headers)
                with urllib.request.urlopen(request) as response:
                    return json.load(response)

            assert ask("secret")["usage"]["completion_tokens"] in range(1, 6)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                ask("wrong")
            assert ask("secret")["choices"][0] == ask("secret")["choices"][0]
        finally:
            process.send_signal(signal.SIGTERM)
        said, log = process.communicate()
    assert process.returncode == 0 and said.endswith("closed\n"), log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert len(lines) == 3 and "texts" not in lines[0] and "2+2" not in log
