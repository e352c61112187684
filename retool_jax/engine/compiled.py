"""An engine's compiled programs, the mesh that they run on, and the shardings of their arrays."""

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
from retool_jax.clock import record_compile_wait
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
    """The mesh of an engine: the devices of a trainer's mesh that belong to this process.

    Heads, feed-forward network and vocabulary are split over `tp` devices; 0 takes the most devices that divide them.
    Rows are split over the rest, which hold copies of the weights. The fsdp axis has size 1, since its weights would be
    gathered at every step.

    Raises:
        UserError: `tp` does not divide the model's dimensions or the number of devices.
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
    """The shardings of the engine's arrays, for which its programs are compiled."""

    sizes: Sizes
    state: EngineState
    rows: NamedSharding | None  # of each array of the dense copy; None if a kernel reads the pages in place
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
    """The number of parts into which a mesh splits the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Program(Generic[P, R]):
    """A jitted function and its compiled forms, one for each set of argument shapes."""

    def __init__(self, function: Callable[P, R], everywhere: NamedSharding) -> None:
        self._jitted = function
        self._everywhere = everywhere  # the sharding of arguments that come from the host
        self._forms: dict[tuple, Future[Callable[P, R]]] = {}
        self._lock = threading.Lock()  # guards `_forms`

    def lower(self, *arguments: P.args) -> jax.stages.Lowered:
        """The lowered program for these arguments, which may be abstract with shardings."""
        with jax.set_mesh(self._everywhere.mesh):
            return self._jitted.lower(*arguments)

    def form(self, *arguments: P.args) -> Callable[P, R]:
        """The compiled form for arguments of these shapes, which may be abstract.

        Any thread may call this: the first one compiles, and the others wait for it.
        """
        key = tuple(x.shape for x in arguments if hasattr(x, "shape"))
        with self._lock:
            known = key in self._forms
            form = self._forms.setdefault(key, Future())
        if known and not form.done():
            began = time.perf_counter()
            form.exception()
            record_compile_wait(time.perf_counter() - began)
        if not known:
            try:
                form.set_result(self.lower(*jax.tree.map(self._abstract, arguments)).compile())
            except BaseException as error:  # also an interrupt, so that no thread waits forever
                form.set_exception(error)
                del self._forms[key]
        return form.result()

    def _abstract(self, x: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or self._everywhere)

    def __call__(self, *arguments: P.args) -> R:
        return self.form(*arguments)(*arguments)


@dataclass(frozen=True)
class Programs:
    """An engine's device programs for its layouts; states and dense rows are donated."""

    init_state: Callable[[], EngineState]
    init_rows: Callable[[int], Rows]  # takes the rows' length in tokens
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
                program(partial(extend_rows, model, row_parts(mesh), at_once), (state, everywhere))
                for at_once in sizes.at_once
            ),
            copy_rows=program(copy_rows, state),
            place_row=program(place_row, state),
            copy_pages=program(partial(copy_state_pages, model.num_layers), state),
        )
