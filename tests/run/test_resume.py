"""Contract 9: kill -9 in the middle of RL, the same command again, and the numbers are those of an uninterrupted
run."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.data.problems import Problems
from retool_jax.errors import UserError
from retool_jax.metrics import read_metrics, summary_rows, time_rows
from retool_jax.report.behaviour import BEHAVIOUR
from retool_jax.report.blocks import make_blocks
from retool_jax.report.curves import PANELS, draw_panel
from retool_jax.report.page import end_counts
from retool_jax.report.runs import load_runs
from retool_jax.run.build import sandbox_lines
from retool_jax.run.load import load
from retool_jax.run.rl import check_data
from retool_jax.sandbox import Sandbox, SandboxConfig


@pytest.fixture(scope="module")
def unbroken(train, runs) -> Path:
    folder = runs / "unbroken"
    output = train(folder)
    assert "before RL" in output and "time by part" in output
    return folder


def test_everything_that_the_report_draws_and_tells_is_written_by_a_run(unbroken):
    (cold_start,) = unbroken.parent.glob("cold-start-*")
    runs = dict(zip(("rl", "sft"), load_runs([unbroken, cold_start]), strict=True))
    missing = [panel.title for panel in (*PANELS, *BEHAVIOUR) if draw_panel(panel, [runs[panel.kind]]) is None]
    assert missing == []
    run = runs["rl"]
    for key in ("accuracy", "accuracy_stderr", "greedy_accuracy"):
        assert len(run.series("eval", key, run.curve_split)[0]) == 3, key
    assert end_counts(run)["rows"] and make_blocks([run]).shown
    assert not [row for row in summary_rows(run.summary) if "-" in row]
    parts = {name for name, *_ in time_rows(run.summary)}
    assert {"cold start", "compile", "rollout", "update", "evaluation"} <= parts
    assert run.summary["tokens_per_s"].keys() == {"rollout", "update"}


def test_every_number_that_a_run_writes_is_defined_in_the_documentation(unbroken, undefined):
    (cold_start,) = unbroken.parent.glob("cold-start-*")
    lines = read_metrics(unbroken) + read_metrics(cold_start)
    assert {line["kind"] for line in lines} == {"sft", "rl", "eval"}
    assert undefined({name for line in lines for name in line}) == set()


# Trains until the line of its fifth step is on the disk, and the checkpoint of its fourth, and is killed then.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from retool_jax import train
from retool_jax.metrics import MetricsLog

write = MetricsLog.write

def write_and_die(log, kind, step, values):
    write(log, kind, step, values)
    if (kind, step) == ("rl", 5):
        while not Path(sys.argv[1], "checkpoints", "4").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

MetricsLog.write = write_and_die
train.main(sys.argv[2:])
"""


def test_a_killed_run_resumes_to_the_same_numbers(train, one_device, small_run, comparable, unbroken):
    folder = unbroken.with_name("killed")
    command = [sys.executable, "-c", KILLED, str(folder), *small_run, f"run={folder}"]
    process = subprocess.run(command, env=one_device, capture_output=True, text=True, timeout=600)
    output = process.stdout + process.stderr
    assert process.returncode == -signal.SIGKILL, output
    assert "cold start: reusing" in output, "a cold start is made once for a config"
    assert not (folder / "summary.json").exists()

    assert f"resuming {folder} from step 4 of 6" in train(folder)
    assert comparable(folder) == comparable(unbroken)
    steps = [line["step"] for line in comparable(folder) if line["kind"] == "rl"]
    assert steps == [1, 2, 3, 4, 5, 6]
    learned = [line["step"] for line in comparable(folder) if line["kind"] == "rl" and line.get("grad_norm", 0) > 0]
    assert max(learned) > 4, "the resumed part must have learned something"
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, unbroken)]
    assert summaries[0]["after"] == summaries[1]["after"] | {"perf/eval_s": summaries[0]["after"]["perf/eval_s"]}


def cut_after(folder: Path, kind: str, step: int) -> None:
    """Leave the metrics file as a kill after one of its lines would."""
    lines = read_metrics(folder)
    last = max(i for i, line in enumerate(lines) if (line["kind"], line["step"]) == (kind, step))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[: last + 1]))


def after(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "summary.json").read_text())["after"].items() if k != "perf/eval_s"}


def test_a_look_that_was_cut_off_is_taken_again_alone(train, comparable, unbroken):
    """The checkpoint comes before the evaluation, so a kill during a long one costs no step; also for the last one."""
    folder = Path(shutil.copytree(unbroken, unbroken.with_name("looking")))
    (folder / "summary.json").unlink()
    cut_after(folder, "rl", 6)
    assert f"resuming {folder} from step 6 of 6" in train(folder)
    assert comparable(folder) == comparable(unbroken)
    assert after(folder) == after(unbroken)


def test_a_longer_run_does_not_pass_off_the_numbers_of_the_shorter_one(train, trainer, comparable, unbroken):
    """A run that was killed between its last checkpoint and its summary has the summary of fewer steps."""
    folder = Path(shutil.copytree(unbroken, unbroken.with_name("longer")))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 4, "after": {"accuracy": 0.123}}))
    output = train(folder)
    assert "nothing to do" not in output and "12.3 %" not in output
    assert comparable(folder) == comparable(unbroken)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6 and after(folder) == after(unbroken)
    assert "is complete; nothing to do" in train(folder)
    # Further from there: what is new is told, and the summary of 6 steps does not survive the first one. A last
    # checkpoint that cannot be written, which shows when the last look is over, leaves none either.
    further = ["rl.steps=7", "evaluation.every=0", "sandbox.slots=3"]
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (60 << 10, resource.RLIM_INFINITY))
    output = train(folder, *further)
    assert "rl.steps is 7 from here on; it was 6" in output and "sandbox.slots is 3 from here on" in output
    assert "step 7: dev accuracy" in output and "error: cannot save checkpoint 7 in" in output
    assert "checkpoint 6 is intact" in output and not (folder / "summary.json").exists()
    resource.prlimit(trainer.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert f"resuming {folder} from step 6 of 7" in train(folder, *further)
    lines = comparable(folder)
    assert lines[: len(comparable(unbroken))] == comparable(unbroken)
    assert [(line["kind"], line["step"]) for line in lines[-2:]] == [("rl", 7), ("eval", 7)]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 7


def test_a_run_says_what_its_sandbox_costs():
    lines = sandbox_lines(Sandbox("gvisor", SandboxConfig()))
    assert "about 20 ms" in lines[1] and "sandbox.backend=[bubblewrap] about 3 ms" in lines[1]
    assert "sandbox.backend=[process]" in lines[1]
    assert len(sandbox_lines(Sandbox("bubblewrap", SandboxConfig()))) == len(sandbox_lines(None)) == 1


def test_a_run_does_not_go_on_with_other_problems(tmp_path):
    path, words = tmp_path / "p.jsonl", ["config=grpo", f"run={tmp_path / 'r'}", f"data.dev={tmp_path / 'p.jsonl'}"]
    digests = []
    for answer in ("4", "5"):
        path.write_text(json.dumps({"question": "What is 2 + 2?", "answer": answer}))
        digests.append({"train": "", "dev": Problems(str(path), "dev", 0).digest})
    check_data(load(words), {}, digests[0])  # of a checkpoint that is older than this
    check_data(load(words), digests[0], digests[0])
    with pytest.raises(
        UserError, match=r"data.dev=.*p.jsonl is not what .*r began with; restore it, or choose another"
    ):
        check_data(load(words), *digests)
