"""The dense copy of rows compared with its pages."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.models.attention import paged_attention
from retool_jax.models.cache import init_cache
from retool_jax.models.config import ModelConfig
from retool_jax.models.rows import Rows, init_rows, part_lengths, refresh_rows, row_attention, scatter_rows

CACHED = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
TABLE = np.array([[3, 0, 6], [1, 7, 2], [5, 4, 8]])  # of pages with 4 tokens
START = np.array([5, 0, 11])

Result = tuple[jax.Array, jax.Array | Rows]


@jax.jit
def paged(pool: jax.Array, layer: jax.Array, start: jax.Array, count: jax.Array, *qkv: jax.Array) -> Result:
    return paged_attention("xla", 2, TABLE, start, count)(pool, layer, *qkv)


@partial(jax.jit, static_argnums=1)
def dense(rows: Rows, layer: int, start: jax.Array, count: jax.Array, *qkv: jax.Array) -> Result:
    return row_attention(start, count)(rows, layer, *qkv)


refresh = jax.jit(lambda pool, rows, stale, count: refresh_rows(pool, rows, TABLE, START, stale, count))


def full_pool(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.normal(size=init_cache(CACHED, 9, 4).shape), jnp.float32)


def queries(rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(jnp.asarray(rng.normal(size=(3, 1, n, 8)), jnp.float32) for n in (4, 2, 2))


def dense_rows(value: float) -> Rows:
    """Dense rows of two layers, in parts of 4, 6 and 2 tokens."""
    keys, values = (
        tuple(tuple(jnp.full(shape(size), value, jnp.float32) for size in (4, 6, 2)) for _ in range(2))
        for shape in (lambda size: (3, 2, 8, size), lambda size: (3, 2, size, 8))
    )
    return Rows(keys, values)


def test_a_dense_copy_of_rows_is_the_pages_step_by_step():
    """Single tokens in both forms, and the written entries go back to the pages."""
    rng = np.random.default_rng(0)
    first = pool = full_pool(rng)
    rows = refresh(pool, dense_rows(0), jnp.array([2, 0, 1]), 3)
    length = START.copy()
    for go in ([1, 1, 1], [1, 0, 0], [1, 1, 0]):
        q, k, v = queries(rng)
        for layer in (0, 1):
            expected, pool = paged(pool, layer, length, np.array(go), q, k, v)
            ours, rows = dense(rows, layer, length, np.array(go), q, k, v)
            live = np.flatnonzero(go)
            np.testing.assert_allclose(ours[live], expected[live], atol=1e-5)
        length = length + go
    np.testing.assert_array_equal(scatter_rows(first, rows, TABLE, START, length - START, 5), pool)


def test_a_rows_result_does_not_depend_on_the_length_of_other_rows():
    """Bit for bit, although no part beyond the longest row is read."""
    rng = np.random.default_rng(0)
    rows = refresh(full_pool(rng), dense_rows(0), jnp.arange(3), 3)
    arguments = queries(rng)
    together, _ = dense(rows, 1, START, np.ones(3, int), *arguments)
    for row in range(3):
        alone, _ = dense(rows, 1, START, np.arange(3) == row, *arguments)
        np.testing.assert_array_equal(alone[row], together[row])


@pytest.mark.parametrize(
    ("length", "layers", "backend", "parts"),
    [
        (40, 2, "cpu", (40,)),
        (128, 2, "cpu", (64, 64)),
        (256, 8, "cpu", (64, 64, 64, 64)),
        (416, 4, "cpu", (128, 128, 128, 32)),
        (256, 16, "cpu", (128, 128)),
        (256, 30, "cpu", (256,)),
        (256, 80, "cpu", (256,)),
        (256, 4, "gpu", (256,)),
    ],
)
def test_rows_of_a_shallow_model_have_parts_on_a_cpu(length, layers, backend, parts):
    assert part_lengths(length, layers, backend) == parts
    model = replace(CACHED, num_layers=layers)
    shapes = jax.eval_shape(partial(init_rows, model, 3, length, backend))
    assert shapes.length == length and len(shapes.k) == layers
    assert [part.shape for part in shapes.k[-1]] == [(3, 2, 8, size) for size in parts]


@pytest.mark.parametrize("left", [np.nan, np.inf])
def test_stale_entries_after_a_row_have_no_effect(left):
    """In its pages and in the dense copy; a weight of 0 times NaN would be NaN."""
    rng = np.random.default_rng(0)
    pool, arguments = full_pool(rng), queries(rng)
    dirty = np.full(pool.shape, left, np.float32)
    for row in range(3):
        for at in range(START[row]):
            page = TABLE[row, at // 4] + np.array([0, 9])
            dirty[page, at % 4] = np.asarray(pool)[page, at % 4]
    count = np.array([1, 1, 1])
    clean, _ = paged(pool, 1, START, count, *arguments)
    rows = refresh(jnp.asarray(dirty), dense_rows(left), jnp.arange(3), 3)
    np.testing.assert_allclose(dense(rows, 1, START, count, *arguments)[0], clean, atol=1e-5)
