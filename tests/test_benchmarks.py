"""The benchmarks of the miniature run and print numbers; what the numbers are is not a test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "words"),
    [("decode", ["slots=8", "length=16", "repeats=1"]), ("update", ["trajectories=8", "repeats=1"])],
)
def test_a_benchmark_prints_its_rates_as_json(name, words):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, BENCHMARKS / f"{name}.py", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["benchmark"] == name
    assert numbers["tokens_per_s"] > 0 and numbers["tokens_per_cpu_s"] > 0
