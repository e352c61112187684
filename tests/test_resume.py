"""Contract 9: kill -9 in the middle of RL, the same command again, and the numbers are those of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool_jax.metrics import read_metrics

# Long enough a cold start that some samples of a group are right and some wrong; small enough for a test.
WORDS = [
    "config=grpo",
    "sft.steps=400",
    "sft.optimizer.decay_steps=380",
    "rl.steps=6",
    "rl.prompts_per_step=8",
    "rl.group_size=4",
    "engine.slots=20",
    "evaluation.every=3",
    "evaluation.problems=24",
    "evaluation.final_split=dev",
    "checkpoint.every=2",
]


def start(folder: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "retool_jax.train", *WORDS, f"run={folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def comparable(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    output = finish(start(folder))
    assert "before RL" in output and "time by part" in output
    return folder


def test_a_killed_run_resumes_to_the_same_numbers(unbroken):
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
    assert any(line.get("grad_norm", 0) > 0 for line in comparable(folder)), "the run must have learned something"
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, unbroken)]
    assert summaries[0]["after"] == summaries[1]["after"] | {"perf/eval_s": summaries[0]["after"]["perf/eval_s"]}
