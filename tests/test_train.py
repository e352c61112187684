"""Bad input through the real entry point: one line that names the mistake, the limit and what to do, and nothing
written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax import train
from retool_jax.checkpoint import Checkpoints
from retool_jax.convert import convert, find_source
from retool_jax.data.arithmetic import problem_row
from retool_jax.errors import UserError, run_command
from retool_jax.learn.optimizer import TrainState
from retool_jax.metrics import read_metrics
from retool_jax.run.folder import claim_folder
from retool_jax.run.load import load
from retool_jax.run.weights import load_weights
from retool_jax.tokens.tokenizer import MINIATURE

# A model of a few thousand weights, on the eight virtual devices of the tests.
TINY = [
    "mesh.data=8",
    "mesh.fsdp=1",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.head_dim=8",
    "sft.steps=3",
    "sft.batch_tokens=256",
    "sft.rows_per_micro=8",
]
SFT = ["config=sft", *TINY, "checkpoint.every=1", "checkpoint.keep=2"]
GRPO = ["config=grpo", *TINY, "rl.rows_per_micro=8", "tools=none"]


def error_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        train.main(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "retool_jax.train", *words], capture_output=True, text=True, timeout=120
    )


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """These runs and commands share compiled programs, also small ones, since there are many of them."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory) -> Path:
    """The run folder of a cold start of three steps; copy it to damage it."""
    folder = tmp_path_factory.mktemp("runs") / "cold"
    train.main([*SFT, f"run={folder}"])
    return folder


@pytest.fixture
def copied(cold_start, tmp_path) -> Path:
    """The same run in another folder, two steps before its end."""
    folder = Path(shutil.copytree(cold_start, tmp_path / "copied"))
    shutil.rmtree(folder / "checkpoints" / "3")
    return folder


def truncate_newest(folder: Path) -> Path:
    """Cut the weights file of a run's newest checkpoint in half."""
    step = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    path = max((path for path in (step / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return step


# ---------------------------------------------------------------------------------------- before anything is written


@pytest.fixture
def data(tmp_path):
    """Write a JSONL of good rows and the given ones: `data(rows)` gives its path."""

    def write(*rows: dict | str) -> Path:
        path = tmp_path / "mine.jsonl"
        good = [problem_row("train", index) for index in range(3)]
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in (*good, *rows)))
        return path

    return write


def test_data_that_cannot_be_used_is_told_before_anything_is_written(data, tmp_path):
    run = tmp_path / "run"
    words = [*GRPO, f"run={run}"]
    row = problem_row("train", 7)
    long = row | {"prompt": [{"role": "user", "content": "What is 1 + 1? " * 20}], "extra_info": {"index": "long"}}
    path = data()

    assert f"no data file {tmp_path / 'no.jsonl'};" in error_of(*words, f"data.train={tmp_path / 'no.jsonl'}")
    data(row | {"reward_model": {"ground_truth": "", "style": "rule"}})
    assert f"{path} row 4 has an empty reward_model.ground_truth" in error_of(*words, f"data.train={path}")
    data("{'prompt': 3")
    assert f"cannot read data {path} (" in error_of(*words, f"data.test={path}")
    path.write_text(json.dumps({key: row[key] for key in row if key != "reward_model"}) + "\n")
    assert f"{path} row 1 has no column 'reward_model'; it has" in error_of(*words, f"data.dev={path}")
    data()
    (tmp_path / "same.jsonl").write_text(path.read_text())
    named = f"data.train={path} has every question of data.test={tmp_path / 'same.jsonl'}, so the test would measure"
    assert named in error_of(*words, f"data.train={path}", f"data.test={tmp_path / 'same.jsonl'}")
    data(long)
    message = error_of(*words, f"data.train={path}")
    assert message.startswith("problem long has a prompt of ")
    assert "the limit is rollout.max_prompt_tokens=40: raise it (and engine.max_length with it) or leave" in message
    assert not run.exists() and not list(tmp_path.glob("cold-start*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from=/nope"], "no checkpoint at /nope: expected checkpoints of a run, or config.json of a model"),
        (["init_from=/nope", "tokenizer="], "no checkpoint at /nope: "),
        (
            ["tokenizer=/nope"],
            "no tokenizer at /nope: ",
        ),
        (["model.vocab_size=300"], "model.vocab_size=300 is smaller than the tokenizer's"),
        (["sft.rows_per_micro=4"], "sft.rows_per_micro=4 does not divide over mesh.data x mesh.fsdp = 8 devices"),
        (["rl.rows_per_micro=12"], "rl.rows_per_micro=12 does not divide over mesh.data x mesh.fsdp = 8 devices"),
        (["mesh.data=3", "sft.rows_per_micro=6", "rl.rows_per_micro=6"], "does not divide the 8 device(s) here"),
        (["mesh.data=1", "mesh.fsdp=2", "mesh.tp=4"], "mesh.tp=4 does not divide model.num_kv_heads=2"),
        (["rl.minibatches=7"], "rl.prompts_per_step=24 does not divide into rl.minibatches=7"),
        (["sandbox.backend=[nowhere]", "tools=python"], "sandbox.backend: there is no 'nowhere'; there is"),
        (["rl.stpes=3"], "unknown key rl.stpes; did you mean rl.steps?"),
    ],
)
def test_a_config_that_cannot_run_is_told_before_anything_is_written(tmp_path, words, message):
    assert message in error_of(*GRPO, f"run={tmp_path / 'run'}", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sft_retool", "sft_qwen2.5_32b"])
def test_a_config_that_takes_its_tokenizer_from_where_nothing_is(tmp_path, name):
    message = error_of(f"config={name}", "init_from=/nope", f"run={tmp_path / 'run'}")
    assert message.startswith("no checkpoint at /nope: ") and "tokenizer" not in message
    assert list(tmp_path.iterdir()) == []


def test_the_devices_that_are_left_over_count(tmp_path):
    """`mesh.fsdp=-1` is known only when the devices are."""
    words = ["config=sft", "mesh.data=1", "mesh.fsdp=-1", "sft.rows_per_micro=4", f"run={tmp_path / 'run'}"]
    assert "sft.rows_per_micro=4 does not divide over mesh.data x mesh.fsdp = 8 devices" in error_of(*words)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_ends_with_code_2_and_one_line(tmp_path):
    done = command(*GRPO, "init_from=/nope", f"run={tmp_path / 'run'}")
    assert_one_line(done, "no checkpoint at /nope", "run config=sft run=/nope first", "or leave init_from empty")
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_config(capsys):
    for words in ([], ["--help"], ["-h", "config=sft"]):
        train.main(words)
        assert capsys.readouterr().out.startswith("usage: python -m retool_jax.train config=NAME [key=value ...]")


LIGHT = """
import socket, sys
def refused(*arguments, **options): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
from retool_jax import train
from retool_jax.errors import UserError
from retool_jax.run.load import load
for config in ("sft", "grpo", "sft_retool"):
    train.main([f"config={config}", "--help"])
for word in ("rl.stpes=3", "rl.steps=abc", "rl.steps=0", "rollout.grammar=xml", "rl.minibatches=5"):
    try: train.main(["config=grpo", "init_from=acme/tiny", word])
    except UserError as error: print(error)
load(["config=sft_retool", "init_from=acme/tiny"])
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_help_and_a_mistake_in_the_words_need_neither_jax_nor_the_network():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *_, unknown, kind, limit, choice, cross, modules = done.stdout.splitlines()
    assert unknown == "unknown key rl.stpes; did you mean rl.steps?"
    assert kind.startswith("rl.steps=abc ") and limit.startswith("rl.steps=0 ")
    assert choice.startswith("rollout.grammar=xml ") and cross.startswith("rl.prompts_per_step=24 ")
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "transformers", "tokenizers", "huggingface_hub"}
    assert not heavy & set(modules.split()) and "pydantic" in modules


# ---------------------------------------------------------------------------------------------------- run folders


def test_a_folder_of_another_run(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    message = error_of(*SFT, f"run={copied}", "sft.optimizer.learning_rate=0.5")
    assert f"{copied} holds another run: sft.optimizer.learning_rate is 0.003 there and 0.5 here" in message
    assert "choose another run=FOLDER, or remove that one" in message
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert f"{tmp_path} is not empty and holds no run; choose another run=FOLDER" in error_of(*SFT, f"run={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_use(copied):
    """The second command names the first one and changes nothing."""
    with claim_folder(load([*SFT, f"run={copied}"])):
        before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
        message = error_of(*SFT, f"run={copied}")
        assert message.startswith(f"{copied} is in use by process {os.getpid()} on ")
        assert "choose another run=FOLDER" in message
        assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before
        # Who reads it needs no claim.
        weights = load_weights(load([*GRPO, f"init_from={copied}"]), copied)
        assert len(jax.tree.leaves(weights)) > 5 and find_source(str(copied))[1] == copied


def test_a_run_that_is_further_than_its_steps_is_refused_before_its_config_is_written(tmp_path):
    words = [*GRPO, f"run={tmp_path / 'run'}"]
    with claim_folder(load([*words, "rl.steps=5"])) as folder:
        pass
    state = TrainState(np.zeros((), np.int32), {"w": np.zeros(3)}, {"m": np.zeros(3)})
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(5, state, {})
    checkpoints.close()
    before = (folder / "config.yaml").read_bytes()
    message = error_of(*words, "rl.steps=3")
    assert message.startswith(f"{folder} is at step 5 already, beyond rl.steps=3; set rl.steps=5 or more")
    assert (folder / "config.yaml").read_bytes() == before
    # So it is when the checkpoint cannot be read.
    assert f"cannot read checkpoint {folder / 'checkpoints' / '5'}" in error_of(*words, "rl.steps=7")
    assert (folder / "config.yaml").read_bytes() == before


def test_the_saved_config_resumes_the_run(copied, cold_start):
    train.main([f"config={copied / 'config.yaml'}", f"run={copied}"])
    losses = [[line["loss"] for line in read_metrics(folder)] for folder in (copied, cold_start)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


# ---------------------------------------------------------------------------------------------------- checkpoints


def test_a_corrupt_checkpoint_is_told_and_its_removal_is_the_way_out(copied, capfd):
    step = truncate_newest(copied)
    metrics = (copied / "metrics.jsonl").read_bytes()
    message = error_of(*SFT, f"run={copied}")
    assert message.startswith(f"checkpoint {step} is corrupt (") and "remove that folder to start over" in message
    assert capfd.readouterr().err == "", "nor does a thread of orbax say more"
    assert (copied / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(step)
    train.main([*SFT, f"run={copied}"])
    assert [line["step"] for line in read_metrics(copied)] == [1, 2, 3]


def test_a_corrupt_cold_start_is_told_before_anything_is_written(copied, tmp_path):
    step = truncate_newest(copied)
    message = error_of(*GRPO, f"init_from={copied}", f"run={tmp_path / 'run'}")
    assert message.startswith(f"checkpoint {step} is corrupt (") and "remove that folder" in message
    assert not (tmp_path / "run").exists()


def test_a_cold_start_of_another_model(cold_start, tmp_path):
    message = error_of(*GRPO, "model.intermediate_size=64", f"init_from={cold_start}", f"run={tmp_path / 'run'}")
    assert f"{cold_start} holds another model: model.intermediate_size is 48 there and 64 here" in message
    assert list(tmp_path.iterdir()) == []


def test_a_cold_start_is_taken_however_its_model_is_computed(cold_start, tmp_path):
    """Only the shape and the vocabulary are compared."""
    how = ["remat=full", "head_chunk=16", "attention_kernel=xla", "cache_dtype=bfloat16", "compute_dtype=bfloat16"]
    run = load([*GRPO, *(f"model.{word}" for word in how), "model.param_dtype=bfloat16", f"init_from={cold_start}"])
    plain = load_weights(load([*GRPO, f"init_from={cold_start}"]), cold_start)
    for x, y in zip(jax.tree.leaves(load_weights(run, cold_start)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))


def test_a_cold_start_of_another_vocabulary(cold_start, tmp_path, capsys):
    words = Path(shutil.copytree(MINIATURE, tmp_path / "words"))
    run = load([*GRPO, f"init_from={cold_start}", f"tokenizer={words}"])
    load_weights(run, cold_start)  # the same one at another place
    table = json.loads((words / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (words / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"another vocabulary: tokenizer is miniature there and .*words here"):
        load_weights(run, cold_start)
    moved = Path(shutil.copytree(cold_start, tmp_path / "moved"))
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("tokenizer: miniature", "tokenizer: /gone"))
    load_weights(load([*GRPO, f"init_from={moved}"]), moved)
    assert "moved was trained with tokenizer=/gone, which cannot be compared" in capsys.readouterr().out


def test_a_checkpoint_of_another_vocabulary(cold_start, tmp_path):
    """Also of a Hugging Face folder."""
    folder = tmp_path / "exported"
    convert(str(cold_start), folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    run = load([*GRPO, f"init_from={folder}"])
    load_weights(run, folder)
    for word in list(table["model"]["vocab"])[:2]:
        table["model"]["vocab"][word] ^= 1
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"another vocabulary: tokenizer is .*exported there and miniature here"):
        load_weights(run, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    load_weights(run, folder)  # weights alone


def test_a_policy_that_writes_calls_as_the_run_does_not_read_them(cold_start, tmp_path):
    words = [*GRPO[:-1], f"init_from={cold_start}"]
    retool = load([*words, "rollout.grammar=retool"])
    with pytest.raises(UserError, match=r"in the grammar hermes, and rollout.grammar=retool reads none of them; set"):
        load_weights(retool, cold_start)
    load_weights(load([*words, "rollout.grammar=retool", "tools=none"]), cold_start)
    load_weights(load([*SFT, "sft.grammar=retool", f"init_from={cold_start}"]), cold_start)
    folder = Path(shutil.copytree(cold_start, tmp_path / "other"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("  grammar: ''", "  grammar: retool"))
    load_weights(retool, folder)
    with pytest.raises(UserError, match=r"in the grammar retool, and rollout.grammar=hermes reads none"):
        load_weights(load(words), folder)
    (folder / "config.yaml").write_text(config.replace("tools: python", "tools: none"))
    load_weights(retool, folder)


def test_a_run_folder_without_a_checkpoint_is_no_cold_start(tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    message = error_of(*GRPO, f"init_from={tmp_path / 'empty'}", f"run={tmp_path / 'run'}")
    assert f"no checkpoint at {tmp_path / 'empty'}" in message
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ full disks


def test_a_disk_that_fills_up_and_is_cleared(tmp_path):
    """A whole run on a disk of 1 MB: the error is one line, the last checkpoint is good, and the same command
    resumes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; the limit on file sizes is tested below")
    disk = tmp_path / "small"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a small file system here: {done.stderr.strip()}")
    try:
        words = [*SFT, "checkpoint.keep=9", "sft.steps=5", f"run={disk / 'run'}"]
        assert_one_line(command(*words), "cannot save checkpoint ", "is intact; make room and start the same command")
        folder = disk / "run" / "checkpoints"
        steps = sorted(int(path.name) for path in folder.iterdir())
        assert steps == list(range(1, steps[-1] + 1)) and 1 <= steps[-1] < 5
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        train.main(words)
        assert [line["step"] for line in read_metrics(disk / "run")] == list(range(1, 6))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_write_that_the_system_refuses(tmp_path, cold_start):
    """Without root rights: a limit on the size of files, which the checkpoint of the first step exceeds."""
    assert cold_start.exists()  # its compiled update is larger than the limit, and there already
    words = [sys.executable, "-m", "retool_jax.train", *SFT, f"run={tmp_path / 'run'}"]
    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *words]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert_one_line(done, "cannot save checkpoint 1 in", "File too large", "no checkpoint exists yet")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    checkpoints.close()


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("ENOSPC", "make room and start the same command again"), ("EACCES", "choose a folder that can be written")],
)
def test_an_error_of_the_disk_is_one_line(monkeypatch, capsys, name, way_out):
    def main(words: list[str]) -> None:
        code = getattr(errno, name)
        raise OSError(code, os.strerror(code), "runs/x/metrics.jsonl")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write runs/x/metrics.jsonl (") and error.endswith(f"; {way_out}\n")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["train", *SFT, f"run={tmp_path / 'file' / 'run'}"])
    with pytest.raises(SystemExit, match="2"):
        run_command(train.main)
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {tmp_path / 'file'}") and error.count("\n") == 1
    assert error.endswith("choose a folder that can be written\n")


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    def main(words: list[str]) -> None:
        raise FileNotFoundError("a bug")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(FileNotFoundError):
        run_command(main)
