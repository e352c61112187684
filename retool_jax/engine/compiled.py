"""An engine's programs as values: the mesh they run on, how arrays lie on it, and what is compiled before it starts."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from retool_jax import mesh as meshes
from retool_jax.clock import waited
from retool_jax.engine.config import EngineConfig, Sizes, sizes
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
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.rows import Rows, init_rows
from retool_jax.models.sharding import param_shardings, unstacked_shardings

P = ParamSpec("P")
R = TypeVar("R")


def decode_mesh(model: ModelConfig, mesh: Mesh, tp: int = 0) -> Mesh:
    """The mesh that an engine runs on: those devices of a trainer's mesh that belong to this process.

    `tp` of them split heads, feed-forward and vocabulary; the rows are dealt out over the others, with whole weights.
    0 takes the most devices for which that works. Nothing lies on fsdp, whose weights would be gathered at every step.

    Raises:
        UserError: so many devices do not split the model, or do not divide those that there are.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    dimensions = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.intermediate_size": model.intermediate_size,
        "model.vocab_size": model.vocab_size,
    }
    limits = {"the devices of this process": len(devices)} | dimensions
    parts = tp or max(
        parts for parts in range(1, len(devices) + 1) if all(size % parts == 0 for size in limits.values())
    )
    for name, size in limits.items():
        if size % parts:
            raise UserError(f"engine.tp={parts} does not divide {name}={size}; use a divisor, or 0 to have one found")
    first = mesh.devices.ravel().tolist().index(devices[0])
    if mesh.devices.ravel().tolist()[first : first + len(devices)] != devices:
        raise UserError("the mesh does not hold each process's devices one after another; leave the order to make_mesh")
    own = Mesh(np.array(devices).reshape(len(devices) // parts, 1, parts), meshes.AXES)
    return mesh if own == mesh else own


class Layouts(NamedTuple):
    """How the engine's arrays lie on its mesh, for which its programs are compiled."""

    sizes: Sizes
    state: EngineState
    rows: NamedSharding | None  # of each array of the dense rows; None where a kernel reads pages where they lie
    weights: Params | dict
    everywhere: NamedSharding

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, mesh: Mesh) -> "Layouts":
        platform = mesh.devices.flat[0].platform
        kernel = resolve_cache_kernel(model, platform)
        weights, everywhere = param_shardings(model, mesh), meshes.replicated(mesh)
        parts = row_parts(mesh)
        batch = "batch" if parts > 1 and config.slots % parts == 0 else None
        rows = None
        if kernel == "xla":
            weights = unstacked_shardings(model, mesh)
            rows = meshes.sharding(mesh, batch, "kv_heads", None, None)
        pool = meshes.sharding(mesh, None, None, "kv_heads", "head_dim")
        by_row = meshes.sharding(mesh, batch) if batch else everywhere
        state = EngineState(pool, *[by_row] * 5, Sampling(*[by_row] * 3))
        return cls(sizes(config, kernel, platform, parts), state, rows, weights, everywhere)


def row_parts(mesh: Mesh) -> int:
    """Into how many parts a mesh deals out the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Program(Generic[P, R]):
    """A function of the device with its compiled forms, one for each set of shapes that it was called with."""

    def __init__(self, function: Callable[P, R], everywhere: NamedSharding) -> None:
        self._jitted = function
        self._everywhere = everywhere  # where arguments go that come from the host
        self._forms: dict[tuple, Future[Callable[P, R]]] = {}
        self._lock = threading.Lock()  # of these

    def lower(self, *arguments: P.args) -> jax.stages.Lowered:
        """The program for arguments, or abstract ones with their shardings, before it is compiled."""
        with jax.set_mesh(self._everywhere.mesh):
            return self._jitted.lower(*arguments)

    def form(self, *arguments: P.args) -> Callable[P, R]:
        """The compiled form for arguments, or abstract ones, of these shapes.

        Any thread may ask for it: the first one compiles, others wait for that.
        """
        key = tuple(x.shape for x in arguments if hasattr(x, "shape"))
        with self._lock:
            known = key in self._forms
            form = self._forms.setdefault(key, Future())
        if known and not form.done():
            began = time.perf_counter()
            form.exception()
            waited(time.perf_counter() - began)
        if not known:
            try:
                form.set_result(self.lower(*jax.tree.map(self._abstract, arguments)).compile())
            except BaseException as error:  # an interrupt, too: nobody waits for what will not come
                form.set_exception(error)
                del self._forms[key]
        return form.result()

    def _abstract(self, x: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or self._everywhere)

    def __call__(self, *arguments: P.args) -> R:
        return self.form(*arguments)(*arguments)


@dataclass(frozen=True)
class Programs:
    """What an engine runs on the device, for its layouts; states and dense rows are donated."""

    init_state: Callable[[], EngineState]
    init_rows: Callable[[int], Rows]  # of so many tokens
    decode: Program[..., tuple[EngineState, Rows | None, jax.Array, jax.Array]]
    extend: tuple[Program[..., tuple[EngineState, jax.Array]], ...]  # one for each size of a block
    copy_rows: Program[[EngineState, np.ndarray], EngineState]
    place_row: Program[[EngineState, jax.Array, np.ndarray], EngineState]
    copy_pages: Program[[EngineState, np.ndarray, np.ndarray], EngineState]

    @classmethod
    def of(cls, model: ModelConfig, config: EngineConfig, layouts: Layouts, stop_ids: Sequence[int]) -> "Programs":
        sizes, state, rows, _, everywhere = layouts
        mesh = everywhere.mesh
        decode = partial(decode_steps, model, config.decode_steps, tuple(stop_ids), mesh.shape["tp"])
        empty_state = partial(init_engine_state, model, config.slots, sizes.pages, sizes.page_size)
        options = meshes.decode_options(mesh)
        empty_rows = partial(init_rows, model, config.slots, backend=mesh.devices.flat[0].platform)

        def program(function: Callable, out_shardings: object, donated: int | tuple[int, ...] = 0) -> Program:
            jitted = jax.jit(function, donate_argnums=donated, out_shardings=out_shardings, compiler_options=options)
            return Program(jitted, everywhere)

        return cls(
            init_state=jax.jit(empty_state, out_shardings=state),
            init_rows=jax.jit(empty_rows, static_argnums=0, out_shardings=rows),
            decode=program(decode, (state, rows, everywhere, everywhere), donated=(0, 1)),
            extend=tuple(
                program(partial(extend_rows, model, row_parts(mesh), some), (state, everywhere))
                for some in sizes.at_once
            ),
            copy_rows=program(copy_rows, state),
            place_row=program(place_row, state),
            copy_pages=program(partial(copy_state_pages, model.num_layers), state),
        )
