"""What the TPU's compiler says of a run's functions, for slices of every generation, and of the decode step of
Qwen2.5-32B, what it holds, copies and costs: nobody needs a TPU for that."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from retool_jax.slices import named

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("the TPU compiler is absent: pip install libtpu (it needs no TPU)", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_decode.py"
TINY = (
    *("config=grpo", "rl.old_logprobs=trainer", "model.vocab_size=512", "model.hidden_size=512", "model.head_dim=128"),
    *("model.num_heads=8", "model.num_kv_heads=8", "model.compute_dtype=bfloat16", "model.cache_dtype=bfloat16"),
    *("rl.rows_per_micro=8", "sft.rows_per_micro=8", "rl.row_length=256", "engine.slots=8", "model.remat=full"),
)
DECODE = """
import json, sys
from retool_jax import slices
from retool_jax.plan import devices
place = slices.named(sys.argv[1])
devices.prepare(place)
from retool_jax.plan.compiler import compile_function
from retool_jax.plan.whole import functions_of
from retool_jax.run.load import load
run = load(["config=grpo_qwen2.5_32b", f"mesh={place.name}", "rl.rows_per_micro=8", *sys.argv[2:]])
decode = next(one for one in functions_of(run, place, run.model) if one.name == "decode")
compiled = compile_function(decode)
print(json.dumps([compiled.arguments, compiled.temporaries, compiled.made, compiled.each.cycles, compiled.each.wire]))
"""


@pytest.fixture
def in_process(fully_compiled):
    """A command in a process of its own, because the compiler's settings are read once; what it printed."""

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], env=fully_compiled, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.parametrize("name", ["v5e-8", "v6e-8", "v5p-16", "tpu7x-8"])
def test_a_run_is_planned_for_every_generation(in_process, name, tmp_path):
    printed = in_process("-m", "retool_jax.plan", *TINY, f"mesh={name}", f"json={tmp_path / 'plan.json'}")
    print(printed)
    said, place = json.loads((tmp_path / "plan.json").read_text()), named(name)
    assert (said["compiled"], said["fits"]) == (True, True) and "it fits" in printed
    assert said["memory"]["limit"] == place.chip.memory / place.chip.devices
    update, decode = said["functions"]["policy update"], said["functions"]["decode"]
    assert update["wire"] > 3 * update["arguments"]["parameters"]
    assert update["arguments_total"] >= sum(update["arguments"].values()) * 0.99
    for one in said["functions"].values():
        assert one["estimate_s"] > 0 and one["roofline_s"] > 0 and one["cycles"] > 0
        assert one["temporaries"] >= 0
    # The sum of a weight's gradients leaves each device its part; only what all have as a whole is summed as a whole.
    assert update["sent"]["reduce-scatter"] > 0.2 * update["wire"] > 4 * update["sent"].get("all-reduce", 0.0)
    assert "collective-permute" not in update["sent"] or update["sent"]["collective-permute"] < 0.1 * update["wire"]
    assert decode["made"] < 0.1 * decode["arguments"]["cache"], "the pool that comes out is the pool that went in"
    assert 0 < said["step"]["update_mfu"] < 1 and said["step"]["chip_hours"] > 0


@pytest.mark.parametrize(
    ("name", "slots"),
    [("v5e-8", 8), ("v6e-8", 32), ("v5p-8", 32), ("tpu7x-8", 32)],
)
def test_decoding_a_32b_holds_no_second_copy_of_its_weights(in_process, name, slots):
    """Above all on Ironwood, whose compiler would lay them out anew at every call."""
    words = f"engine.slots={slots}", f"engine.pages={slots * 144}", f"mesh.fsdp={4 if name == 'v5p-8' else 8}"
    arguments, temporaries, made, cycles, wire = json.loads(in_process("-c", DECODE, name, *words).splitlines()[-1])
    print(name, arguments, temporaries, made, cycles, wire)
    place = named(name)
    assert temporaries + made < 0.5e9
    assert 8e9 < arguments < 0.95 * place.chip.memory / place.chip.devices
    assert cycles / place.chip.clock_hz < 0.04 and wire < 1e9


@pytest.mark.parametrize(
    ("words", "cache_gb", "limit_gb", "limit_ms"),
    [
        (("topology=v6e:2x4", "slots=64", "max_length=8192"), 17.18, 32.0, None),
        # One of the eight engines of a v5p 4x4x4, side by side for a batch of 256: they share nothing.
        (("topology=v5p:2x2x2", "slots=32", "max_length=16384"), 17.18, 95.7, 9.0),
    ],
)
def test_the_decode_step_copies_no_cache_and_leaves_its_time_to_reading(
    in_process, words, cache_gb, limit_gb, limit_ms
):
    numbers = json.loads(in_process(str(SCRIPT), *words).splitlines()[-1])
    print(numbers)
    assert numbers["chips"] == 8
    assert numbers["cache_gb"] == pytest.approx(cache_gb, rel=0.01)
    assert numbers["temporaries_gb"] < 0.5
    assert numbers["aliased_gb"] >= numbers["cache_gb"]  # the pool that comes out is the pool that went in
    assert numbers["arguments_gb"] + numbers["temporaries_gb"] < 0.9 * limit_gb
    assert 1.0 < numbers["estimated_ms"] <= (limit_ms or 15.0)  # v6e's cycle model is not held to a figure
