"""Contract 9: kill -9 in the middle of RL, the same command again, and the numbers are those of an unbroken run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool_jax import report
from retool_jax.data.arithmetic import problem_row
from retool_jax.metrics import read_metrics

WORDS = [
    "config=grpo",
    "sandbox.backend=[process]",
    "sft.steps=60",
    "sft.batch_size=16",
    "sft.optimizer.warmup_steps=5",
    "sft.optimizer.decay_steps=50",
    "rl.steps=6",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "engine.slots=16",
    "evaluation.every=3",
    "evaluation.problems=4",
    "evaluation.final_split=dev",
    "checkpoint.every=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Words for data that is learned by heart in seconds: four problems, each answered rightly as often as wrongly, by
    a call or without. So the samples of a group differ, and every step of RL has something to learn from."""
    folder = tmp_path_factory.mktemp("data")
    rows = [problem_row("train", index) for index in range(4)]
    demonstrations = []
    for row in rows:
        for answer in (row["reward_model"]["ground_truth"], "7"):
            call = {"function": {"name": "code_interpreter", "arguments": {"code": f"print({answer})"}}}
            told = {"role": "assistant", "content": f"\\boxed{{{answer}}}"}
            asked = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": answer}]
            demonstrations += [{"messages": [*row["prompt"], *turns, told]} for turns in ([], asked)]
    for name, lines in (("problems", rows), ("demonstrations", demonstrations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = folder / "problems.jsonl"
    return [f"sft.data={folder / 'demonstrations.jsonl'}", f"data.train={problems}", f"data.dev={problems}"]


@pytest.fixture(scope="module")
def start(fully_compiled, data):
    def run(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "retool_jax.train", *WORDS, *data, f"run={folder}"]
        return subprocess.Popen(
            command, env=fully_compiled, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return run


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def comparable(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    output = finish(start(folder))
    assert "before RL" in output and "time by part" in output
    return folder


def test_everything_that_the_report_draws_and_tells_is_written_by_a_run(unbroken):
    (cold_start,) = unbroken.parent.glob("cold-start-*")
    runs = dict(zip(("rl", "sft"), report.load_runs([unbroken, cold_start]), strict=True))
    missing = [panel.title for panel in report.PANELS if report.draw_panel(panel, [runs[panel.kind]]) is None]
    assert missing == []
    run = runs["rl"]
    for key in ("accuracy", "accuracy_stderr", "greedy_accuracy"):
        assert len(run.series("eval", key, run.curve_split)[0]) == 3, key
    assert report.end_counts(run)["rows"] and report.trajectory_views([run])
    assert not [row for row in report.summary_rows(run.summary) if "-" in row]
    parts = {name for name, *_ in report.time_rows(run.summary)}
    assert {"cold start", "compile", "rollout", "update", "evaluation"} <= parts
    assert run.summary["tokens_per_s"].keys() == {"rollout", "update"}


def test_a_killed_run_resumes_to_the_same_numbers(start, unbroken):
    folder = unbroken.with_name("killed")
    process = start(folder)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        if any(line["kind"] == "rl" and line["step"] >= 5 for line in lines):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it could be killed: {output}"
    assert "cold start: reusing" in output, "a cold start is made once for a config"
    assert not (folder / "summary.json").exists()

    assert f"resuming {folder} from step 4 of 6" in finish(start(folder))
    assert comparable(folder) == comparable(unbroken)
    steps = [line["step"] for line in comparable(folder) if line["kind"] == "rl"]
    assert steps == [1, 2, 3, 4, 5, 6]
    learned = [line["step"] for line in comparable(folder) if line["kind"] == "rl" and line.get("grad_norm", 0) > 0]
    assert max(learned) > 4, "the resumed part must have learned something"
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, unbroken)]
    assert summaries[0]["after"] == summaries[1]["after"] | {"perf/eval_s": summaries[0]["after"]["perf/eval_s"]}
