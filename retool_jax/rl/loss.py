"""Policy losses, functions of a token's new and old log-probability and its advantage, and how they are averaged."""

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, TokenTerms
from retool_jax.rl.config import ClipConfig, RLConfig
from retool_jax.rl.correction import EXPONENT, TIS_CAP
from retool_jax.rl.divergence import divergence


def clipped_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip: ClipConfig
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate with asymmetric bounds and dual clip, per token.

        loss = -min(r A, clip(r, 1 - low, 1 + high) A),  and for A < 0 at most dual |A|;  r = exp(new - old)

    arXiv 1707.06347 eq. 7, 2503.14476 eq. 8 and 1912.09729 eq. 5. Returns the loss and whether a bound was active, both
    shaped like `logprobs`.
    """
    # exp(30) is above every bound and finite; an infinite ratio times an advantage of 0 would be NaN.
    ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, 30.0))
    bounded = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
    loss = -jnp.minimum(ratio * advantages, bounded * advantages)
    capped = jnp.where(advantages < 0, jnp.minimum(loss, -clip.dual * advantages), loss)
    return capped, (loss > -ratio * advantages) | (capped < loss)


def sequence_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip: ClipConfig, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """GSPO: `clipped_policy_loss` with the ratio of the whole sequence, s = exp(mean of new - old).

    The mean is over the sequence's sampled tokens (arXiv 2507.18071 eq. 7), so a bound clips all of them or none. This
    is the token form of eq. 14, s_t = sg(s) r_t / sg(r_t): its value is s, its gradient s times that of the token's own
    log-probability. The mean over a sequence has the gradient of eq. 10, and advantages may differ by token.
    """
    log_ratio = logprobs - old_logprobs
    shared = jax.lax.stop_gradient(sequence_means(log_ratio, batch))
    own = log_ratio - jax.lax.stop_gradient(log_ratio)  # its value is 0, its gradient is not
    return clipped_policy_loss(shared + own, jnp.zeros_like(shared), advantages, clip)


def truncated_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip: ClipConfig
) -> tuple[jax.Array, jax.Array]:
    """CISPO: -sg(clip(r, 1 - low, 1 + high)) A log p;  r = exp(new - old), and sg stops the gradient.

    arXiv 2506.13585 eq. 4 and 5: a bound limits the weight of a token, and every token keeps its gradient. `dual` is
    not used. Returns the loss and whether a bound was active.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(jnp.minimum(logprobs - old_logprobs, 30.0)))
    weight = jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
    return -weight * advantages * logprobs, weight != ratio


def sequence_means(values: jax.Array, batch: Batch) -> jax.Array:
    """For each token the mean of `values` [B,T] over the sampled tokens of its segment; 0 if the segment has none."""

    def total(x: jax.Array) -> jax.Array:
        def row(x: jax.Array, segments: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(x, segments, num_segments=x.shape[0] + 1)[segments]

        return jax.vmap(row)(jnp.where(batch.sampled, x, 0.0), jnp.asarray(batch.segments))

    return total(values) / jnp.maximum(total(jnp.ones_like(values)), 1.0)


def clipped_loss(outputs: Columns, batch: Batch, rl: RLConfig) -> TokenTerms:
    """The loss of GRPO, Dr. GRPO, RLOO, PPO and on-policy distillation: `clipped_policy_loss`, `completed`."""
    columns = batch.columns
    pair = clipped_policy_loss(outputs["logprobs"], columns["old_logprobs"], columns["advantages"], rl.clip)
    return completed(*pair, outputs, batch, rl)


def sequence_loss(outputs: Columns, batch: Batch, rl: RLConfig) -> TokenTerms:
    """GSPO's loss: `sequence_policy_loss`, `completed`."""
    columns = batch.columns
    pair = sequence_policy_loss(outputs["logprobs"], columns["old_logprobs"], columns["advantages"], rl.clip, batch)
    return completed(*pair, outputs, batch, rl)


def truncated_loss(outputs: Columns, batch: Batch, rl: RLConfig) -> TokenTerms:
    """CISPO's loss: `truncated_policy_loss`, `completed`."""
    columns = batch.columns
    pair = truncated_policy_loss(outputs["logprobs"], columns["old_logprobs"], columns["advantages"], rl.clip)
    return completed(*pair, outputs, batch, rl)


def completed(policy: jax.Array, clipped: jax.Array, outputs: Columns, batch: Batch, rl: RLConfig) -> TokenTerms:
    """A policy loss with the terms that a run may add to it, and the metrics.

        importance * policy + coefficient * KL(policy || reference) - entropy_coefficient * entropy

    Column "importance" is the weight of `rl.correction`. With rl.kl.place=reward the KL is already part of the
    advantages, so here it is only logged, as `kl`; so is the KL from a teacher, as `teacher_kl`. Logged means are over
    all sampled tokens, also those with an importance of 0.
    """
    logprobs, columns = outputs["logprobs"], batch.columns
    loss = policy * columns["importance"] if "importance" in columns else policy
    metrics = {"clip_fraction": clipped.astype(jnp.float32)}
    if "reference_logprobs" in columns:
        metrics["kl"] = divergence(logprobs, columns["reference_logprobs"], rl.kl.estimator)
        if rl.kl.place == "loss":
            loss = loss + rl.kl.coefficient * metrics["kl"]
    if "teacher_logprobs" in columns:
        metrics["teacher_kl"] = columns["old_logprobs"] - columns["teacher_logprobs"]
    if rl.entropy_coefficient:
        loss = loss - rl.entropy_coefficient * outputs["entropy"]
    if "engine_logprobs" in columns:  # the old ones are the trainer's
        difference = columns["old_logprobs"] - columns["engine_logprobs"]
    else:
        difference = logprobs - columns["old_logprobs"]
    return TokenTerms(loss, metrics | mismatch(difference), {"logprob_diff": jnp.abs(difference)})


def acts_on_all_tokens(rl: RLConfig) -> bool:
    """Whether `completed` adds a term that does not depend on advantages, so that a token without one learns, too."""
    return rl.entropy_coefficient > 0 or (rl.kl.coefficient > 0 and rl.kl.place == "loss")


def mismatch(difference: jax.Array) -> dict[str, jax.Array]:
    """How far the engine's policy is from the trainer's, from log p_trainer - log p_engine of the sampled tokens.

    The mean of `mismatch_k3` is KL(engine || trainer). The means of `mismatch_ratio`, w = p_trainer / p_engine, and of
    its square give the effective sample size, (mean w)^2 / mean w^2. `mismatch_clipped` is the share of tokens that the
    correction token_tis would cut, whichever correction the run uses.
    """
    ratio = jnp.exp(jnp.clip(difference, -EXPONENT, EXPONENT))
    return {
        "mismatch_k3": divergence(jnp.zeros_like(difference), difference, "k3"),
        "mismatch_ratio": ratio,
        "mismatch_ratio_squared": ratio * ratio,
        "mismatch_clipped": (ratio > TIS_CAP).astype(jnp.float32),
    }


def aggregation_weights(aggregation: str, lengths: np.ndarray, longest: int) -> np.ndarray | None:
    """The weight w of each trajectory's tokens in the mean over all sampled tokens of a batch.

    `lengths` [n] are the numbers of sampled tokens of the batch's trajectories, N is their sum, and `longest` is the
    number of tokens that a trajectory may have. The step computes sum(w loss) / N, so the loss of a batch becomes

    - token_mean: sum of all / N (DAPO, arXiv 2503.14476 eq. 8); returns None, since all weights are 1.
    - sequence_token_mean: mean over trajectories of the mean over their tokens (GRPO, arXiv 2402.03300 eq. 3).
    - sequence_token_sum: mean over trajectories of the sum over their tokens.
    - fixed: sum of all / (n longest), independent of the batch's lengths (Dr. GRPO, arXiv 2503.20783).

    Returns [n] float64. A trajectory without sampled tokens does not count in n.
    """
    tokens, count = int(np.sum(lengths)), max(np.count_nonzero(lengths), 1)
    if aggregation == "token_mean":
        return None
    if aggregation == "sequence_token_mean":
        return tokens / (count * np.maximum(lengths, 1))
    if aggregation == "sequence_token_sum":
        return np.full(len(lengths), tokens / count)
    if aggregation == "fixed":
        return np.full(len(lengths), tokens / (count * longest))
    raise ValueError(f"there is no aggregation {aggregation!r}")
