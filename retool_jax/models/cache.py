"""The KV cache: one pool of pages over all layers, passed through the model as data.

A page holds `page` consecutive tokens of one layer, keys and values of a head side by side: [page, 2K, H] with the key
of head k at 2k and its value at 2k + 1, which is what the TPU's ragged paged attention reads in place. The pool is
[L*P, page, 2K, H]; page p of layer l is at l*P + p, so one table of page numbers per row serves all layers and nothing
is sliced or copied inside the scan over layers. The TPU compiler copies a layer's whole part of a pool that is sliced.

Nothing here records how much of a page is valid: a query at position p sees entries 0..p, and every entry up to p has
been written by then. So giving tokens back is only an integer, and stale entries are never seen. They are read, though,
and a weight of 0 times a NaN that an earlier owner left is NaN: so values behind what a row holds are read as 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retool_jax.models.config import ModelConfig


class Rows(NamedTuple):
    """A dense working copy of all rows, for single-token steps without a paged kernel.

    One array per layer, laid out for the two products of attention: keys [B,K,H,S] and values [B,K,S,H]. XLA's CPU
    backend would transpose any other layout at every step, and copy each layer out of a stacked array.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    def only(self, layer: int) -> "Rows":
        """Those of one layer."""
        return Rows((self.k[layer],), (self.v[layer],))

    def replaced(self, layer: int, own: "Rows") -> "Rows":
        """With those of one layer in the place of what was there."""
        return Rows(*((*old[:layer], *new, *old[layer + 1 :]) for old, new in zip(self, own, strict=True)))


def init_cache(config: ModelConfig, pages: int, page_size: int) -> jax.Array:
    """An empty pool with `pages` pages of `page_size` tokens in each layer."""
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
    """Scatter one layer's new entries in place; `first_page` is the layer's l*P, and what is not valid is dropped."""
    page_size = pages.shape[1]
    own_BT = jnp.take_along_axis(table_BP, positions_BT // page_size, axis=1, mode="clip") + first_page
    own_BT = jnp.where(valid_BT, own_BT, pages.shape[0])
    B, T, K, H = k_BTKH.shape
    entries = jnp.stack([k_BTKH, v_BTKH], axis=3).reshape(B, T, 2 * K, H).astype(pages.dtype)
    return pages.at[own_BT, positions_BT % page_size].set(entries, mode="drop")


def read_pages(pages: jax.Array, first_page: jax.Array | int, table_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values [B,S,K,H] of the pages in a table, S = pages of a row x page size."""
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


def init_rows(config: ModelConfig, rows: int, length: int) -> Rows:
    """Dense rows without content, for at most `length` tokens each."""
    B, L, K, H = rows, config.num_layers, config.num_kv_heads, config.head_dim
    keys, values = (
        [jnp.zeros(shape, config.cache_dtype) for _ in range(L)] for shape in ((B, K, H, length), (B, K, length, H))
    )
    return Rows(tuple(keys), tuple(values))


def refresh_rows(
    pages: jax.Array, rows: Rows, table_BP: jax.Array, length_B: jax.Array, stale_M: jax.Array, count: jax.Array
) -> Rows:
    """Copy the pages of the first `count` rows named in `stale` over their dense form; values behind `length` are 0."""
    layers = len(rows.k)
    written_BS = jnp.arange(rows.v[0].shape[2]) < length_B[:, None]

    def refresh(m: jax.Array, rows: Rows) -> Rows:
        row = stale_M[m]
        table_1P = jax.lax.dynamic_slice_in_dim(table_BP, row, 1)
        pairs = [read_pages(pages, layer * (pages.shape[0] // layers), table_1P) for layer in range(layers)]
        written_S1 = written_BS[row][:, None]
        keys = [k.transpose(0, 2, 3, 1) for k, _ in pairs]
        values = [jnp.where(written_S1, v.transpose(0, 2, 1, 3), 0) for _, v in pairs]
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)  # noqa: E731
        return Rows(tuple(map(put, rows.k, keys)), tuple(map(put, rows.v, values)))

    return jax.lax.fori_loop(0, count, refresh, rows)


def scatter_rows(
    pages: jax.Array, rows: Rows, table_BP: jax.Array, start_B: jax.Array, count_B: jax.Array, most: int
) -> jax.Array:
    """Write the entries start .. start + count of each dense row back to its pages; count is at most `most`."""
    layers = len(rows.k)
    offsets = jnp.arange(most)
    positions_BT = start_B[:, None] + offsets
    valid_BT = offsets < count_B[:, None]
    at = jnp.minimum(positions_BT, rows.k[0].shape[-1] - 1)[:, None, :, None]
    for layer, (k_BKHS, v_BKSH) in enumerate(zip(*rows, strict=True)):
        k_BKTH = jnp.take_along_axis(k_BKHS, at.swapaxes(2, 3), axis=3).swapaxes(2, 3)
        v_BKTH = jnp.take_along_axis(v_BKSH, at, axis=2)
        first_page = layer * (pages.shape[0] // layers)
        new = k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2)
        pages = write_pages(pages, first_page, table_BP, positions_BT, valid_BT, *new)
    return pages


def write_row(rows: Rows, layer: int, positions_B: jax.Array, valid_B: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array):
    """Put one token per row into one layer of the dense copy."""
    k, v = list(rows.k), list(rows.v)
    at_B = jnp.where(valid_B, positions_B, v[layer].shape[2])
    each_B = jnp.arange(at_B.shape[0])
    k[layer] = k[layer].at[each_B, :, :, at_B].set(k_BKH.astype(k[layer].dtype), mode="drop")
    v[layer] = v[layer].at[each_B, :, at_B].set(v_BKH.astype(v[layer].dtype), mode="drop")
    return Rows(tuple(k), tuple(v))
