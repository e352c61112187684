"""The programs that an engine will run, from shapes alone, so that they can be compiled before weights are loaded."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from retool_jax.clock import AHEAD
from retool_jax.engine.compiled import Layouts, Program, Programs, decode_mesh
from retool_jax.engine.config import FILLED, EngineConfig
from retool_jax.engine.programs import CHANGES, init_engine_state
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, abstract_params, unstack, weight_dtype
from retool_jax.models.rows import init_rows

AT_ONCE = 2  # programs that are compiled in parallel; more need memory and save no time on a few cores


class Shapes(NamedTuple):
    """An engine's arrays and its programs' arguments, as shapes with shardings."""

    model: ModelConfig
    config: EngineConfig
    layouts: Layouts

    def ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.layouts.everywhere)

    @property
    def state(self) -> object:
        sizes = self.layouts.sizes
        empty = partial(init_engine_state, self.model, self.config.slots, sizes.pages, sizes.page_size)
        return placed(jax.eval_shape(empty), self.layouts.state)

    @property
    def weights(self) -> Params | dict:
        return engine_weights(self.model, self.layouts)

    def decode(self, pages: int) -> tuple:
        """The arguments of a decode of rows of `pages` pages."""
        slots, layouts, rows = self.config.slots, self.layouts, None
        if layouts.rows:
            length = pages * layouts.sizes.page_size
            platform = layouts.everywhere.mesh.devices.flat[0].platform
            rows = placed(jax.eval_shape(partial(init_rows, self.model, slots, length, platform)), layouts.rows)
        key = placed(jax.eval_shape(lambda: jax.random.key(0)), layouts.everywhere)
        host = self.ints(), self.ints(slots, CHANGES), self.ints(slots, pages), self.ints(slots), self.ints()
        return self.state, rows, self.weights, key, *host

    def extend(self, size: int, pages: int) -> tuple:
        """The arguments of a write of blocks of `Sizes.tokens[size]`, in rows of `pages` pages."""
        rows, tokens = self.layouts.sizes.rows[size], self.layouts.sizes.tokens[size]
        return self.state, self.weights, self.ints(rows, tokens), self.ints(rows, 3), self.ints(rows, pages)


def held_bytes(model: ModelConfig, config: EngineConfig, mesh: Mesh) -> int:
    """Bytes that an engine's cache, rows and weights take on each of its devices."""
    layouts = Layouts.of(model, config, decode_mesh(model, mesh, config.tp))
    state, rows, weights, *_ = Shapes(model, config, layouts).decode(layouts.sizes.reads[-1])
    parts = jax.tree.leaves((state, rows, weights))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in parts)


def all_calls(shapes: Shapes, programs: Programs) -> Iterator[tuple[Program, tuple]]:
    """Every program that an engine can need, with its arguments; those that take longest to compile come first."""
    sizes, slots, state = shapes.layouts.sizes, shapes.config.slots, shapes.state
    for pages in sizes.reads:
        yield programs.decode, shapes.decode(pages)
        for size, (program, tokens) in enumerate(zip(programs.extend, sizes.tokens, strict=True)):
            if tokens == sizes.tokens[0] or FILLED * tokens <= pages * sizes.page_size:
                yield program, shapes.extend(size, pages)
    yield programs.copy_rows, (state, shapes.ints(2, slots))
    yield programs.copy_pages, (state, shapes.ints(2, slots), shapes.ints())
    for rows in set(sizes.rows):
        hidden = jax.ShapeDtypeStruct((rows, shapes.model.hidden_size), shapes.model.compute_dtype)
        yield programs.place_row, (state, hidden, shapes.ints(3))


def begin_to_compile(shapes: Shapes, programs: Programs) -> ThreadPoolExecutor:
    """Start compiling every program that an engine can need, several at a time, and return the threads.

    A caller of a program waits until it is compiled (`Program.form`), and gets the error if its compilation failed.
    """
    threads = ThreadPoolExecutor(AT_ONCE, AHEAD)
    for program, arguments in all_calls(shapes, programs):
        threads.submit(program.form, *arguments)
    return threads


def compile_all(shapes: Shapes, programs: Programs) -> None:
    """Compile every program that an engine can need, and wait for all, also for those that other threads compile."""
    with begin_to_compile(shapes, programs):
        for program, arguments in all_calls(shapes, programs):
            program.form(*arguments)


def placed(shapes: object, shardings: object) -> object:
    """Shapes with these shardings: a tree of shardings, or one sharding for all."""
    one = isinstance(shardings, jax.sharding.Sharding)
    where = jax.tree.map(lambda _: shardings, shapes) if one else shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def engine_weights(model: ModelConfig, layouts: Layouts) -> Params | dict:
    """The engine's copy of a model, in its own layout and types."""
    shapes = abstract_params(model)[1]
    shapes = shapes if layouts.rows is None else jax.eval_shape(unstack, shapes)
    typed = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(x.shape, weight_dtype(model, path[0].key)), shapes
    )
    return placed(typed, layouts.weights)
