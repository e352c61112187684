"""The engine: rows of a live KV cache on the device, and the few jitted functions that grow them.

A row holds one trajectory's keys and values for as long as it lives, tool calls included. Prefill, append and decode
are the same model call (`transformer.extend`) with different numbers of tokens. A decode step *samples first and
forwards after*: the state keeps the hidden state behind each row's last token, a token is drawn from it and only
then written. So a row that stops leaves nothing to repair: its last token is recorded but not yet in the cache,
and comes with whatever is appended next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.engine.sampling import row_keys, sample
from retool_jax.errors import UserError
from retool_jax.models import transformer
from retool_jax.models.cache import KVCache, fork_rows, init_cache
from retool_jax.models.config import ModelConfig
from retool_jax.models.transformer import Params
from retool_jax.update import param_shardings


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine, and how its scheduler treats tools."""

    slots: int = 192  # B: trajectories that hold a cache row at once
    max_length: int = 128  # S: tokens of one trajectory, prompt and tool output included
    decode_steps: int = 16  # tokens per row and dispatch
    chunk_rows: int = 32  # rows per prefill or append call; fewer are padded
    tool_lag: int = 1  # decode dispatches between a tool call and its answer's append; -1 appends answers as they come

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "decode_steps", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at least 1")
        if self.tool_lag < -1:
            raise UserError(f"engine.tool_lag={self.tool_lag} must be -1 (answers as they come) or at least 0")


class EngineState(NamedTuple):
    """Device buffers, donated to every call."""

    cache: KVCache
    hidden: jax.Array  # [B,D] behind the last written token of each row


class Control(NamedTuple):
    """What the host says about each row at a dispatch; numpy arrays [B]."""

    length: np.ndarray  # int32: tokens written
    budget: np.ndarray  # int32: tokens that the row may draw; 0 parks it
    request: np.ndarray  # uint32: the stream of its random draws
    temperature: np.ndarray  # float32

    @classmethod
    def parked(cls, rows: int) -> "Control":
        return cls(*(np.zeros(rows, dtype) for dtype in (np.int32, np.int32, np.uint32, np.float32)))


class Drawn(NamedTuple):
    """Result of a decode dispatch, on the device until it is read."""

    tokens: jax.Array  # int32 [B,n]
    logprobs: jax.Array  # float32 [B,n]
    counts: jax.Array  # int32 [B]: how many of the n are real
    steps: jax.Array  # int32: how many steps ran


def bucket(length: int, smallest: int = 16) -> int:
    """The compiled length that serves `length` tokens: the next power of two."""
    return max(smallest, 1 << (length - 1).bit_length())


def init_engine_state(model: ModelConfig, config: EngineConfig) -> EngineState:
    """Empty rows."""
    cache = init_cache(model, config.slots, config.max_length)
    return EngineState(cache, jnp.zeros((config.slots, model.hidden_size), model.compute_dtype))


def decode_steps(
    model: ModelConfig,
    steps: int,
    stop_ids: tuple[int, ...],
    params: Params,
    state: EngineState,
    control: Control,
    run_key: jax.Array,
) -> tuple[EngineState, Drawn]:
    """Draw up to `steps` tokens for every row with budget, until each has stopped or spent it."""
    rows = control.length.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)

    class Loop(NamedTuple):
        state: EngineState
        length: jax.Array
        budget: jax.Array
        drawn: Drawn

    def body(loop: Loop) -> Loop:
        step = loop.drawn.steps
        live = loop.budget > 0
        logits = transformer.logits(model, params, loop.state.hidden)
        keys = row_keys(run_key, control.request, loop.length)
        token, logprob = sample(logits, keys, control.temperature)
        drawn = Drawn(
            loop.drawn.tokens.at[:, step].set(jnp.where(live, token, 0)),
            loop.drawn.logprobs.at[:, step].set(jnp.where(live, logprob, 0.0)),
            loop.drawn.counts + live,
            step + 1,
        )
        stopped = jnp.isin(token, stops)
        budget = jnp.where(stopped, 0, loop.budget - live)
        go = budget > 0
        cache, hidden = transformer.extend(
            model, params, loop.state.cache, token[:, None], loop.length, go.astype(jnp.int32)
        )
        hidden = jnp.where(go[:, None], hidden, loop.state.hidden)
        return Loop(EngineState(cache, hidden), loop.length + go, budget, drawn)

    drawn = Drawn(
        jnp.zeros((rows, steps), jnp.int32), jnp.zeros((rows, steps)), jnp.zeros(rows, jnp.int32), jnp.int32(0)
    )
    loop = Loop(state, control.length, control.budget, drawn)
    loop = jax.lax.while_loop(lambda loop: (loop.drawn.steps < steps) & jnp.any(loop.budget > 0), body, loop)
    return loop.state, loop.drawn


def extend_rows(
    model: ModelConfig,
    params: Params,
    state: EngineState,
    tokens_bT: jax.Array,
    start_b: jax.Array,
    count_b: jax.Array,
    rows_b: jax.Array,
) -> EngineState:
    """Write known tokens behind the first `start` of some rows: a prompt, or what the environment said."""
    cache, hidden_bD = transformer.extend(model, params, state.cache, tokens_bT, start_b, count_b, rows_b)
    return EngineState(cache, state.hidden.at[rows_b].set(hidden_bD, mode="drop"))


def copy_rows(state: EngineState, source_M: jax.Array, target_M: jax.Array) -> EngineState:
    """Make each target row the same trajectory as its source."""
    hidden = state.hidden.at[target_M].set(state.hidden[source_M], mode="drop")
    return EngineState(fork_rows(state.cache, source_M, target_M), hidden)


class Engine:
    """Holds the engine's buffers and weights; every method is one or a few dispatches and none waits for results."""

    def __init__(
        self, model: ModelConfig, config: EngineConfig, params: Params, mesh: Mesh, stop_ids: Sequence[int], seed: int
    ) -> None:
        self.model = model
        self.config = config
        self.mesh = mesh
        self.stop_ids = frozenset(stop_ids)
        self._run_key = jax.random.key(seed)
        # Pinned layouts: were the compiler to choose them, each function would be compiled for the others' choices.
        weights, everywhere = param_shardings(model, mesh), meshes.replicated(mesh)
        entries = meshes.sharding(mesh, "layers", None, "length", "kv_heads", "head_dim")
        layout = EngineState(KVCache(entries, entries), everywhere)
        self._state = jax.jit(partial(init_engine_state, model, config), out_shardings=layout)()
        self._extend = jax.jit(partial(extend_rows, model), donate_argnums=1, out_shardings=layout)
        self._copy = jax.jit(copy_rows, donate_argnums=0, out_shardings=layout)
        self._decode = jax.jit(
            partial(decode_steps, model, config.decode_steps, tuple(stop_ids)),
            donate_argnums=1,
            out_shardings=(layout, everywhere),
        )
        # A copy, since the trainer's next update consumes its own arrays.
        self._adopt = jax.jit(
            partial(jax.tree.map, lambda x: jnp.array(x, model.compute_dtype, copy=True)),
            out_shardings=weights,
        )
        self.update_params(params)

    def update_params(self, params: Params) -> None:
        """Take new weights from the trainer, resharded and cast; nothing is recompiled. Live rows become stale."""
        self._params = self._adopt(params)

    def append(self, rows: Sequence[int], starts: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Write tokens behind the first `starts[i]` of row `rows[i]`; with starts of 0 this is prefill.

        Cost is proportional to the tokens given, not to what the rows hold already.
        """
        chunk = self.config.chunk_rows
        for at in range(0, len(rows), chunk):
            part = tokens[at : at + chunk]
            longest = max(map(len, part))
            padded = np.zeros((chunk, bucket(longest)), np.int32)
            start, count = np.zeros(chunk, np.int32), np.zeros(chunk, np.int32)
            row = np.full(chunk, self.config.slots, np.int32)  # outside the cache: dropped
            for i, ids in enumerate(part):
                padded[i, : len(ids)] = ids
                start[i], count[i], row[i] = starts[at + i], len(ids), rows[at + i]
                if not ids:
                    raise ValueError(f"row {row[i]} was given no tokens: there would be nothing to draw the next from")
                if start[i] + count[i] > self.config.max_length:
                    raise ValueError(
                        f"row {row[i]} would hold {start[i] + count[i]} of {self.config.max_length} tokens"
                    )
            with jax.set_mesh(self.mesh):
                self._state = self._extend(self._params, self._state, padded, start, count, row)

    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy row `sources[i]` to row `targets[i]`: one prefill serves all samples of a prompt."""
        if not targets:
            return
        slots = self.config.slots
        source, target = np.zeros(slots, np.int32), np.full(slots, slots, np.int32)
        source[: len(sources)], target[: len(targets)] = sources, targets
        with jax.set_mesh(self.mesh):
            self._state = self._copy(self._state, source, target)

    def decode(self, control: Control) -> Drawn:
        """Start one fused decode; reading the result waits for it."""
        with jax.set_mesh(self.mesh):
            self._state, drawn = self._decode(self._params, self._state, control, self._run_key)
        return drawn
