"""The engine on the device: its state, and the pure functions that update it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retool_jax import mesh as meshes
from retool_jax.engine.sampling import Sampling, row_keys, sample
from retool_jax.engine.turns import STOPS
from retool_jax.models import decoder
from retool_jax.models.attention import rotation
from retool_jax.models.cache import copy_pages, init_cache
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.rows import Rows, refresh_rows, scatter_rows

CHANGES = 6 + STOPS  # columns of `changes` in `apply_turns`


class EngineState(NamedTuple):
    """Device buffers, donated to every call."""

    cache: jax.Array  # the pool of pages, see `models/cache.py`
    hidden: jax.Array  # [B,D] of the last written token of each row
    length: jax.Array  # int32 [B]: tokens written
    budget: jax.Array  # int32 [B]: tokens that the row may still draw; with 0 it does not draw
    request: jax.Array  # uint32 [B]: the seed of its random draws
    stops: jax.Array  # int32 [B,STOPS]: further ids that end its turn, beside the engine's; -1 is none
    sampling: Sampling


def init_engine_state(model: ModelConfig, slots: int, pages: int, page_size: int) -> EngineState:
    """Empty rows."""
    ints, floats = jnp.zeros(slots, jnp.int32), jnp.zeros(slots)
    return EngineState(
        cache=init_cache(model, pages, page_size),
        hidden=jnp.zeros((slots, model.hidden_size), model.compute_dtype),
        length=ints,
        budget=ints,
        request=ints.astype(jnp.uint32),
        stops=jnp.full((slots, STOPS), -1, jnp.int32),
        sampling=Sampling(floats, ints, floats),
    )


def apply_turns(state: EngineState, changes_BC: jax.Array) -> EngineState:
    """Begin the turns of rows whose first column is set; the other columns are the bits of `Turn`'s fields."""
    changed_B, values, stops = changes_BC[:, 0] > 0, changes_BC[:, 1:6].T, changes_BC[:, 6:]

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(changed_B, jax.lax.bitcast_convert_type(new, old.dtype), old)

    request, budget, *sampling = map(pick, values, (state.request, state.budget, *state.sampling))
    stops = jnp.where(changed_B[:, None], stops, state.stops)
    return state._replace(request=request, budget=budget, stops=stops, sampling=Sampling(*sampling))


def decode_steps(
    model: ModelConfig,
    most: int,
    stop_ids: tuple[int, ...],
    shards: int,
    state: EngineState,
    dense: Rows | None,
    params: Params,
    run_key: jax.Array,
    steps: jax.Array,
    changes_BC: jax.Array,
    table_BP: jax.Array,
    stale_B: jax.Array,
    stale_count: jax.Array,
) -> tuple[EngineState, Rows | None, jax.Array, jax.Array]:
    """Draw up to `steps` <= `most` tokens for every row with budget, until each has stopped or has used its budget.

    `table` must cover the longest that any live row may become. Without a kernel that reads pages in place, `dense` is
    a copy of the live rows, outdated for the rows in `stale`; new tokens are written to both. Returns the state, the
    dense rows and the two arrays of `Drawn`.
    """
    state = apply_turns(state, changes_BC)
    rows = state.length.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)
    cache, rope_table = state.cache, None
    if dense is not None:
        rope_table = rotation(model, jnp.arange(dense.length)[None])
        cache = refresh_rows(cache, dense, table_BP, state.length, stale_B, stale_count)

    class Loop(NamedTuple):
        cache: decoder.Cache
        hidden: jax.Array
        length: jax.Array
        budget: jax.Array
        step: jax.Array
        tokens: jax.Array
        real: jax.Array
        logprobs: jax.Array

    def body(loop: Loop) -> Loop:
        live = loop.budget > 0
        logits = decoder.logits(model, params, loop.hidden)
        draw = sample(logits, row_keys(run_key, state.request, loop.length), state.sampling, shards)
        stopped = jnp.isin(draw.tokens, stops) | jnp.any(draw.tokens[:, None] == state.stops, 1)
        budget = jnp.where(stopped, 0, loop.budget - live)
        going = budget > 0  # rows that write the new token, and draw another one
        cache, hidden = decoder.extend(
            model,
            params,
            loop.cache,
            draw.tokens[:, None],
            loop.length,
            going.astype(jnp.int32),
            table_BP,
            rope_table,
        )
        both = jnp.stack([draw.logprobs, draw.plain_logprobs], 1)
        return Loop(
            cache,
            jnp.where(going[:, None], hidden, loop.hidden),
            loop.length + going,
            jnp.where(live, budget, 0),
            loop.step + 1,
            loop.tokens.at[:, loop.step].set(jnp.where(live, draw.tokens, 0)),
            loop.real.at[:, loop.step].set(live.astype(jnp.int32)),
            loop.logprobs.at[:, :, loop.step].set(jnp.where(live[:, None], both, 0.0)),
        )

    none = jnp.zeros((rows, most), jnp.int32)
    start = Loop(cache, state.hidden, state.length, state.budget, jnp.int32(0), none, none, jnp.zeros((rows, 2, most)))
    end = jax.lax.while_loop(lambda loop: (loop.step < steps) & jnp.any(loop.budget > 0), body, start)
    if dense is None:
        cache = end.cache
    else:
        dense, written = end.cache, end.length - state.length
        cache = scatter_rows(state.cache, dense, table_BP, state.length, written, most)
    ints = jnp.concatenate([end.tokens, end.real, end.length[:, None]], 1)
    state = state._replace(cache=cache, hidden=end.hidden, length=end.length, budget=end.budget)
    return state, dense, ints, end.logprobs.reshape(rows, 2 * most)


def extend_rows(
    model: ModelConfig,
    parts: int,
    at_once: int,
    state: EngineState,
    params: Params,
    tokens_bT: jax.Array,
    where_b3: jax.Array,
    table_bP: jax.Array,
) -> tuple[EngineState, jax.Array]:
    """Write known tokens (a prompt or a tool's answer) at position `start` of some rows; the rows do not draw then.

    `where` has start, count and slot of each block of tokens. A slot that does not exist marks a prefix outside the
    slots, or a block that is not the last of its row. Real blocks come first; padding has count 0. `at_once` blocks, a
    divisor of b, go through the model together, so further padding costs nothing and a row's numbers do not depend on
    how many other blocks the call has. `parts` is the number of devices over which these blocks are split.
    Returns the state and the blocks' last hidden states [b,D].
    """
    start_b, count_b, slot_b = where_b3.T

    def write(i: jax.Array, written: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        cache, hidden_bD = written
        tokens, start, count, table = (
            jax.lax.dynamic_slice_in_dim(x, i * at_once, at_once) for x in (tokens_bT, start_b, count_b, table_bP)
        )
        if parts > 1:
            tokens = meshes.constrain(tokens, "batch", "length")
        cache, new = decoder.extend(model, params, cache, tokens, start, count, table)
        return cache, jax.lax.dynamic_update_slice_in_dim(hidden_bD, new, i * at_once, 0)

    none = jnp.zeros((len(tokens_bT), model.hidden_size), state.hidden.dtype)
    rounds = -(-jnp.sum(count_b > 0) // at_once)
    cache, hidden_bD = jax.lax.fori_loop(0, rounds, write, (state.cache, none))
    state = state._replace(
        cache=cache,
        hidden=state.hidden.at[slot_b].set(hidden_bD, mode="drop"),
        length=state.length.at[slot_b].set(start_b + count_b, mode="drop"),
        budget=state.budget.at[slot_b].set(0, mode="drop"),
    )
    return state, hidden_bD


def copy_rows(state: EngineState, rows_2M: jax.Array) -> EngineState:
    """Copy slots: source (first) to target (second). The rows do not draw then; the host shares their pages."""
    source_M, target_M = rows_2M
    return state._replace(
        hidden=state.hidden.at[target_M].set(state.hidden[source_M], mode="drop"),
        length=state.length.at[target_M].set(state.length[source_M], mode="drop"),
        budget=state.budget.at[target_M].set(0, mode="drop"),
    )


def place_row(state: EngineState, hidden_bD: jax.Array, place_3: jax.Array) -> EngineState:
    """Put hidden state `place[0]` of a write into slot `place[1]`, with length `place[2]` and without a budget."""
    at, slot, length = place_3
    return state._replace(
        hidden=state.hidden.at[slot].set(hidden_bD[at]),
        length=state.length.at[slot].set(length),
        budget=state.budget.at[slot].set(0),
    )


def copy_state_pages(layers: int, state: EngineState, pages_2M: jax.Array, count: jax.Array) -> EngineState:
    """Copy pages, source (first) to target (second), before one of the rows that share them is written to."""
    return state._replace(cache=copy_pages(state.cache, layers, *pages_2M, count))
