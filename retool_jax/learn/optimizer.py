"""The optimiser, the train state, and the shardings of its parts."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from retool_jax import mesh as meshes
from retool_jax.checkpoint import abstract_like
from retool_jax.learn.config import OptimizerConfig
from retool_jax.models import decoder
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.sharding import is_weight, param_shardings


class TrainState(NamedTuple):
    """Everything that an update changes; it is donated to the update."""

    step: jax.Array  # int32: optimiser steps taken
    params: Params
    opt_state: optax.OptState


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up, then constant or cosine."""
    peak = config.learning_rate
    if config.decay_steps:
        after = optax.cosine_decay_schedule(peak, config.decay_steps, alpha=config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) or Muon on clipped gradients.

    Weight decay acts on matrices only, not on norms and biases.
    """
    optimizer = optax.chain(
        _direction(config),
        optax.add_decayed_weights(
            config.weight_decay, partial(jax.tree.map, lambda w: w.replace(_is_matrix(w)), is_leaf=is_weight)
        ),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), stored_in(config.moment_dtype, optimizer))


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """The change of the weights per unit of learning rate: Adam's, and with `name=muon` Muon's for layers' matrices.

    Muon (https://kellerjordan.github.io/posts/muon) is a momentum whose singular values are all set to about one. It is
    scaled so that a weight's change has the root mean square that it has under AdamW (arXiv 2502.16982, section 2.2),
    and one learning rate fits both. Embedding, head, norms and biases stay with Adam, as in both sources, here with
    Nesterov's momentum for all, as in `optax.contrib.muon`.
    """
    if config.name == "adamw":
        return optax.scale_by_adam(config.b1, config.b2)
    adam = optax.scale_by_adam(config.b1, config.b2, nesterov=True)
    muon = optax.chain(scale_by_muon(weight_dimension_numbers=_muon_axes), optax.stateless(_scale_as_adam))

    def labels(params: Params) -> Params:
        return jax.tree.map(lambda w: w.replace("muon" if _is_muons(w) else "adam"), params, is_leaf=is_weight)

    return optax.partition({"muon": muon, "adam": adam}, labels)


def _is_muons(weight: decoder.Weight) -> bool:
    return "layers" in weight.logical and _is_matrix(weight)


def _muon_axes(weights: Params) -> Params:
    """Which axes are rows and which are columns; an axis of layers counts matrices. Heads x head_dim is one side."""

    def axes(weight: decoder.Weight) -> decoder.Weight:
        if not _is_muons(weight):
            return weight  # optax.partition has masked it
        inner = weight.logical.index("embed")
        outer = [axis for axis, name in enumerate(weight.logical) if name not in ("layers", "embed")]
        return weight.replace(MuonDimensionNumbers((inner,), tuple(outer)))

    return jax.tree.map(axes, weights, is_leaf=is_weight)


def _scale_as_adam(updates: Params, _: Params | None) -> Params:
    """Orthogonal [m,n] has a root mean square of 1 / sqrt(max(m, n)), and a step of AdamW one of about 0.2."""

    def scale(update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        sides = [math.prod(update.shape[axis] for axis in side) for side in axes]
        return update * (0.2 * math.sqrt(max(sides)))

    return jax.tree.map(scale, updates, _muon_axes(updates))


def stored_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, which keeps its moments in `dtype` between steps and computes them in fp32.

    The state has the structure of the inner state. Values that are not moments, such as a step count, keep their type.
    """

    def cast(state: optax.OptState, dtype: str) -> optax.OptState:
        return optax.tree_utils.tree_map_params(inner, lambda x: x.astype(dtype), state)

    def init(params: Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(gradient: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        updates, state = inner.update(gradient, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _is_matrix(weight: decoder.Weight) -> bool:
    """By logical axes, not by rank: a stack of biases [L,K,H] has rank 3, and heads x head_dim counts as one axis."""
    return len(set(weight.logical) - {"layers", "head_dim"}) > 1


def init_state(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, seed: int) -> TrainState:
    """Random weights and a fresh optimiser state, created sharded."""

    def create() -> TrainState:
        params = decoder.init_params(model, jax.random.key(seed))
        return fresh_state(params, optimizer)

    return jax.jit(create, out_shardings=state_shardings(model, optimizer, mesh))()


def fresh_state(params: Params, optimizer: OptimizerConfig) -> TrainState:
    """The train state of these weights at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer).init(params))


def begin_from(params: Params, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The sharded train state of existing weights at step 0. The weights are donated."""
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(partial(fresh_state, optimizer=optimizer), out_shardings=shardings, donate_argnums=0)(params)


def abstract_state(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, value_head: bool = False) -> TrainState:
    """Shapes and shardings of a train state, to restore a checkpoint into; with `value_head`, those of a critic."""
    return abstract_like(_shapes(model, optimizer, value_head), state_shardings(model, optimizer, mesh, value_head))


def _shapes(model: ModelConfig, optimizer: OptimizerConfig, value_head: bool) -> TrainState:
    return jax.eval_shape(partial(fresh_state, optimizer=optimizer), decoder.abstract_params(model, value_head)[1])


def state_shardings(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, value_head: bool = False) -> TrainState:
    """The shardings of a train state: moments like their weights, counters replicated."""

    def is_masked(moment: object) -> bool:
        return isinstance(moment, optax.MaskedNode)  # Adam keeps none of Muon's weights, and the other way round

    params = param_shardings(model, mesh, value_head)
    everywhere = meshes.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        make_optimizer(optimizer),
        lambda moment, like: moment if is_masked(moment) else like,
        _shapes(model, optimizer, value_head).opt_state,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=is_masked,
    )
    return TrainState(everywhere, params, opt_state)
