"""The dense copy of live rows, for steps of one token a row where no kernel reads pages where they lie."""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retool_jax.models.cache import read_pages, write_pages
from retool_jax.models.config import ModelConfig

PART = 64  # tokens of a part of a dense row, or a multiple of it
PARTS, PARTS_OF_ALL = 4, 32  # at most, of a layer and of all layers together


class Rows(NamedTuple):
    """What all rows hold, beside the pages.

    Of each layer one array or, on a CPU, several: parts of `part_lengths` tokens each, so that attention can leave out
    those behind the longest row. They are laid out for its two products: keys [B,K,H,S] and values [B,K,S,H]. XLA's CPU
    backend would transpose any other layout at every step, and copy each layer out of a stacked array.
    """

    k: tuple[tuple[jax.Array, ...], ...]
    v: tuple[tuple[jax.Array, ...], ...]

    @property
    def length(self) -> int:
        """The tokens that each row has room for."""
        return sum(part.shape[2] for part in self.v[0])

    def only(self, layer: int) -> "Rows":
        """Those of one layer."""
        return Rows((self.k[layer],), (self.v[layer],))

    def replaced(self, layer: int, own: "Rows") -> "Rows":
        """With those of one layer in the place of what was there."""
        return Rows(*((*old[:layer], *new, *old[layer + 1 :]) for old, new in zip(self, own, strict=True)))


def part_lengths(length: int, layers: int, backend: str) -> tuple[int, ...]:
    """The parts that dense rows of so many tokens are cut into: several on a CPU, and one elsewhere.

    A GPU's host would have to wait for each condition. A deep model has one part too, since its program grows with
    them: with four, a decode of 30 layers took 21 CPU-seconds to compile in the place of 12.
    """
    if backend != "cpu":
        return (length,)
    size = -(-length // (PART * max(min(PARTS, PARTS_OF_ALL // layers), 1))) * PART
    return tuple(min(size, length - first) for first in range(0, length, size))


def init_rows(config: ModelConfig, rows: int, length: int, backend: str) -> Rows:
    """Dense rows without content, for at most `length` tokens each."""
    B, L, K, H = rows, config.num_layers, config.num_kv_heads, config.head_dim
    parts = part_lengths(length, L, backend)
    keys, values = (
        [tuple(jnp.zeros(shape(size), config.cache_dtype) for size in parts) for _ in range(L)]
        for shape in (lambda size: (B, K, H, size), lambda size: (B, K, size, H))
    )
    return Rows(tuple(keys), tuple(values))


def each_part(parts: tuple[jax.Array, ...], axis: int) -> Iterator[tuple[slice, jax.Array]]:
    """The parts of a layer's dense rows, each with the places that it holds; their tokens lie on this axis."""
    first = 0
    for part in parts:
        yield slice(first, first + part.shape[axis]), part
        first += part.shape[axis]


def refresh_rows(
    pages: jax.Array, rows: Rows, table_BP: jax.Array, length_B: jax.Array, stale_M: jax.Array, count: jax.Array
) -> Rows:
    """Copy the pages of the first `count` rows named in `stale` over their dense form; values behind `length` are 0."""
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
        found = None
        for at, part in each_part(parts, axis):
            places_BT = jnp.clip(positions_BT - at.start, 0, part.shape[axis] - 1)
            places = jnp.expand_dims(places_BT, (1, 5 - axis))
            here = jnp.moveaxis(jnp.take_along_axis(part, places, axis), axis, 1)
            found = here if found is None else jnp.where((positions_BT < at.start)[..., None, None], found, here)
        return found

    for layer, (keys, values) in enumerate(zip(*rows, strict=True)):
        first_page = layer * (pages.shape[0] // layers)
        pages = write_pages(pages, first_page, table_BP, positions_BT, valid_BT, written(keys, 3), written(values, 2))
    return pages


def write_row(rows: Rows, layer: int, positions_B: jax.Array, valid_B: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array):
    """Put one token per row into one layer of the dense copy."""
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
    """What `paged_attention` computes, for one token a row (count 0 or 1) and the dense copy of the rows.

    Parts that no row which is written to has come to are left out. They would add zeros, so what comes out for a row
    does not depend on the others. Values behind what a row holds must be finite, though no query sees them;
    `refresh_rows` makes them 0.
    """
    lowest = jnp.finfo(jnp.float32).min
    last = jnp.max(jnp.where(count_B > 0, start_B, 0))

    def where_needed(at: slice, function: Callable, otherwise: float, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """`function(at, *arrays)` of a part, or one number everywhere where no row has come to that part."""
        if not at.start:
            return function(at, *arrays)

        def left_out(*_: jax.Array) -> tuple[jax.Array, ...]:
            shapes = jax.eval_shape(partial(function, at), *arrays)
            return jax.tree.map(lambda x: jnp.full(x.shape, otherwise, x.dtype), shapes)

        return jax.lax.cond(last >= at.start, partial(function, at), left_out, *arrays)

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
