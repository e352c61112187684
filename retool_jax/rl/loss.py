"""Policy losses: pure functions of a token's new and old log-probability and its advantage."""

import jax
import jax.numpy as jnp

from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, TokenLoss, TokenTerms
from retool_jax.rl.config import ClipConfig


def clipped_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip: ClipConfig
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate with asymmetric bounds and dual clip, per token.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A),  and for A < 0 at most dual |A|;  r = exp(new - old)

    Returns the loss and whether a bound was active, both shaped like `logprobs`.
    """
    ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, 30.0))  # beyond every bound, and finite: inf * 0 is NaN
    bounded = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
    loss = -jnp.minimum(ratio * advantages, bounded * advantages)
    capped = jnp.where(advantages < 0, jnp.minimum(loss, -clip.dual * advantages), loss)
    return capped, (loss > -ratio * advantages) | (capped < loss)


def policy_token_loss(clip: ClipConfig) -> TokenLoss:
    """The GRPO/DAPO loss for `learn.step.make_step`, of the columns `old_logprobs` and `advantages`.

    Old log-probabilities are the engine's, from sampling time.
    """

    def loss(outputs: Columns, batch: Batch) -> TokenTerms:
        logprobs, old_logprobs = outputs["logprobs"], batch.columns["old_logprobs"]
        value, clipped = clipped_policy_loss(logprobs, old_logprobs, batch.columns["advantages"], clip)
        off = jnp.abs(logprobs - old_logprobs)
        return TokenTerms(value, {"clip_fraction": clipped.astype(jnp.float32), "logprob_diff_mean": off})

    return loss
