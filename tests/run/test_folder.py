"""Run folders: the same run resumes in them, another one is refused, and one process at a time trains there."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.fields import defaults_of, flatten, show
from retool_jax.run import folder as folders
from retool_jax.run.folder import claim_folder, differences, may_change, read_model, saved_config, to_flat, write_config
from retool_jax.run.load import load
from retool_jax.run.schema import Run

SECRET = "hunter2"


def begin(run: Run) -> Path:
    """A folder of this run, in which no process trains."""
    with claim_folder(run) as folder:
        return folder


def rewrite(folder: Path, values: dict[str, object]) -> None:
    """Give a run's folder a config of these dotted keys."""
    nested: dict[str, object] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = nested
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    (folder / "config.yaml").write_text(json.dumps(nested))  # JSON is YAML


def refusal(run: Run) -> str:
    with pytest.raises(UserError) as caught:
        begin(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- what is saved


def test_the_resolved_config_gives_the_same_run_again(tmp_path):
    words = ["rl.optimizer.learning_rate=3e-5", "sandbox.backend=[process]", "tools=none", "data.train=1e5"]
    for name, run_name in [("grpo", "2024"), ("sft", "null"), ("grpo", "a b")]:
        run = load([f"config={name}", f"run={tmp_path / name / run_name}", *(words if name == "grpo" else [])])
        again = load([f"config={begin(run) / 'config.yaml'}"])
        assert again == run and type(again) is type(run)


def test_a_saved_config_holds_every_key_and_no_secret(tmp_path):
    run = load(["config=grpo", f"run={tmp_path / 'r'}", f"sandbox.token={SECRET}"])
    folder = begin(run)
    assert set(saved_config(folder)) == {"task", *flatten(run)}
    assert not any(SECRET in path.read_text() for path in folder.iterdir())


def test_a_config_is_written_again_once_nothing_is_refused(tmp_path, capsys):
    run = load(["config=grpo", f"run={tmp_path / 'r'}"])
    before = (begin(run) / "config.yaml").read_bytes()
    longer = load(["config=grpo", f"run={tmp_path / 'r'}", "rl.steps=99", f"sandbox.token={SECRET}"])
    with claim_folder(longer) as folder:
        assert (folder / "config.yaml").read_bytes() == before, "what follows may still refuse"
        write_config(longer)
    assert saved_config(folder)["rl.steps"] == 99
    assert capsys.readouterr().out == "rl.steps is 99 from here on; it was 30\n"


# ------------------------------------------------------------------------------------------------- whose folder it is


def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    folder = begin(load(["config=grpo", f"run={tmp_path / 'r'}", "rl.clip.high=0.3", "checkpoint.every=5"]))
    (folder / "lock").unlink()
    before = (folder / "config.yaml").read_bytes()
    message = refusal(load(["config=grpo", f"run={folder}"]))
    assert "holds another run: rl.clip.high is 0.3 there and 0.28 here; choose another" in message
    assert re.search(r"rl.clip.high is .* and 1 more", refusal(load(["config=grpo", f"run={folder}", "seed=3"])))
    assert "task is grpo there and sft here" in refusal(load(["config=sft", f"run={folder}"]))
    assert (folder / "config.yaml").read_bytes() == before and len(list(folder.iterdir())) == 1


def test_a_folder_that_is_not_a_runs_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = refusal(load(["config=sft", f"run={tmp_path}"]))
    assert message.endswith("is not empty and holds no run; choose another run=FOLDER")
    assert "holds no run" in refusal(load(["config=sft", f"run={tmp_path / 'notes.txt'}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_torn_config_in_the_run_folder(tmp_path):
    run = load(["config=sft", f"run={tmp_path}"])
    (tmp_path / "config.tmp").write_text("task: sf")  # a start that was killed, or met a full disk
    (tmp_path / "lock").write_text("")
    begin(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "lock"]
    (tmp_path / "config.yaml").write_text("task: [")
    assert re.search(r"cannot read .*config.yaml", refusal(run))


# Of each section: what may change between two starts of a run. Everything else may not.
CHANGEABLE = {
    "": "run replay logger",
    "model": "remat head_chunk attention_kernel cache_kernel max_positions",
    "mesh": "name data fsdp tp",
    "hosts": "start_s silent_s",
    "sft": "rows_per_micro",
    "checkpoint": "every keep",
    "engine": "slots chunk_tokens decode_steps read_late page_size pages prefix_tokens tp token_buckets read_buckets",
    "sandbox": "backend slots urls token queue_limit queue_s retries recycle_calls recycle_s recycle_memory_mb probe_s"
    " sessions session_ttl_s",
    "rl": "steps max_dropped rows_per_micro row_length share_prefixes save_rollouts",
    "evaluation": "every",
}
CHANGEABLE = {f"{section}.{key}".lstrip(".") for section, keys in CHANGEABLE.items() for key in keys.split()}


def another(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if value is None:
        return 1
    return value + {int: 1, float: 0.5, str: "x"}[type(value)] if not isinstance(value, list) else [*value, "x"]


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_every_key_may_change_or_is_refused(tmp_path, name):
    run = load([f"config={name}", f"run={tmp_path / 'r'}"])
    folder = begin(run)
    values = to_flat(run)
    assert set(values) > CHANGEABLE if name == "grpo" else set(values) & CHANGEABLE
    others = values.keys() - CHANGEABLE - {"task"}
    rewrite(folder, values | {key: another(values[key]) for key in values.keys() & CHANGEABLE})
    begin(run)
    rewrite(folder, values | {key: another(values[key]) for key in others})
    assert {key for key, *_ in differences(run, saved_config(folder))} == others
    assert not any(map(may_change, others))
    section_of = {key.rpartition(".")[0]: key for key in sorted(others)}
    for key in section_of.values():  # one of each is refused by its name
        rewrite(folder, values | {key: another(values[key])})
        assert f"holds another run: {key} is " in refusal(run)


# ---------------------------------------------------------------------------------------------- folders of old versions


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_a_key_that_is_newer_than_the_folder_has_its_default_there(tmp_path, name):
    run = load([f"config={name}", f"run={tmp_path / 'r'}"])
    folder = begin(run)
    values = to_flat(run)
    defaults = defaults_of(type(run)) | {"evaluation.answer_tokens": 0}
    refused = {key for key in values.keys() - CHANGEABLE - {"task"} if values[key] != defaults[key]}
    rewrite(folder, {key: value for key, value in values.items() if key == "task" or key in refused})
    begin(run)
    for key in refused:
        rewrite(folder, {other: value for other, value in values.items() if other != key})
        assert f"holds another run: {key} is {show(defaults[key])} there" in refusal(run)
    assert refused, "some of the config's values are not the defaults"


def test_an_evaluation_that_is_older_than_its_question_asked_none(tmp_path):
    words = ["config=grpo", f"run={tmp_path / 'r'}", "engine.max_length=1024", "rl.row_length=1024"]
    run = load([*words, "evaluation.answer_tokens=256"])
    folder = begin(run)
    rewrite(folder, {key: value for key, value in saved_config(folder).items() if key != "evaluation.answer_tokens"})
    assert "evaluation.answer_tokens is 0 there and 256 here" in refusal(run)
    begin(load([*words, "evaluation.answer_tokens=0"]))


@pytest.mark.parametrize(
    ("config", "section", "dtype"),
    [("grpo", "rl", "bfloat16"), ("sft", "sft", "bfloat16"), ("grpo", "rl", "float16"), ("grpo", "rl", "float32")],
)
def test_a_folder_that_kept_moments_in_the_type_of_its_weights(tmp_path, config, section, dtype):
    words = [f"config={config}", f"run={tmp_path / 'r'}", f"model.param_dtype={dtype}"]
    folder = begin(load(words))
    new = [f"{section}.optimizer.{kind}_dtype" for kind in ("gradient", "moment")]
    rewrite(folder, {key: value for key, value in saved_config(folder).items() if not key.endswith("ent_dtype")})
    if dtype == "float32":
        begin(load(words))
    else:
        assert f"{new[0]} is {dtype} there and float32 here and 1 more" in refusal(load(words))
    if dtype == "bfloat16":
        begin(load([*words, *(f"{key}=bfloat16" for key in new)]))


def test_a_folder_that_is_older_than_the_choice_of_a_prompt_had_the_papers(tmp_path):
    def older(name: str, *words: str) -> list[str]:
        words = ["config=grpo", f"run={tmp_path / name}", "rollout.grammar=retool", *words]
        folder = begin(load(words))
        rewrite(folder, {key: value for key, value in saved_config(folder).items() if not key.endswith("tool_prompt")})
        return words

    begin(load(older("miniature")))  # whose default is the paper's
    other = older("other", "tokenizer=elsewhere")
    assert "rollout.tool_prompt is paper there and" in refusal(load(other))
    begin(load([*other, "rollout.tool_prompt=paper"]))


def test_a_key_that_only_the_folder_knows(tmp_path, monkeypatch):
    run = load(["config=grpo", f"run={tmp_path / 'r'}"])
    folder = begin(run)
    values = saved_config(folder)
    rewrite(folder, values | {"rl.kl": 0.1})
    message = refusal(run)
    assert (
        f"{folder} was begun with rl.kl=0.1, a key that this version does not have; go on with the version" in message
    )
    assert f"or remove the key from {folder / 'config.yaml'}" in message
    monkeypatch.setitem(folders.REMOVED, "rl.kl", (0.0,))
    assert "rl.kl=0.1" in refusal(run)
    rewrite(folder, values | {"rl.kl": 0.0})
    begin(run)
    rewrite(folder, values | {"rollout.tool_output_chars": 200})
    assert "rollout.tool_output_chars=200" in refusal(run)
    rewrite(folder, values | {"engine.chunk_rows": 8, "engine.row_buckets": [2]})  # sizes, which change no draw
    begin(run)
    rewrite(folder, values | {"checkpoint.asynchronous": True})  # of a section of which nothing matters
    begin(run)


def test_a_token_that_an_old_version_wrote_is_neither_compared_nor_kept(tmp_path):
    run = load(["config=grpo", f"run={tmp_path / 'r'}"])
    folder = begin(run)
    rewrite(folder, saved_config(folder) | {"sandbox.token": SECRET, "rl.temperature": 0.5})
    assert SECRET not in refusal(run)
    rewrite(folder, saved_config(folder) | {"rl.temperature": 1.0})
    with claim_folder(run):
        write_config(run)
    assert SECRET not in (folder / "config.yaml").read_text()


def test_the_model_of_an_old_folder_can_be_read(tmp_path):
    run = load(["config=grpo", f"run={tmp_path / 'r'}", "model.hidden_size=48"])
    folder = begin(run)
    values = saved_config(folder)
    del values["evaluation.answer_tokens"], values["model.head_chunk"]
    rewrite(folder, values | {"rl.kl": 0.1, "model.dropout": 0.0})
    assert read_model(folder) == (run.model, "miniature")
    (folder / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match="is not the config of a run"):
        read_model(folder)


# --------------------------------------------------------------------------------------------------- one at a time

HOLD = """
import sys
from retool_jax.run.load import load
from retool_jax.run.folder import claim_folder
with claim_folder(load(sys.argv[1:])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(*words: str) -> Iterator[subprocess.Popen]:
    """A process that trains in a folder until its input ends, or until it is killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, *words], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_folder_in_use_is_refused_with_its_holder_or_waited_for_and_free_when_that_is_killed(tmp_path, capsys):
    words = ["config=sft", f"run={tmp_path / 'r'}"]
    with another_process(*words) as process:
        folder = tmp_path / "r"
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
        message = refusal(load([*words, "checkpoint.every=1"]))
        holder = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(rf"{re.escape(str(folder))} is in use by {holder} .*choose another run=FOLDER", message)
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
        assert read_model(folder)[1] == "miniature", "who only reads asks nobody"
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        with claim_folder(load(words), wait=True):
            told = capsys.readouterr().out
            assert f"process {os.getpid()} " in refusal(load(words)), "not the one that was killed"
        killer.wait()
        assert process.wait() == -signal.SIGKILL
    assert (folder / "lock").read_text() == ""
    assert told.count("\n") == 1
    assert told.startswith(f"waiting for {folder}, which is in use by process {process.pid} on ")
