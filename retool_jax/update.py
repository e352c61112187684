"""One jitted update for every kind of training: accumulate gradients over micro-batches, then step the optimiser.

SFT and RL differ in one pure function, the loss of a token. Its mean is taken over all sampled tokens of the whole
batch, so the gradient does not depend on how the batch was packed, cut into micro-batches or spread over devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.data.packing import PackedBatch
from retool_jax.models import decoder
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.head import given_logprobs
from retool_jax.models.sharding import is_weight, param_shardings


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW behind a clip of the global gradient norm."""

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay_steps: int = 0  # cosine from the end of the warm-up over this many steps; 0 keeps the rate constant
    final_fraction: float = 0.1  # of the learning rate, where the cosine ends
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


class TrainState(NamedTuple):
    """Everything that an update changes; donated to it."""

    step: jax.Array  # int32: optimiser steps taken
    params: Params
    opt_state: optax.OptState


class TokenTerms(NamedTuple):
    """What a loss says about every token of a micro-batch; values outside the sampled tokens are ignored."""

    loss: jax.Array  # [B,T], minimised
    metrics: dict[str, jax.Array]  # [B,T] each, logged as means over sampled tokens


TokenLoss = Callable[[jax.Array, jax.Array, PackedBatch], TokenTerms]
Update = Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, jax.Array]]]


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
    """AdamW (arXiv 1711.05101) on clipped gradients; weight decay acts on matrices only, not on norms and biases."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=partial(jax.tree.map, lambda w: w.replace(_is_matrix(w)), is_leaf=is_weight),
        ),
    )


def _is_matrix(weight: decoder.Weight) -> bool:
    """By its logical axes, not its rank: a stack of biases [L,K,H] is of rank 3, and heads x head_dim is one axis."""
    return len(set(weight.logical) - {"layers", "head_dim"}) > 1


def init_state(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, seed: int) -> TrainState:
    """Random weights and a fresh optimiser, created in shards."""

    def create() -> TrainState:
        params = decoder.init_params(model, jax.random.key(seed))
        return fresh_state(params, optimizer)

    return jax.jit(create, out_shardings=state_shardings(model, optimizer, mesh))()


def fresh_state(params: Params, optimizer: OptimizerConfig) -> TrainState:
    """Step 0 of training these weights."""
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer).init(params))


def begin_from(params: Params, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Step 0 of training weights that exist already, in their shards. They are consumed: the state has them now."""
    shardings = state_shardings(model, optimizer, mesh)
    return jax.jit(partial(fresh_state, optimizer=optimizer), out_shardings=shardings, donate_argnums=0)(params)


def state_shardings(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shardings of a whole train state: moments like their weights, counters replicated."""
    params = param_shardings(model, mesh)
    abstract = jax.eval_shape(partial(fresh_state, optimizer=optimizer), decoder.abstract_params(model)[1])
    everywhere = meshes.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        make_optimizer(optimizer),
        lambda _, like: like,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, opt_state)


def token_logprobs(
    model: ModelConfig, params: Params, batch: PackedBatch, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token given those before it in its segment, and the entropy it was drawn from.

    Both [B,T] fp32, aligned with `batch.tokens`; the first token of a segment has none and gets 0.
    """
    hidden = decoder.forward(model, params, batch.tokens, batch.positions, batch.segments)
    chosen, entropy = given_logprobs(model, params, hidden[:, :-1], batch.tokens[:, 1:], temperature)

    def align(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.where(batch.positions[:, 1:] > 0, x, 0.0), ((0, 0), (1, 0)))

    return align(chosen), align(entropy)


def loss_and_gradient(
    model: ModelConfig, token_loss: TokenLoss, params: Params, batch: PackedBatch, temperature: float = 1.0
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient and metrics of the global token mean: sum over sampled tokens / number of sampled tokens.

    Micro-batches are visited by a loop of dynamic length, so memory is one micro-batch's and empty ones cost nothing.
    """
    tokens = jnp.maximum(jnp.sum(batch.sampled), 1).astype(jnp.float32)

    def micro_loss(params: Params, micro: PackedBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        def keep(x: jax.Array) -> jax.Array:
            return jnp.where(micro.sampled, x, 0.0)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(keep(x)) / tokens

        # The loss's inputs are masked too: behind a mask on its value alone, 0 * NaN still reaches the gradient.
        logprobs, entropy = map(keep, token_logprobs(model, params, micro, temperature))
        visible = micro._replace(logprobs=keep(micro.logprobs), advantages=keep(micro.advantages))
        terms = token_loss(logprobs, entropy, visible)

        loss = mean(terms.loss)
        return loss, {"loss": loss, "entropy": mean(entropy)} | {k: mean(x) for k, x in terms.metrics.items()}

    def at(index: jax.Array) -> PackedBatch:
        arrays = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in batch[:-1])
        return PackedBatch(*(meshes.constrain(x, "batch", "length") for x in arrays), batch.micro_batches)

    def body(index: jax.Array, total: tuple) -> tuple:
        (_, metrics), gradient = jax.value_and_grad(micro_loss, has_aux=True)(params, at(index))
        return jax.tree.map(jnp.add, total, (gradient, metrics))

    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: jax.value_and_grad(micro_loss, has_aux=True)(params, at(0))),
    )
    gradient, metrics = jax.lax.fori_loop(0, batch.micro_batches, body, (zeros[1], zeros[0][1]))
    return gradient, metrics


def make_update(
    model: ModelConfig, optimizer: OptimizerConfig, token_loss: TokenLoss, mesh: Mesh, temperature: float = 1.0
) -> Update:
    """The compiled update: (state, batch) to (state, metrics as fp32 scalars). The old state is consumed."""
    schedule = learning_rate(optimizer)

    def update(state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, metrics = loss_and_gradient(model, token_loss, state.params, batch, temperature)
        updates, opt_state = make_optimizer(optimizer).update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradient), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, opt_state), metrics

    rows = meshes.sharding(mesh, "micro", "batch", "length")
    everywhere = meshes.replicated(mesh)
    shardings = state_shardings(model, optimizer, mesh)
    compiled = jax.jit(
        update,
        in_shardings=(shardings, PackedBatch(*[rows] * 6, everywhere)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )

    def call(state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(mesh):
            return compiled(state, batch)

    return call
