"""Sizes of an engine, how its arrays lie on a mesh, and its programs for them: all that is fixed before it starts."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from retool_jax import mesh as meshes
from retool_jax.engine.config import EngineConfig
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
from retool_jax.learn.optimizer import param_shardings
from retool_jax.models.attention import resolve_cache_kernel
from retool_jax.models.cache import Rows, init_rows
from retool_jax.models.config import ModelConfig
from retool_jax.models.transformer import Params, unstack


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
            one_layer = jax.tree.map(meshes.without_first, weights["layers"])
            weights = {name: weights[name] for name in weights} | {"layers": (one_layer,) * model.num_layers}
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
