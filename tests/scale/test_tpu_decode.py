"""The decode step of Qwen2.5-32B, compiled by the TPU compiler for real slices: what it holds, copies and costs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_decode.py"

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler is absent: pip install libtpu (it needs no TPU)", allow_module_level=True)


@pytest.fixture
def compiled(fully_compiled):
    """Numbers of one shape: in a process of its own, because the compiler's settings are read once."""

    def run(*words: str) -> dict:
        done = subprocess.run(
            [sys.executable, SCRIPT, *words], env=fully_compiled, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    ("words", "cache_gb", "limit_gb", "limit_ms"),
    [
        (("topology=v6e:2x4", "slots=64", "max_length=8192"), 17.18, 32.0, None),
        # One of the eight engines of a v5p 4x4x4, side by side for a batch of 256: they share nothing.
        (("topology=v5p:2x2x2", "slots=32", "max_length=16384"), 17.18, 95.7, 9.0),
    ],
)
def test_the_decode_step_copies_no_cache_and_leaves_its_time_to_reading(compiled, words, cache_gb, limit_gb, limit_ms):
    numbers = compiled(*words)
    print(numbers)
    assert numbers["chips"] == 8
    assert numbers["cache_gb"] == pytest.approx(cache_gb, rel=0.01)
    assert numbers["temporaries_gb"] < 0.5
    assert numbers["aliased_gb"] >= numbers["cache_gb"]  # the pool that comes out is the pool that went in
    assert numbers["arguments_gb"] + numbers["temporaries_gb"] < 0.9 * limit_gb
    assert 1.0 < numbers["estimated_ms"] <= (limit_ms or 15.0)  # v6e's cycle model is not held to a figure
