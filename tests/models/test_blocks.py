"""Attention in blocks equals the plain form forwards and backwards, for any length, and keeps no square of it."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.attention import attend, packed_attention, packed_mask

# Longest runs of one segment by row: within a block, over several, all of the row.
LENGTHS = ([5, 20, 1, 30], [130, 3], [200])


def case(length: int, heads: int, kv_heads: int, head_dim: int, dtype: str = "float32", rows: int = 6) -> tuple:
    """q, k, v, a gradient of the output, and segments; what is left of a row is padding."""
    rng = np.random.default_rng(length + heads)
    arrays = [
        jnp.asarray(rng.normal(size=(rows, length, n, head_dim)), dtype) for n in (heads, kv_heads, kv_heads, heads)
    ]
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        lengths = LENGTHS[row % len(LENGTHS)]
        numbers = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
        segments[row, : len(numbers)] = numbers
    return *arrays, jnp.asarray(segments)


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def outputs_and_gradients(blocks: bool, q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, segments):
    """Attention and the gradients of its inputs, in blocks or by the plain form."""
    plain = partial(attend, mask_BTS=packed_mask(segments))
    output, back = jax.vjp(packed_attention("xla", segments) if blocks else plain, q, k, v)
    return output, *back(cotangent)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim"),
    [(1, 2, 1, 8), (37, 4, 2, 8), (64, 2, 2, 16), (130, 5, 1, 16), (192, 9, 3, 8)],
)
def test_blocks_equal_the_plain_form(length, heads, kv_heads, head_dim):
    """Lengths within a block, of whole blocks and of no multiple of them; 9 heads take rows in three groups."""
    arrays = case(length, heads, kv_heads, head_dim)
    for ours, plain in zip(outputs_and_gradients(True, *arrays), outputs_and_gradients(False, *arrays), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


def test_scores_of_any_size_are_finite_and_exact():
    """A softmax over blocks moves its largest score along: here it grows, shrinks and is far beyond exp's range."""
    q, k, v, cotangent, segments = case(192, 2, 2, 16)
    q = q * jnp.linspace(0, 100, 192)[:, None, None]
    arrays = q, k, v, cotangent, segments
    for ours, plain in zip(outputs_and_gradients(True, *arrays), outputs_and_gradients(False, *arrays), strict=True):
        assert np.abs(ours - plain).max() <= 1e-4 * np.abs(plain).max()


def test_half_precision_is_as_near_to_fp32_as_the_plain_form():
    half = case(130, 4, 2, 32, "bfloat16")
    exact = outputs_and_gradients(False, *(x.astype(jnp.float32) for x in half[:-1]), half[-1])
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
    """16 rows of 4096 tokens, compiled with their gradient and not run."""
    rows, length, heads, head_dim = 16, 4096, 2, 16
    array = jax.ShapeDtypeStruct((rows, length, heads, head_dim), jnp.float32)
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def compiled(blocks: bool) -> jax.stages.Compiled:
        return outputs_and_gradients.lower(blocks, *[array] * 4, segments).compile()

    square = length * length
    largest = {}
    for blocks in (True, False):
        shapes = re.findall(r"\w+\[([\d,]+)\]", compiled(blocks).as_text())
        largest[blocks] = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest[False] >= rows * heads * square  # so such an array would be seen
    assert largest[True] < square / 4
    assert compiled(True).memory_analysis().temp_size_in_bytes < 4 * 2 * square
