"""Checkpoints by hub id, with a local server that implements the necessary part of the hub's protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import pytest
from huggingface_hub import constants

from retool_jax.convert import main
from retool_jax.errors import UserError
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params
from retool_jax.models.huggingface import save_params
from retool_jax.run.build import resolve
from retool_jax.run.weights import load_weights
from retool_jax.tokens.tokenizer import MINIATURE, load_tokenizer

REVISION = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository to read, acme/tiny, with the files of a folder, and room for one to write, acme/new."""

    def __init__(self, folder: Path, asked: list[str], pushed: Path, *arguments) -> None:
        self.folder, self.asked, self.pushed = folder, asked, pushed
        super().__init__(*arguments)

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        files = {file.name: file for file in self.folder.iterdir()}
        if path.startswith("/api/models/acme/tiny/tree/"):
            listed = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": "b" * 40} for f, p in files.items()]
            self.answer(json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/models/acme/tiny"):
            told = {"id": "acme/tiny", "sha": REVISION, "siblings": [{"rfilename": f} for f in files]}
            self.answer(json.dumps(told).encode(), {"Content-Type": "application/json"})
        elif path == f"/acme/tiny/resolve/{REVISION}/{name}" and name in files:
            if self.command == "GET":
                self.asked.append(name)
            self.answer(files[name].read_bytes(), {"ETag": f'"{name}"', "X-Repo-Commit": REVISION})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/acme/new"
        if self.path == "/api/repos/create" and json.loads(body)["name"] == "new":
            assert b'"private"' in body
            self.pushed.mkdir(exist_ok=True)
            told = {"url": address}
        elif self.path == "/api/validate-yaml":
            told = {"errors": [], "warnings": []}
        elif self.path == "/api/models/acme/new/preupload/main":
            told = {
                "files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            }
        elif self.path == "/api/models/acme/new/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (self.pushed / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            told = {"commitUrl": f"{address}/commit/{REVISION}", "commitOid": REVISION}
        else:
            self.send_error(403)
            return
        self.answer(json.dumps(told).encode(), {"Content-Type": "application/json"})


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """The files that were fetched so far from this hub, which replaces the real one."""
    folder, asked = tmp_path / "repository", []
    config = ModelConfig(vocab_size=400, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    save_params(config, init_params(config, jax.random.key(0)), folder, tokenizer_from=MINIATURE)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder, asked, tmp_path / "pushed"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    # As HF_ENDPOINT and HF_HOME would set them in a new process.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_first_for_its_config_and_then_for_weights_and_tokenizer(hub):
    run = resolve(["config=sft_retool", "init_from=acme/tiny"])
    assert (run.model.vocab_size, run.tokenizer) == (400, "acme/tiny")
    assert hub == ["config.json"]
    weights = load_weights(run, Path(run.init_from))
    assert weights["embedding"][...].shape == (400, 16)
    assert len(load_tokenizer(run.tokenizer)) == 398
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(hub)
    assert "pytorch_model.bin" not in hub and hub.count("config.json") == 1


@pytest.mark.usefixtures("hub")
def test_an_unknown_hub_id_is_named_with_the_way_out():
    with pytest.raises(UserError) as caught:
        resolve(["config=sft_retool", "init_from=acme/none"])
    told = str(caught.value)
    assert told.startswith("no folder acme/none here, and not to be had from the Hugging Face hub")
    assert told.endswith("give a folder with config.json and *.safetensors")


def test_no_weight_is_fetched_from_a_repository_that_only_gives_the_tokenizer(hub, tmp_path):
    main([f"from={tmp_path / 'repository'}", f"to={tmp_path / 'out'}", "tokenizer=acme/tiny"])
    assert {"tokenizer.json", "chat_template.jinja"} <= set(hub) and "model.safetensors" not in hub
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.usefixtures("hub")
def test_what_is_converted_is_pushed_as_it_is(tmp_path, capsys):
    main([f"from={tmp_path / 'repository'}", f"to={tmp_path / 'out'}", "push=acme/new"])
    assert f"wrote {tmp_path / 'out'}\npushed http://127.0.0.1:" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {path.name for path in (tmp_path / "pushed").iterdir()} == names
    for name in names:
        assert (tmp_path / "pushed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.usefixtures("hub")
def test_an_upload_that_the_hub_refuses_is_complete_here_and_reported_in_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        main([f"from={tmp_path / 'repository'}", f"to={tmp_path / 'out'}", "push=acme/other"])
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'out'} is complete, and the hub does not take it as acme/other (")
    assert told.endswith(f"then: hf upload acme/other {tmp_path / 'out'}") and "\n" not in told
    assert (tmp_path / "out" / "model.safetensors").is_file()
