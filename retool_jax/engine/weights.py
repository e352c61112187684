"""The way of new weights from a trainer's mesh to an engine's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from retool_jax.engine.compiled import Layouts
from retool_jax.models.config import ModelConfig
from retool_jax.models.transformer import Params, unstack

Weights = Params | dict  # a dict where the layers are unstacked


def make_adopt(model: ModelConfig, layouts: Layouts) -> Callable[[Weights | None, Params], Weights]:
    """A jitted function from (old weights or None, the trainer's) to the engine's own copy, resharded and cast.

    The old weights' memory takes the new ones, so that there is no second copy on the device. The new ones are copied
    even where nothing changes, since the trainer's next update consumes its own arrays.
    """

    def adopt(old: Weights | None, new: Params) -> Weights:
        new = new if layouts.rows is None else unstack(new)
        return jax.tree.map(lambda x: jnp.array(x, model.compute_dtype, copy=True), new)

    return jax.jit(adopt, donate_argnums=0, out_shardings=layouts.weights, keep_unused=True)
