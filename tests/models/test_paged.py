"""The GPU's kernel for one token a row: interpreted it equals the plain form, and it lowers for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from retool_jax.models.attention import attend
from retool_jax.models.cache import read_pages
from retool_jax.models.paged import paged_decode

PAGES, PAGE, TABLE = 11, 16, np.random.default_rng(1).permutation(11)[:10].reshape(2, 5)


def cached(heads: int, kv_heads: int, head_dim: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (2, heads, head_dim), (PAGES, PAGE, 2 * kv_heads, head_dim)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


decode = jax.jit(partial(paged_decode, interpret=True))


def plain(q: jax.Array, pool: jax.Array, table: np.ndarray, lengths: np.ndarray) -> jax.Array:
    seen = np.arange(table.shape[1] * PAGE) < lengths[:, None]
    return attend(q[:, None], *read_pages(pool, 0, table), seen[:, None])[:, 0]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "lengths"),
    [(10, 2, "float32", (80, 1)), (10, 2, "float32", (65, 64)), (4, 4, "bfloat16", (79, 17))],
)
def test_it_is_attention_over_the_pages_of_a_row(heads, kv_heads, dtype, lengths):
    """Rows of one token, of whole blocks, of one token more; too few heads for a full product; an odd table length."""
    q, pool = cached(heads, kv_heads, 16, dtype)
    ours = decode(q, pool, TABLE, jnp.array(lengths))
    off = np.abs(np.float32(ours) - np.float32(plain(q, pool, TABLE, np.array(lengths))))
    assert off.max() < (1e-5 if dtype == "float32" else 0.02)


def test_stale_entries_after_a_row_have_no_effect_and_an_empty_row_is_finite():
    q, pool = cached(10, 2, 16, "float32")
    dirty = pool.at[TABLE[0, 1:]].set(np.nan).at[TABLE[0, 0], 9:].set(np.inf)
    lengths = jnp.array([9, 0])
    ours = decode(q, dirty, TABLE, lengths)
    np.testing.assert_array_equal(ours[0], decode(q, pool, TABLE, lengths)[0])
    assert np.isfinite(ours[1]).all()


def test_it_lowers_to_triton_for_cuda():
    """Only the lowering: the GPU's own compiler does not run."""
    shapes = (64, 12, 128), (4096, 64, 4, 128)
    q, pool = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((64, 33), (64,)))
    card = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
    with jax.sharding.use_abstract_mesh(card):
        lowered = jax.jit(paged_decode).trace(q, pool, table, lengths).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("gpu$xla.gpu.triton") == 1 and "tensor<64x33x64x4x128" not in text  # no copy of the pages
