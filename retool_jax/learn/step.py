"""One jitted update for every kind of training: accumulate gradients over micro-batches, then step the optimiser.

SFT and RL differ in one pure function, the loss of a token. Its mean is taken over all sampled tokens of the whole
batch, so the gradient does not depend on how the batch was packed, cut into micro-batches or spread over devices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState, learning_rate, make_optimizer, state_shardings
from retool_jax.learn.packing import PackedBatch
from retool_jax.models import transformer
from retool_jax.models.config import ModelConfig
from retool_jax.models.head import given_logprobs
from retool_jax.models.transformer import Params


class TokenTerms(NamedTuple):
    """What a loss says about every token of a micro-batch; values outside the sampled tokens are ignored."""

    loss: jax.Array  # [B,T], minimised
    metrics: dict[str, jax.Array]  # [B,T] each, logged as means over sampled tokens


TokenLoss = Callable[[jax.Array, jax.Array, PackedBatch], TokenTerms]
Update = Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, jax.Array]]]


def token_logprobs(
    model: ModelConfig, params: Params, batch: PackedBatch, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token given those before it in its segment, and the entropy it was drawn from.

    Both [B,T] fp32, aligned with `batch.tokens`; the first token of a segment has none and gets 0.
    """
    hidden = transformer.forward(model, params, batch.tokens, batch.positions, batch.segments)
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
