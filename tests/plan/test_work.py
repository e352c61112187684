"""Operations by formula are those that are published for the model, and times follow from the chip."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from retool_jax.mesh import AXES
from retool_jax.plan.compiler import Compiled
from retool_jax.plan.functions import Function
from retool_jax.plan.hlo import Cost
from retool_jax.plan.search import candidates, memory_of
from retool_jax.plan.work import BACKWARD, KERNEL, forward_flops, matrix_weights, times_of, work_of
from retool_jax.run.load import load
from retool_jax.slices import CHIPS, named

QWEN = load(["config=sft_qwen2.5_32b"]).model


def function(kind: str, rows: int, length: int, shape: tuple[int, int, int] = (1, 8, 1)) -> Function:
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), AXES)
    return Function(kind, kind, lambda: None, {}, QWEN, mesh, rows, length, (1,))


def test_the_operations_of_a_token_are_the_published_ones():
    assert matrix_weights(QWEN) == pytest.approx(31.98e9, rel=1e-3)
    # 6 x 31.98e9 + 6 L H hd S of causal attention
    assert 3 * forward_flops(QWEN, 1, 16384 / 2) == pytest.approx(1.919e11 + 1.966e6 * 16384, rel=1e-3)


def test_an_update_computes_layers_again_and_attention_in_two_kernels():
    work = work_of(function("update", 8, 16384), 0.0)
    assert work.model_flops / 8 == pytest.approx(3.67e15, rel=0.01)
    assert work.flops / work.model_flops == pytest.approx(4 / 3, rel=0.01)
    assert work.attention_flops / 8 == pytest.approx(9.7e14, rel=0.01)
    shorter = work_of(function("update", 8, 16384), 0.0, 4096)
    assert shorter.model_flops < work.model_flops and shorter.flops == work.flops
    kept = work_of(replace(function("update", 8, 16384), model=replace(QWEN, remat="dots")), 0.0)
    assert kept.attention_flops / work.attention_flops == pytest.approx((1 + BACKWARD) / (2 + BACKWARD))
    assert kept.flops / kept.model_flops == pytest.approx(1, rel=0.03)  # the head's logits alone, once more
    assert work_of(replace(function("update", 8, 16384), model=replace(QWEN, remat="offload")), 0.0) == work


def test_a_decoded_token_reads_weights_and_what_rows_hold():
    """The table of a v5p with 8 chips, 32 rows and 16,384 tokens: 8.00 and 17.18 GB, 9.1 ms."""
    work = work_of(function("decode", 32, 1, (1, 1, 8)), 16384.0)
    assert work.bytes == pytest.approx(8.00e9 + 17.18e9, rel=0.01)
    compiled = Compiled(0.0, 0.0, 0.0, 0.0, Cost(), Cost(1.75e9 * 4e-3, {"all-reduce": 540e6}), 0.0)
    times = times_of(function("decode", 32, 1, (1, 1, 8)), work, compiled, CHIPS["v5p"])
    assert times.roofline == pytest.approx(9.1e-3, rel=0.01)
    assert times.estimate == pytest.approx(4e-3 + 17.18e9 / 2765e9 + 1e-3, rel=0.01)
    assert times_of(function("decode", 32, 1), work, compiled, CHIPS["cpu"]) == (None, None)


def test_an_estimate_adds_up_what_a_roofline_takes_the_longest_of():
    one = function("update", 8, 16384)
    work = work_of(one, 0.0)
    compiled = Compiled(0.0, 0.0, 0.0, 0.0, Cost(9e9), Cost(1.75e9 * 11, {"all-gather": 54e9}), 0.0)
    times = times_of(one, work, compiled, CHIPS["v5p"])
    assert times.roofline == pytest.approx(work.flops / 8 / 459e12)
    assert times.estimate == pytest.approx(11 + 0.1 + 9.7e14 / (KERNEL * 459e12), rel=1e-3)
    assert times_of(one, work, None, CHIPS["h100"]).estimate is None


def test_the_search_knows_what_cannot_fit_and_prefers_what_computes_nothing_again():
    small, large = (candidates(QWEN, named(name), 16384) for name in ("v5p-16", "v5p-1024"))
    assert small and {one.tp for one in small} <= {1, 2, 4, 8} and all(one.remat == "full" for one in small)
    assert len(large) > len(small)
    assert [one.seconds for one in large] == sorted(one.seconds for one in large)
    assert not candidates(QWEN, named("v6e-4"), 16384)
    by = {(one.tp, one.rows, one.remat): one for one in large}
    for one in large:
        again = by.get((one.tp, one.rows, "full"))
        assert again is None or one.seconds <= again.seconds
    # Beside an engine there is room for less, and never for what is faster but does not fit.
    alone, beside = (candidates(QWEN, named("v5p-64"), 18432, held) for held in (0.0, 46.45e9))
    assert set(beside) < set(alone) and beside[0] != alone[0]
    assert all(one.memory + 46.45e9 < named("v5p-64").chip.memory for one in beside)
    # What waits in the host's memory is for where nothing else fits.
    assert {one.remat for one in candidates(QWEN, named("v6e-32"), 32768)} == {"offload"}


@pytest.mark.parametrize(
    ("devices", "tp", "tokens", "remat", "measured"),
    [
        (64, 1, 16384, "full", 6.16e9 + 20.60e9),
        (64, 1, 16384, "offload", 6.16e9 + 10.18e9),
        (32, 1, 18432, "full", 12.30e9 + 26.27e9),
        (8, 1, 16384, "full", 49.22e9 + 42.14e9),
        (64, 2, 16384, "full", 6.17e9 + 18.20e9),
    ],
)
def test_the_formula_of_memory_agrees_with_the_compiler(devices, tp, tokens, remat, measured):
    """What libtpu 0.0.42 allocates for the policy's update, a row for each chip of v5p or for two of v6e."""
    assert memory_of(QWEN, devices, tp, tokens, remat) == pytest.approx(measured, rel=0.15)
