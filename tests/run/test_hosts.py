"""A run and an evaluation on two hosts, each a process: their numbers are those of one host, and no host waits for one
that is gone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retool_jax.evaluation.config import RESULT, SAMPLES
from retool_jax.metrics import read_metrics

# A process that trains, or evaluates, in one folder after another, so that its start is paid for once. Its tool is the
# interpreter, whose calls are lost on the second host while a file says so.
PROCESS = """
import json, sys
import retool_jax.run.evaluate, retool_jax.run.rl  # as commands do, which read their words before they join
from retool_jax import evaluate, hosts, train
from retool_jax.errors import run_command
from retool_jax.hosts_config import HostsConfig

def main(words):
    with hosts.joined(HostsConfig(silent_s=5)):
        for line in sys.stdin:
            words = json.loads(line)
            (evaluate if "config=eval" in words else train).main(words)
            print("ended", flush=True)

run_command(main)
"""
TOOL = """
import os
from retool_jax.tools.python import Python
from retool_jax.tools.tool import Output

class Unreliable(Python):
    async def call(self, arguments, state):
        if os.environ.get("JAX_PROCESS_ID") == "1":
            return Output("the disk is gone", "machinery")
        return await super().call(arguments, state)
"""

# What an evaluation has of the run: with the same sizes the programs are there already.
SHARED = "sandbox.backend", "engine.slots", "engine.token_buckets"


class Pair:
    """Two hosts on one machine."""

    def __init__(self, environment: dict[str, str], output: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
        self._files = [output / f"host{number}" for number in range(2)]
        self._ended = 0
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-u", "-c", PROCESS],
                env=environment | place | {"JAX_PROCESS_ID": str(number)},
                stdin=subprocess.PIPE,
                stdout=file.open("w"),
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number, file in enumerate(self._files)
        ]

    def begin(self, *words: str) -> None:
        for process in self.processes:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()

    def said(self) -> list[str]:
        return [file.read_text() for file in self._files]

    def run(self, *words: str) -> list[str]:
        """Run a command to its end; the output of each host since its start."""
        self._ended += 1
        self.begin(*words)
        deadline = time.monotonic() + 600
        while any(said.count("\nended\n") < self._ended for said in self.said()):
            assert time.monotonic() < deadline and not any(one.poll() for one in self.processes), "\n".join(self.said())
            time.sleep(0.05)
        return self.said()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def pair(one_device, folder) -> Iterator[Pair]:
    (folder / "unreliable.py").write_text(TOOL)
    path = os.pathsep.join(filter(None, [str(folder), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    pair = Pair(one_device | {"PYTHONPATH": path}, folder)
    try:
        yield pair
    finally:
        for process in pair.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def both(pair, small_run, with_critic, folder) -> Path:
    """The run of `alone` on two hosts, with its own cold start and a critic, so that both updates of a step are
    compared; a run of GRPO follows below."""
    first, second = pair.run(*small_run, *with_critic, f"run={folder / 'both'}")
    assert "before RL" in first and "before RL" not in second, first
    assert "this is host 1 (" in second and "of 2; the first one is host 0 (" in second
    return folder / "both"


def numbers_of(run: Path, comparable: Callable[[Path], list[dict]]) -> list[dict]:
    """A run's lines and those of its cold start, with numbers rounded to the precision that reordered float sums
    keep."""
    (cold_start,) = run.parent.glob("cold-start-*")
    return comparable(cold_start) + comparable(run)


def assert_alike(ours: list[dict], theirs: list[dict]) -> None:
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            # A clipped or a largest token may be another one by the last bit of a log-probability.
            close = pytest.approx(other[name], rel=1e-4, abs=1e-5) if isinstance(value, float) else other[name]
            assert value == close, (mine["kind"], mine["step"], name)


def draws_of(run: Path) -> list[list[list[int]]]:
    files = sorted((run / "rollouts").iterdir())
    return [[json.loads(line)["ids"] for line in file.read_text().splitlines()] for file in files]


def test_two_hosts_draw_and_learn_what_one_process_does(both, alone, comparable):
    assert draws_of(both) == draws_of(alone) and len(draws_of(both)) == 4
    ours, theirs = numbers_of(both, comparable), numbers_of(alone, comparable)
    assert {line["kind"] for line in ours} == {"sft", "rl", "eval"}
    assert_alike(ours, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), abs=1e-5)
    learned = [line for line in ours if line.get("grad_norm", 0) > 0 and line["kind"] == "rl"]
    assert len(learned) >= 2 and all("critic/value_loss" in line for line in learned)


def test_groups_that_two_hosts_drew_are_compared_with_themselves(pair, small_run, both, drawn, comparable):
    """GRPO's advantages are computed over a whole group, whichever host drew its samples."""
    run = both.with_name("grpo")
    pair.run(*small_run, "rl.steps=2", "evaluation.every=0", "rl.save_rollouts=true", f"run={run}")
    assert draws_of(run) == draws_of(drawn)
    assert_alike(comparable(run), comparable(drawn))
    assert any(line.get("grad_norm", 0) > 0 for line in comparable(run)), "it must have learned"


def test_the_first_host_writes_what_a_run_keeps_once(both, alone):
    def files(run: Path) -> set[str]:
        shown = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
        return {str(path) for path in shown if path.parts[0] not in ("checkpoints", "tensorboard")}

    assert files(both) == files(alone)
    assert json.loads((both / "summary.json").read_text())["tokens_per_s"].keys() == {"rollout", "update"}


def go_on(run: Path, name: str) -> Path:
    """A copy of a run as a kill after its third step would leave it."""
    folder = Path(shutil.copytree(run, run.with_name(name)))
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "summary.json").unlink()
    return folder


def test_another_number_of_hosts_goes_on_with_a_run(pair, train, small_run, with_critic, both, alone, comparable):
    one = go_on(both, "one")
    assert "from step 3 of 4" in train(one, *with_critic)
    two = go_on(alone, "two")
    assert f"resuming {two} from step 3 of 4" in pair.run(*small_run, *with_critic, f"run={two}")[1]
    for run in (one, two):
        assert draws_of(run) == draws_of(alone)
        assert_alike(comparable(run), comparable(alone))


def test_a_host_whose_machinery_is_broken_is_named_and_the_others_go_on(pair, small_run, both):
    cold_start = next(both.parent.glob("cold-start-*"))
    words = [f"run={both.with_name('broken')}", f"init_from={cold_start}", "tools=unreliable:Unreliable"]
    said, _ = pair.run(*small_run, *words, "evaluation.every=0", "rl.steps=1")
    (line,) = [line for line in read_metrics(both.with_name("broken")) if line["kind"] == "rl"]
    lost = line["end/sandbox_lost"]
    assert 0 < lost <= 8 and line["dropped"] == lost / 16, "of 16 trajectories 8 are the second host's"
    assert f"step 1: {lost} trajectories sandbox lost (host 1 (" in said and "the disk is gone" in said
    assert line["grad_norm"] > 0, "the others are learned from"


def test_two_hosts_evaluate_what_one_process_does_and_each_goes_on_with_the_others(pair, command, small_run, both):
    given = dict(word.split("=", 1) for word in small_run)
    words = ["config=eval", f"init_from={both}", f"data.source={given['data.train']}", "evaluation.problems=0"]
    words += ["evaluation.samples=3", "engine.decode_steps=16", *(f"{key}={given[key]}" for key in SHARED)]

    def evaluated(name: str, run: Callable[..., object]) -> Path:
        said = run(*words, f"run={both.with_name(name)}")
        assert "error:" not in "".join(said), said
        return both.with_name(name)

    one, two = evaluated("evaluated-by-one", command), evaluated("evaluated-by-two", pair.run)
    assert (two / RESULT).read_bytes() == (one / RESULT).read_bytes()
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    lines = (one / SAMPLES).read_bytes().splitlines(keepends=True)
    assert len(lines) == 12 == len((two / SAMPLES).read_bytes().splitlines())
    said = pair.said()
    assert "3 samples of each problem" in " ".join(said[0].split()) and "samples of each" not in said[1]
    assert all("this host draws 6 of 12 samples" in each for each in said)
    # As two hosts leave it that are killed: each has written some, and the second one was writing.
    for name, run in (("goes-on-as-one", command), ("goes-on-as-two", pair.run)):
        folder = Path(shutil.copytree(two, both.with_name(name)))
        (folder / RESULT).unlink()
        (folder / SAMPLES).write_bytes(b"".join(lines[:3]))
        (folder / "samples.1.jsonl").write_bytes(b"".join([*lines[5:9], lines[9][:40]]))
        evaluated(name, run)
        assert (folder / RESULT).read_bytes() == (one / RESULT).read_bytes()
        assert [path.name for path in folder.glob("samples*")] == [SAMPLES]
    assert all("7 of 12 samples are there already" in each for each in pair.said())


def test_a_host_that_is_killed_is_named_and_the_run_goes_on_later(
    pair, train, small_run, with_critic, both, alone, comparable
):
    """Its final numbers are those of one process that was not killed."""
    words, run = with_critic, both.with_name("killed")
    pair.begin(*small_run, *words, f"run={run}", "rl.steps=30")
    deadline = time.monotonic() + 600
    while not (run / "checkpoints" / "2").is_dir():
        assert time.monotonic() < deadline and not any(one.poll() for one in pair.processes), "\n".join(pair.said())
        time.sleep(0.02)
    pair.processes[1].send_signal(signal.SIGKILL)
    assert pair.processes[0].wait(timeout=300) == 1, pair.said()[0]
    assert f"error: host 1 ({socket.gethostname()}, process {pair.processes[1].pid}) has said nothing" in pair.said()[0]
    latest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    steps = max(4, latest + 1)  # four, unless this process slept between two looks
    assert f"from step {latest} of {steps}" in train(run, *words, f"rl.steps={steps}")
    assert draws_of(run)[:4] == draws_of(alone)
    first = [[line for line in comparable(of) if line["kind"] == "rl"][:4] for of in (run, alone)]
    assert_alike(*first)
