"""The KV cache: one pool of pages over all layers, passed through the model as data.

A page holds `page` consecutive tokens of one layer, [page, 2K, H]: the key of head k is at 2k and its value at 2k + 1,
the layout that the TPU's ragged paged attention reads in place. The pool is [L*P, page, 2K, H]; page p of layer l is at
l*P + p, so one table of page numbers per row serves all layers and nothing is sliced inside the scan over layers. If
the pool were sliced, the TPU compiler would copy a layer's whole part of it.

The pool does not record how much of a page is valid: a query at position p sees entries 0..p, and every entry up to p
has been written by then. So truncating a row only changes an integer, and attention gives stale entries a weight of 0.
But they are read, and 0 times a NaN that an earlier owner left is NaN, so values after the end of a row are read as 0.
"""

import jax
import jax.numpy as jnp

from retool_jax.models.config import ModelConfig


def init_cache(config: ModelConfig, pages: int, page_size: int) -> jax.Array:
    """An empty pool with `pages` pages of `page_size` tokens for each layer."""
    shape = (config.num_layers * pages, page_size, 2 * config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, config.cache_dtype)


def write_pages(
    pages: jax.Array,
    first_page: jax.Array | int,
    table_BP: jax.Array,
    positions_BT: jax.Array,
    valid_BT: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
) -> jax.Array:
    """Scatter one layer's new entries in place; `first_page` is the layer's l*P, and invalid entries are dropped."""
    page_size = pages.shape[1]
    own_BT = jnp.take_along_axis(table_BP, positions_BT // page_size, axis=1, mode="clip") + first_page
    own_BT = jnp.where(valid_BT, own_BT, pages.shape[0])
    B, T, K, H = k_BTKH.shape
    entries = jnp.stack([k_BTKH, v_BTKH], axis=3).reshape(B, T, 2 * K, H).astype(pages.dtype)
    return pages.at[own_BT, positions_BT % page_size].set(entries, mode="drop")


def read_pages(pages: jax.Array, first_page: jax.Array | int, table_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values [B,S,K,H] from the pages in a table; S = pages of a row x page size."""
    entries = pages[table_BP + first_page]
    B, P, page_size, K2, H = entries.shape
    entries = entries.reshape(B, P * page_size, K2 // 2, 2, H)
    return entries[..., 0, :], entries[..., 1, :]


def copy_pages(pages: jax.Array, layers: int, source_M: jax.Array, target_M: jax.Array, count: jax.Array) -> jax.Array:
    """Copy the first `count` pages source[m] to target[m] in every layer, in place."""
    shape = pages.shape
    by_layer = pages.reshape(layers, -1, *shape[1:])

    def copy(m: jax.Array, by_layer: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_slice_in_dim(by_layer, source_M[m], 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(by_layer, page, target_M[m], axis=1)

    return jax.lax.fori_loop(0, count, copy, by_layer).reshape(shape)
