"""Attention in blocks equals the plain form, forward and backward, for any length, without an array of T x T."""

import math
import re
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.attention import attend, packed_attention, packed_mask

# Segments of a row, each with the number of the prefix that it goes on from. The longest is within a block, over
# several, all of the row.
APART = ([(5, 0), (20, 0), (1, 0), (30, 0)], [(130, 0), (3, 0)], [(200, 0)])
# Groups within a block; a prefix over blocks, with a segment far from it; one in a block, with segments over several.
SHARED = (
    [(5, 0), (9, 1), (3, 1), (20, 0), (4, 0), (7, 5), (6, 5)],
    [(70, 0), (30, 1), (65, 1), (4, 1), (6, 0), (5, 5)],
    [(3, 0), (100, 1), (80, 1)],
)


def case(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str = "float32",
    rows: int = 6,
    layouts: Sequence[list[tuple[int, int]]] = APART,
) -> tuple:
    """q, k, v, a gradient of the output, segments, positions, and which keys are seen; the rest of a row is padding."""
    rng = np.random.default_rng(length + heads)
    arrays = [
        jnp.asarray(rng.normal(size=(rows, length, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads, heads)
    ]
    segments, positions = np.zeros((2, rows, length), np.int32)
    seen = np.zeros((rows, length, length), bool)
    for row in range(rows):
        start = 0
        for number, (count, prefix) in enumerate(layouts[row % len(layouts)], start=1):
            there = segments[row] == prefix if prefix else np.zeros(length, bool)
            stop = min(start + count, length)
            segments[row, start:stop], positions[row, start:stop] = number, there.sum() + np.arange(stop - start)
            seen[row, start:stop] = there
            start = stop
    return *arrays, jnp.asarray(segments), jnp.asarray(positions), jnp.asarray(seen)


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def outputs_and_gradients(blocks: bool, q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, *rows):
    """Attention and the gradients of its inputs, in blocks or by the plain form."""
    segments, positions, prefixes = rows
    plain = partial(attend, mask_BTS=packed_mask(segments) | prefixes)
    output, back = jax.vjp(packed_attention("xla", segments, positions) if blocks else plain, q, k, v)
    return output, *back(cotangent)


@pytest.mark.parametrize("layouts", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim"),
    [(1, 2, 1, 8), (37, 4, 2, 8), (64, 2, 2, 16), (130, 5, 1, 16), (192, 9, 3, 8)],
)
def test_blocks_equal_the_plain_form(length, heads, kv_heads, head_dim, layouts):
    """Lengths below a block, of whole blocks, and between; with 9 heads, rows are processed in three groups."""
    arrays = case(length, heads, kv_heads, head_dim, layouts=layouts)
    for ours, plain in zip(outputs_and_gradients(True, *arrays), outputs_and_gradients(False, *arrays), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def test_scores_of_any_size_are_finite_and_exact():
    """A softmax over blocks updates its largest score: here it grows, shrinks and is far outside the range of exp."""
    q, *others = case(192, 2, 2, 16)
    arrays = q * jnp.linspace(0, 100, 192)[:, None, None], *others
    for ours, plain in zip(outputs_and_gradients(True, *arrays), outputs_and_gradients(False, *arrays), strict=True):
        assert np.abs(ours - plain).max() <= 1e-4 * np.abs(plain).max()


def test_half_precision_is_as_near_to_fp32_as_the_plain_form():
    half = case(130, 4, 2, 32, "bfloat16")
    exact = outputs_and_gradients(False, *(x.astype(jnp.float32) for x in half[:4]), *half[4:])
    pair = (outputs_and_gradients(blocks, *half) for blocks in (True, False))
    for ours, plain, reference in zip(*pair, exact, strict=True):
        assert ours.dtype == plain.dtype
        error, usual = (np.linalg.norm(np.float32(x) - reference) for x in (ours, plain))
        assert error < 1.5 * usual + 1e-3 * np.linalg.norm(reference)


def test_on_a_mesh_rows_and_heads_are_split_and_nothing_changes():
    arrays = case(130, 4, 2, 8, rows=4)
    plain = outputs_and_gradients(False, *arrays)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        compiled = outputs_and_gradients.lower(True, *arrays).compile()
        ours = compiled(*arrays)
    for x, y in zip(ours, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_nothing_is_as_large_as_the_square_of_a_row():
    """16 rows of 4096 tokens; the program with its gradient is compiled and not run."""
    rows, length, heads, head_dim = 16, 4096, 2, 16
    array = jax.ShapeDtypeStruct((rows, length, heads, head_dim), jnp.float32)
    numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    seen = jax.ShapeDtypeStruct((rows, length, length), jnp.bool_)  # only in the plain form

    def compiled(blocks: bool) -> jax.stages.Compiled:
        return outputs_and_gradients.lower(blocks, *[array] * 4, numbers, numbers, seen).compile()

    square = length * length
    largest = {}
    for blocks in (True, False):
        shapes = re.findall(r"\w+\[([\d,]+)\]", compiled(blocks).as_text())
        largest[blocks] = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest[False] >= rows * heads * square  # so the check would find such an array
    assert largest[True] < square / 4
    assert compiled(True).memory_analysis().temp_size_in_bytes < 4 * 2 * square
