"""PPO's critic: the policy's backbone with one output, the expected return from each token's prefix."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState, fresh_state, state_shardings
from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, Metrics, Outputs, Step, TokenLoss, TokenTerms, make_step
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, abstract_params

LEAST_VARIANCE = 1e-8  # of returns; below it they count as constant


def critic_params(model: ModelConfig, policy_params: Params) -> Params:
    """A copy of a policy's weights without an untied vocabulary head, and a value head of zeros."""
    policy = dict(jax.tree_util.tree_leaves_with_path(policy_params))

    def start(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.array(policy[path], copy=True) if path in policy else jnp.zeros(like.shape, like.dtype)

    return jax.tree_util.tree_map_with_path(start, abstract_params(model, value_head=True)[1])


def begin_critic(policy_params: Params, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The state of a critic at step 0, sharded; the policy's weights are copied, not donated."""

    def create(policy_params: Params) -> TrainState:
        return fresh_state(critic_params(model, policy_params), optimizer)

    return jax.jit(create, out_shardings=state_shardings(model, optimizer, mesh, value_head=True))(policy_params)


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, value_clip: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's value loss with the new value v kept within c = `value_clip` of the old one, per token; c = 0: no bound.

        loss = 1/2 max((v - R)^2, (clip(v, old - c, old + c) - R)^2)

    From OpenAI's ppo2, described in arXiv 2005.12729 section 3. Returns the loss and whether the bound was active, both
    shaped like `values`.
    """
    plain = jnp.square(values - returns)
    if not value_clip:
        return 0.5 * plain, jnp.zeros(values.shape, bool)
    bounded = jnp.square(jnp.clip(values, old_values - value_clip, old_values + value_clip) - returns)
    return 0.5 * jnp.maximum(plain, bounded), bounded > plain


def value_token_loss(value_clip: float) -> TokenLoss:
    """The critic's loss for `learn.step.make_step`; it reads the columns `returns` and `old_values`."""

    def loss(outputs: Columns, batch: Batch) -> TokenTerms:
        values, returns = outputs["values"], batch.columns["returns"]
        value, clipped = clipped_value_loss(values, batch.columns["old_values"], returns, value_clip)
        metrics = {"values_mean": values, "value_clip_fraction": clipped.astype(jnp.float32)}
        return TokenTerms(value, metrics, {"returns": returns, "errors": returns - values})

    return loss


def explained_variance(errors_std: jax.Array, returns_std: jax.Array) -> jax.Array:
    """1 - var(R - v) / var(R): 1 for a perfect critic, 0 for a constant one, and 0 if all returns are equal."""
    variance = jnp.square(returns_std)
    share = jnp.square(errors_std) / jnp.maximum(variance, LEAST_VARIANCE)
    return jnp.where(variance > LEAST_VARIANCE, 1.0 - share, 0.0)


def _critic_metrics(metrics: Metrics) -> Metrics:
    """The logged metrics of a critic's step, with the prefix "critic/"."""
    shown = ("values_mean", "value_clip_fraction", "returns_mean", "grad_norm", "learning_rate", "update_skipped")
    return {f"critic/{name}": metrics[name] for name in shown} | {
        "critic/value_loss": metrics["loss"],
        "critic/explained_variance": explained_variance(metrics["errors_std"], metrics["returns_std"]),
    }


def make_critic_step(model: ModelConfig, value_clip: float, optimizer: OptimizerConfig, mesh: Mesh) -> Step:
    """The step of a critic, on batches with the columns `returns` and `old_values`."""
    return make_step(Outputs(model, ("values",)), value_token_loss(value_clip), optimizer, mesh, _critic_metrics)
