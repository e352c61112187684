"""The benchmarks of the miniature run and print numbers; the tests do not check the numbers."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.sandbox import SandboxConfig
from retool_jax.sandbox.launch.launchers import LAUNCHERS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


TINY = {"layers": 1, "width": 64, "ffn": 64, "heads": 4, "kv_heads": 2, "vocab": 128}
TINY |= {"rows": 2, "context": 24, "new": 8, "repeats": 1}
# Benchmarks that compute with jax, run in one process, which imports it once.
WORDS = {
    "decode": ["slots=8", "length=16", "repeats=1"],
    "update": ["trajectories=8", "repeats=1"],
    "engine_turns": ["scale=0.005", "repeats=1", "layers=1"],
    "gpu": ["part=decode_xla", json.dumps(TINY)],
}
ONE_AFTER_ANOTHER = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
for name, words in json.loads(sys.argv[2]).items():
    sys.argv = [name, *words]
    runpy.run_path(f"{sys.path[0]}/{name}.py", run_name="__main__")
    print("ended")
"""


@pytest.fixture(scope="module")
def computed(one_device) -> dict[str, dict]:
    """The numbers that each of these benchmarks prints, as JSON only, by its name."""
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, BENCHMARKS, json.dumps(WORDS)]
    done = subprocess.run(command, env=one_device, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + done.stdout
    *printed, rest = done.stdout.split("ended\n")
    found = dict(zip(WORDS, map(json.loads, printed), strict=True))
    assert rest == "" and [numbers["benchmark"] for numbers in found.values()] == list(WORDS)
    return found


@pytest.mark.parametrize("name", ["decode", "update"])
def test_a_benchmark_prints_its_rates_as_json(computed, name):
    assert computed[name]["tokens_per_s"] > 0 and computed[name]["tokens_per_cpu_s"] > 0


def test_the_parts_for_a_gpu_run_elsewhere_too(computed):
    assert computed["gpu"]["part"] == "decode_xla" and computed["gpu"]["tokens_per_s"] > 0


def test_the_engine_is_measured_against_its_own_ideal(computed):
    numbers = computed["engine_turns"]
    assert (numbers["live_cache"]["tokens_live"], numbers["live_cache"]["tokens_anew"]) == (17, 248)
    assert numbers["fork"]["ratio"] > 0 and numbers["fused"]["ratio"] > 0
    assert [line["tool_s"] for line in numbers["tools"]] == [0.0, 0.0005, 0.005, 0.025]


def test_an_unknown_or_malformed_option_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    arguments = importlib.import_module("arguments")
    defaults = {"slots": 2, "scale": 1.0, "folder": ""}
    assert arguments.parse(["slots=3", "folder=a=b"], defaults) == {"slots": 3, "scale": 1.0, "folder": "a=b"}
    assert arguments.parse_known(["seed=1", "scale=2"], defaults) == (defaults | {"scale": 2.0}, ["seed=1"])
    for word, message in (
        ("slot=3", "cannot read 'slot=3'; the options are slots=..., scale=..., folder=..."),
        ("--help", "cannot read '--help'; the options are"),
        ("slots", "'slots' has no int value; write it as slots=2"),
        ("slots=many", "'slots=many' has no int value"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            arguments.parse([word], defaults)


@pytest.fixture
def run_benchmark(one_device):
    """Run a benchmark with these arguments; return the numbers that it prints."""

    def run(name: str, *words: str) -> dict:
        command = [sys.executable, BENCHMARKS / f"{name}.py", *words]
        done = subprocess.run(command, env=one_device, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr + done.stdout
        numbers = json.loads(done.stdout)
        assert numbers["benchmark"] == name
        return numbers

    return run


@pytest.fixture(params=["gvisor", "bubblewrap", "process"])
def backend(request: pytest.FixtureRequest) -> str:
    """A sandbox back-end; the test is skipped if it cannot work here."""
    if why := LAUNCHERS[request.param].missing(SandboxConfig()):
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.mark.parametrize(
    ("backend", "through"), [("gvisor", "http"), ("bubblewrap", "pool"), ("process", "http")], indirect=["backend"]
)
def test_the_sandbox_is_measured(run_benchmark, backend, through):
    if through == "http":
        pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'retool_jax[sandbox]'")
    # Enough calls that the kernel's CPU clock, which counts in steps of 10 ms, cannot show zero.
    words = [
        f"backends={backend}",
        f"calls={4 if backend == 'gvisor' else 24}",
        "clients=2",
        "slots=1",
        "restarts=1",
        f"direct={int(through == 'pool')}",
    ]
    numbers = run_benchmark("sandbox", *words)
    assert numbers["through"] == through
    for name in ("print", "numpy", "sympy"):
        row = numbers["backends"][backend][name]
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["cpu_ms"] > 0 and row["calls_per_s"] > 0
    replacement = numbers["backends"][backend]["replacement"]
    assert 0 < replacement["ready_s"] < replacement["warm_s"]


def test_nothing_goes_wrong_in_a_short_soak(run_benchmark, backend):
    # With this seed, 40 calls include every kind of program, and three workers are killed.
    numbers = run_benchmark("sandbox_soak", f"backend={backend}", "calls=40", "kill=0.05", "seed=4032")
    assert numbers["held"] and (numbers["wrong"], numbers["processes_left"]) == (0, 0)
    assert numbers["returned"] == sum(numbers["statuses"].values()) == 40
    assert numbers["kills"] == 3 and len(numbers["service"]) == 12
    assert {"success", "user_error", "timeout", "oom", "output_limit"} <= numbers["statuses"].keys()
