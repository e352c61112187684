"""The dense copy of live rows, for decode steps without a kernel that reads pages in place."""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retool_jax.models.cache import read_pages, write_pages
from retool_jax.models.config import ModelConfig

PART = 64  # the length of a part of a dense row is a multiple of this
PARTS, PARTS_OF_ALL = 4, 32  # the most parts of a layer, and of all layers together


class Rows(NamedTuple):
    """A dense copy of the keys and values of all rows.

    Each layer has one array or, on a CPU, several: parts of `part_lengths` tokens each, so that attention can skip the
    parts beyond the longest row. Their layouts suit attention's two products: keys [B,K,H,S] and values [B,K,S,H].
    XLA's CPU backend would transpose any other layout at every step, and copy each layer out of a stacked array.
    """

    k: tuple[tuple[jax.Array, ...], ...]
    v: tuple[tuple[jax.Array, ...], ...]

    @property
    def length(self) -> int:
        """The number of tokens that each row has room for."""
        return sum(part.shape[2] for part in self.v[0])

    def only(self, layer: int) -> "Rows":
        """The arrays of one layer."""
        return Rows((self.k[layer],), (self.v[layer],))

    def replaced(self, layer: int, own: "Rows") -> "Rows":
        """A copy with the arrays of one layer replaced by `own`."""
        return Rows(*((*old[:layer], *new, *old[layer + 1 :]) for old, new in zip(self, own, strict=True)))


def part_lengths(length: int, layers: int, backend: str) -> tuple[int, ...]:
    """The lengths of the parts into which dense rows of `length` tokens are cut: several on a CPU, one elsewhere.

    On a GPU the host would have to wait for each condition. A deep model has one part too, since the program grows with
    the number of parts: with four, a decode of 30 layers took 21 CPU-seconds to compile instead of 12.
    """
    if backend != "cpu":
        return (length,)
    size = -(-length // (PART * max(min(PARTS, PARTS_OF_ALL // layers), 1))) * PART
    return tuple(min(size, length - first) for first in range(0, length, size))


def init_rows(config: ModelConfig, rows: int, length: int, backend: str) -> Rows:
    """Empty dense rows, for at most `length` tokens each."""
    B, L, K, H = rows, config.num_layers, config.num_kv_heads, config.head_dim
    parts = part_lengths(length, L, backend)
    keys, values = (
        [tuple(jnp.zeros(shape(size), config.cache_dtype) for size in parts) for _ in range(L)]
        for shape in (lambda size: (B, K, H, size), lambda size: (B, K, size, H))
    )
    return Rows(tuple(keys), tuple(values))


def each_part(parts: tuple[jax.Array, ...], axis: int) -> Iterator[tuple[slice, jax.Array]]:
    """The parts of a layer's dense rows, each with the positions that it holds along the token axis `axis`."""
    first = 0
    for part in parts:
        yield slice(first, first + part.shape[axis]), part
        first += part.shape[axis]


def refresh_rows(
    pages: jax.Array, rows: Rows, table_BP: jax.Array, length_B: jax.Array, stale_M: jax.Array, count: jax.Array
) -> Rows:
    """Copy the pages of the first `count` rows in `stale` to their dense copies; values after `length` become 0."""
    layers = len(rows.k)
    written_BS = jnp.arange(rows.length) < length_B[:, None]

    def refresh(m: jax.Array, rows: Rows) -> Rows:
        row = stale_M[m]
        table_1P = jax.lax.dynamic_slice_in_dim(table_BP, row, 1)
        pairs = [read_pages(pages, layer * (pages.shape[0] // layers), table_1P) for layer in range(layers)]
        written_S1 = written_BS[row][:, None]
        keys = [k.transpose(0, 2, 3, 1) for k, _ in pairs]
        values = [jnp.where(written_S1, v.transpose(0, 2, 1, 3), 0) for _, v in pairs]

        def put(axis: int, parts: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
            own = [jax.lax.slice_in_dim(new, at.start, at.stop, axis=axis) for at, _ in each_part(parts, axis)]
            return tuple(map(lambda part, x: jax.lax.dynamic_update_slice_in_dim(part, x, row, 0), parts, own))

        return Rows(tuple(map(partial(put, 3), rows.k, keys)), tuple(map(partial(put, 2), rows.v, values)))

    return jax.lax.fori_loop(0, count, refresh, rows)


def scatter_rows(
    pages: jax.Array, rows: Rows, table_BP: jax.Array, start_B: jax.Array, count_B: jax.Array, most: int
) -> jax.Array:
    """Write the entries start .. start + count of each dense row back to its pages; count is at most `most`."""
    layers = len(rows.k)
    offsets = jnp.arange(most)
    positions_BT = start_B[:, None] + offsets
    valid_BT = offsets < count_B[:, None]

    def written(parts: tuple[jax.Array, ...], axis: int) -> jax.Array:
        """Entries [B,T,K,H] at the positions."""
        entries = None
        for at, part in each_part(parts, axis):
            places_BT = jnp.clip(positions_BT - at.start, 0, part.shape[axis] - 1)
            places = jnp.expand_dims(places_BT, (1, 5 - axis))
            here = jnp.moveaxis(jnp.take_along_axis(part, places, axis), axis, 1)
            entries = here if entries is None else jnp.where((positions_BT < at.start)[..., None, None], entries, here)
        return entries

    for layer, (keys, values) in enumerate(zip(*rows, strict=True)):
        first_page = layer * (pages.shape[0] // layers)
        pages = write_pages(pages, first_page, table_BP, positions_BT, valid_BT, written(keys, 3), written(values, 2))
    return pages


def write_row(rows: Rows, layer: int, positions_B: jax.Array, valid_B: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array):
    """Write one token per row into one layer of the dense copy."""
    each_B = jnp.arange(positions_B.shape[0])
    keys, values = [], []
    for (at, k), v in zip(each_part(rows.k[layer], 3), rows.v[layer], strict=True):
        here_B = valid_B & (positions_B >= at.start) & (positions_B < at.stop)
        place_B = jnp.where(here_B, positions_B - at.start, v.shape[2])
        keys.append(k.at[each_B, :, :, place_B].set(k_BKH.astype(k.dtype), mode="drop"))
        values.append(v.at[each_B, :, place_B].set(v_BKH.astype(v.dtype), mode="drop"))
    return rows.replaced(layer, Rows((tuple(keys),), (tuple(values),)))


def row_attention(
    start_B: jax.Array, count_B: jax.Array
) -> Callable[[Rows, int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Rows]]:
    """The computation of `paged_attention` on the dense copy, for one token a row (count 0 or 1).

    Parts beyond the longest row that is written to are skipped. They would add zeros, so a row's result does not depend
    on other rows. Values after the end of a row must be finite, although no query sees them; `refresh_rows` sets them
    to 0.
    """
    lowest = jnp.finfo(jnp.float32).min
    last = jnp.max(jnp.where(count_B > 0, start_B, 0))

    def where_needed(at: slice, function: Callable, otherwise: float, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """`function(at, *arrays)` for a part; if no row reaches the part, arrays filled with `otherwise`."""
        if not at.start:
            return function(at, *arrays)

        def skipped(*_: jax.Array) -> tuple[jax.Array, ...]:
            shapes = jax.eval_shape(partial(function, at), *arrays)
            return jax.tree.map(lambda x: jnp.full(x.shape, otherwise, x.dtype), shapes)

        return jax.lax.cond(last >= at.start, partial(function, at), skipped, *arrays)

    def apply(rows: Rows, layer: int, q: jax.Array, k: jax.Array, v: jax.Array):
        rows = write_row(rows, layer, start_B, count_B > 0, k[:, 0], v[:, 0])
        B, _, N, H = q.shape
        K = k.shape[2]
        q_BKGH = q.reshape(B, K, N // K, H)

        def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
            factors = left.astype(q.dtype), right.astype(q.dtype)
            return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)

        def score(at: slice, q_BKGH: jax.Array, keys: jax.Array, start_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = product("BKGH,BKHS->BKGS", q_BKGH, keys) * H**-0.5
            seen = (jnp.arange(at.start, at.stop) <= start_B[:, None])[:, None, None]
            scores = jnp.where(seen, scores, lowest)
            return scores, jnp.max(scores, axis=-1)

        def weigh(at: slice, scores: jax.Array, top: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
            weights = jnp.exp(scores - top[..., None])
            return jnp.sum(weights, axis=-1), product("BKGS,BKSH->BKGH", weights, values)

        scored = [
            (at, *where_needed(at, score, lowest, q_BKGH, keys, start_B)) for at, keys in each_part(rows.k[layer], 3)
        ]
        top = reduce(jnp.maximum, [highest for _, _, highest in scored])
        weighed = [
            where_needed(at, weigh, 0.0, scores, top, values)
            for (at, scores, _), values in zip(scored, rows.v[layer], strict=True)
        ]
        total, mixed = (sum(parts[1:], parts[0]) for parts in zip(*weighed, strict=True))
        return (mixed / total[..., None]).astype(q.dtype).reshape(B, 1, N, H), rows

    return apply
