"""Transfer of new weights from a trainer's mesh to an engine's."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from retool_jax.engine.compiled import Layouts
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, unstack, weight_dtype

Weights = Params | dict  # a dict where the layers are unstacked


def make_adopt(model: ModelConfig, layouts: Layouts, trainer: Mesh) -> Callable[[Weights | None, Params], Weights]:
    """A function from (old weights or None, the trainer's weights) to the engine's own copy, resharded and cast.

    The new weights take the memory of the old ones, so that there is no second copy on the device. They are copied even
    if neither sharding nor type changes, since the trainer's next update donates its own arrays. If the trainer's mesh
    spans several processes, all of them must call it together: one program puts a copy on every process's devices, and
    each engine takes the parts on its own devices.
    """
    own = layouts.everywhere.mesh
    if own.size == trainer.size and layouts.rows is not None:
        return _layer_by_layer(model, layouts)
    spread = make_spread(model, layouts, trainer)
    if own.size == trainer.size:
        return spread
    every = _all_engines(own, trainer)

    def local(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        parts = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

    def adopt(old: Weights | None, new: Params) -> Weights:
        for array in jax.tree.leaves(old):
            array.delete()
        with jax.set_mesh(every):
            return jax.tree.map(local, spread(None, new), layouts.weights)

    return adopt


def make_spread(model: ModelConfig, layouts: Layouts, trainer: Mesh) -> Callable[[Weights | None, Params], Weights]:
    """The jitted part of `make_adopt`; if the trainer's mesh spans several processes, each one gets a copy."""
    own = layouts.everywhere.mesh

    def convert(old: Weights | None, new: Params) -> Weights:
        new = new if layouts.rows is None else unstack(new)

        def cast(path: tuple, weight: jax.Array) -> jax.Array:
            return jnp.array(weight, weight_dtype(model, path[0].key), copy=True)

        return jax.tree_util.tree_map_with_path(cast, new)

    if own.size == trainer.size:
        return jax.jit(convert, donate_argnums=0, out_shardings=layouts.weights, keep_unused=True)
    every = _all_engines(own, trainer)
    return jax.jit(
        convert, out_shardings=jax.tree.map(lambda sharding: NamedSharding(every, sharding.spec), layouts.weights)
    )


def _layer_by_layer(model: ModelConfig, layouts: Layouts) -> Callable[[Weights | None, Params], Weights]:
    """`make_adopt` that cuts each layer's weights out of their stack by a call of a small program.

    One program for all layers would take as long to compile as a decode program.
    """
    wanted, structure = jax.tree.flatten_with_path(layouts.weights)

    def adopt(old: Weights | None, new: Params) -> Weights:
        given, taken = dict(jax.tree.flatten_with_path(new)[0]), []
        before = [None] * len(wanted) if old is None else jax.tree.leaves(old)
        for (path, sharding), used in zip(wanted, before, strict=True):
            name, layer = path[0].key, None
            if name == "layers":
                path, layer = (path[0], *path[2:]), np.int32(path[1].idx)
            taken.append(_cut(weight_dtype(model, name), sharding)(used, given[path], layer))
        return structure.unflatten(taken)

    return adopt


@lru_cache(maxsize=64)  # shared by all engines of a process
def _cut(dtype: str, sharding: NamedSharding) -> Callable[..., jax.Array]:
    """A jitted function that copies a weight, or one layer of its stack.

    It takes an array that it may overwrite or None, the weight, and the layer or None.
    """

    def take(old: jax.Array | None, new: jax.Array, layer: np.ndarray | None) -> jax.Array:
        own = new if layer is None else jax.lax.dynamic_index_in_dim(new, layer, keepdims=False)
        return jnp.array(own, dtype, copy=True)

    return jax.jit(take, donate_argnums=0, out_shardings=sharding, keep_unused=True)


def _all_engines(own: Mesh, trainer: Mesh) -> Mesh:
    """A mesh of all the trainer's devices, in which each process's engine is a part."""
    return Mesh(trainer.devices.reshape(-1, 1, own.shape["tp"]), own.axis_names)
