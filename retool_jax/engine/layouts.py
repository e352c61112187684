"""Sizes of an engine, how its arrays lie on a mesh, and its programs for them: all that is fixed before it starts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from retool_jax import mesh as meshes
from retool_jax.engine.programs import (
    EngineState,
    copy_rows,
    copy_state_pages,
    decode_steps,
    extend_rows,
    init_engine_state,
    place_row,
)
from retool_jax.engine.sampling import Sampling
from retool_jax.errors import UserError
from retool_jax.models.attention import resolve_cache_kernel
from retool_jax.models.cache import Rows, init_rows
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, unstack
from retool_jax.models.sharding import param_shardings, unstacked_shardings


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine, and how its scheduler treats tools.

    Every list of buckets is of compiled sizes, of which the smallest that fits is taken; empty lists are filled in by
    `sizes`. Each size is a program to compile at start.
    """

    slots: int = 192  # B: trajectories that hold a cache row at once
    max_length: int = 128  # S: tokens of one trajectory, prompt and tool output included
    decode_steps: int = 16  # most tokens per row and dispatch
    chunk_rows: int = 32  # most rows per prefill or append call; fewer are padded
    read_late: int = 1  # dispatches that may be under way while the results of an earlier one are read
    tool_lag: int = 1  # decode dispatches between a tool call and its answer's append; -1 appends answers as they come
    stale_rows: str = "rewrite"  # when weights change under a conversation: rewrite its row, or discard it
    page_size: int = 0  # tokens of a page; 0: 128 where a kernel reads pages one by one (TPU), 16 elsewhere
    pages: int = 0  # pages of the cache, shared by all rows; 0: enough for every slot's max_length
    row_buckets: tuple[int, ...] = ()  # rows of a prefill or append; empty: chunk_rows
    token_buckets: tuple[int, ...] = ()  # tokens of a prefill or append; empty: 16, 64, 256, 1024
    read_buckets: tuple[int, ...] = ()  # tokens of a row that attention reads; empty: powers of two from 256 without
    # a kernel, which reads no more than there is

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "decode_steps", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at least 1")
        if self.tool_lag < -1:
            raise UserError(f"engine.tool_lag={self.tool_lag} must be -1 (answers as they come) or at least 0")
        if self.stale_rows not in ("rewrite", "discard"):
            raise UserError(f"engine.stale_rows={self.stale_rows} is not one of: rewrite, discard")
        for name in ("page_size", "pages", "read_late"):
            if getattr(self, name) < 0:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at least 0")
        for name in ("row_buckets", "token_buckets", "read_buckets"):
            if any(size < 1 for size in getattr(self, name)):
                raise UserError(f"engine.{name}={list(getattr(self, name))} must be sizes of at least 1")


class Sizes(NamedTuple):
    """What an engine's config comes to on a backend; bucket lists ascend, and the last holds everything."""

    page_size: int
    pages: int
    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    reads: tuple[int, ...]  # in pages


def sizes(config: EngineConfig, kernel: str) -> Sizes:
    """Fill in what the config leaves open for an attention kernel, and cut it to what a row can hold."""
    page_size = min(config.page_size or (128 if kernel == "ragged" else 16), config.max_length)
    row_pages = -(-config.max_length // page_size)

    def up_to(buckets: Iterable[int], last: int) -> tuple[int, ...]:
        return (*sorted({size for size in buckets if size < last}), last)

    tokens = sorted(config.token_buckets or (16, 64, 256, 1024))
    reads = config.read_buckets or (() if kernel == "ragged" else [256 << i for i in range(16)])
    pages = config.pages or config.slots * row_pages
    if pages < row_pages:
        raise UserError(
            f"engine.pages={pages} of {page_size} tokens do not hold one row of engine.max_length={config.max_length};"
            f" use at least {row_pages}, or 0 for as many as all slots may need"
        )
    return Sizes(
        page_size,
        pages,
        up_to(config.row_buckets, config.chunk_rows),
        up_to(tokens, min(tokens[-1], config.max_length)),
        up_to((-(-length // page_size) for length in reads), row_pages),
    )


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest compiled size that holds `size`."""
    return next(known for known in buckets if known >= size)


class Layouts(NamedTuple):
    """How the engine's arrays lie on a mesh, for which its programs are compiled."""

    sizes: Sizes
    state: EngineState
    rows: Rows | None  # None where a kernel reads pages where they lie
    weights: Params | dict
    everywhere: NamedSharding

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, mesh: Mesh) -> "Layouts":
        kernel = resolve_cache_kernel(model, mesh.devices.flat[0].platform)
        weights, everywhere = param_shardings(model, mesh), meshes.replicated(mesh)
        rows = None
        if kernel == "xla":
            weights = unstacked_shardings(model, mesh)
            split = meshes.sharding(mesh, None, "kv_heads", None, None)
            rows = Rows((split,) * model.num_layers, (split,) * model.num_layers)
        pool = meshes.sharding(mesh, None, None, "kv_heads", "head_dim")
        state = EngineState(pool, *[everywhere] * 4, Sampling(*[everywhere] * 3))
        return cls(sizes(config, kernel), state, rows, weights, everywhere)


def functions(
    model: ModelConfig, config: EngineConfig, layouts: Layouts, stop_ids: Sequence[int]
) -> dict[str, Callable]:
    """Everything that the engine runs on the device, jitted for its layouts; states are donated."""
    _, state, rows, weights, everywhere = layouts
    pages, page_size = layouts.sizes.pages, layouts.sizes.page_size
    step = partial(jax.jit, donate_argnums=0)

    def adopt(old: Params | dict | None, new: Params) -> Params | dict:
        # A copy even where nothing changes, since the trainer's next update consumes its own arrays.
        new = new if rows is None else unstack(new)
        return jax.tree.map(lambda x: jnp.array(x, model.compute_dtype, copy=True), new)

    shards = everywhere.mesh.shape["tp"]
    decode = partial(decode_steps, model, config.decode_steps, tuple(stop_ids), shards)
    return {
        "state": jax.jit(partial(init_engine_state, model, config.slots, pages, page_size), out_shardings=state),
        "rows": jax.jit(partial(init_rows, model, config.slots), static_argnums=0, out_shardings=rows),
        # The old weights' memory takes the new ones, so that there is no second copy on the device.
        "adopt": jax.jit(adopt, donate_argnums=0, out_shardings=weights, keep_unused=True),
        "decode": jax.jit(decode, donate_argnums=(0, 1), out_shardings=(state, rows, everywhere, everywhere)),
        "extend": step(partial(extend_rows, model), out_shardings=(state, everywhere)),
        "copy rows": step(copy_rows, out_shardings=state),
        "place row": step(place_row, out_shardings=state),
        "copy pages": step(partial(copy_state_pages, model.num_layers), out_shardings=state),
        "first": jax.jit(lambda ints: ints[:, :: config.decode_steps], out_shardings=everywhere),
    }
