"""The way of new weights from a trainer's mesh to an engine's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from retool_jax.engine.compiled import Layouts
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, unstack, weight_dtype

Weights = Params | dict  # a dict where the layers are unstacked


def make_adopt(model: ModelConfig, layouts: Layouts, trainer: Mesh) -> Callable[[Weights | None, Params], Weights]:
    """A function from (old weights or None, the trainer's) to the engine's own copy, resharded and cast.

    The old weights' memory takes the new ones, so that there is no second copy on the device. The new ones are copied
    even where nothing changes, since the trainer's next update consumes its own arrays. Where the trainer's mesh spans
    several processes, all of them call it at the same time; one program lays the weights out on every process's
    devices as its engine wants them, and each engine takes the parts that lie on its own.
    """
    own = layouts.everywhere.mesh
    spread = make_spread(model, layouts, trainer)
    if own.size == trainer.size:
        return spread
    every = _every(own, trainer)

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
    """The jitted part of `make_adopt`: where the trainer has other devices too, each of their hosts gets a copy."""
    own = layouts.everywhere.mesh

    def convert(old: Weights | None, new: Params) -> Weights:
        new = new if layouts.rows is None else unstack(new)

        def cast(path: tuple, weight: jax.Array) -> jax.Array:
            return jnp.array(weight, weight_dtype(model, path[0].key), copy=True)

        return jax.tree_util.tree_map_with_path(cast, new)

    if own.size == trainer.size:
        return jax.jit(convert, donate_argnums=0, out_shardings=layouts.weights, keep_unused=True)
    every = _every(own, trainer)
    return jax.jit(
        convert, out_shardings=jax.tree.map(lambda sharding: NamedSharding(every, sharding.spec), layouts.weights)
    )


def _every(own: Mesh, trainer: Mesh) -> Mesh:
    """The trainer's devices as engines side by side."""
    return Mesh(trainer.devices.reshape(-1, 1, own.shape["tp"]), own.axis_names)
