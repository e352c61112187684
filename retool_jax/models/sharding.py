"""The shardings of a model's weights, from their logical axes by the rules of `mesh.py`."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax import mesh as meshes
from retool_jax.errors import UserError
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, Weight, abstract_params


def is_weight(x: object) -> bool:
    """For `is_leaf` of JAX's tree functions, so that a `Weight` is a leaf instead of the array in it."""
    return isinstance(x, Weight)


def weight_sharding(mesh: Mesh, logical: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a weight of this shape; a `UserError` if a mesh axis does not divide its dimension."""
    result = meshes.sharding(mesh, *logical)
    for name, size, axis in zip(logical, shape, result.spec, strict=True):
        if axis and size % mesh.shape[axis]:
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} dimension of {size};"
                f" set mesh.{axis} to a divisor of {size}"
            )
    return result


def param_shardings(model: ModelConfig, mesh: Mesh, value_head: bool = False) -> Params:
    """Each weight's sharding by its logical axes; with `value_head`, those of a critic.

    Raises:
        UserError: a mesh axis does not divide the dimension that it splits.
    """
    _, abstract = abstract_params(model, value_head)
    return jax.tree.map(lambda w: w.replace(weight_sharding(mesh, w.logical, w.shape)), abstract, is_leaf=is_weight)


def unstacked_shardings(model: ModelConfig, mesh: Mesh) -> dict:
    """The shardings of the result of `decoder.unstack`."""
    shardings = param_shardings(model, mesh)
    one_layer = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), shardings["layers"])
    return {name: shardings[name] for name in shardings} | {"layers": (one_layer,) * model.num_layers}
