"""Rewards to advantages: how much better each sampled token was than expected."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from retool_jax.rl.config import RLConfig, TeacherConfig
from retool_jax.rl.divergence import divergence


class Scored(NamedTuple):
    """The n trajectories of a step that are learned from, in the order in which their groups were given out."""

    rewards: np.ndarray  # [n] float64
    groups: np.ndarray  # [n] int, equal for the samples of one prompt
    sampled: list[np.ndarray]  # n of [T_i] bool
    columns: dict[str, list[np.ndarray]]  # n of [T_i] float32 each, 0 where not sampled: "old_logprobs", and
    # "values", "teacher_logprobs", "reference_logprobs" if the run has that model


# Columns by name, an array [T_i] float32 for each trajectory, 0 where not sampled.
Advantage = Callable[[Scored, RLConfig], dict[str, list[np.ndarray]]]


def group_relative(rewards: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """GRPO: (r - mean of the group) / (standard deviation of the group + eps), arXiv 2402.03300 eq. 4.1.2.

    Takes the rewards [n] of the samples of one prompt and returns their advantages [n]. The deviation is the
    population's. A group of equal rewards, or of one sample, gets exact zeros.
    """
    return group_centred(rewards) / (rewards.std() + eps)


def group_centred(rewards: np.ndarray) -> np.ndarray:
    """Dr. GRPO: r - mean of the group. It does not divide by the deviation, which favours very easy and hard prompts.

    arXiv 2503.20783. One group [n] to [n]; zeros where all rewards are equal.
    """
    if rewards.min() == rewards.max():
        return np.zeros(len(rewards))  # the mean of equal numbers may have a rounding error
    return rewards - rewards.mean()


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """RLOO: r - mean of the group's other samples, arXiv 2402.14740. One group [n] to [n]; a single sample gets 0."""
    n = len(rewards)
    return group_centred(rewards) * n / max(n - 1, 1)


def per_group(scored: Scored, of_group: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a function of one group's rewards to each group; one value for each trajectory, [n] float64."""
    values = np.zeros(len(scored.rewards))
    for group in np.unique(scored.groups):
        members = scored.groups == group
        values[members] = of_group(scored.rewards[members])
    return values


def by_group(of_group: Callable[[np.ndarray], np.ndarray]) -> Advantage:
    """The advantage that compares the samples of a prompt: one number for all tokens of a trajectory.

    With rl.kl.place=reward each token loses coefficient * its own divergence from the reference.
    """

    def advantage(scored: Scored, rl: RLConfig) -> dict[str, list[np.ndarray]]:
        values = zip(per_group(scored, of_group), penalties(scored, rl), strict=True)
        return {"advantages": _as_columns([value - penalty for value, penalty in values], scored.sampled)}

    return advantage


def distilled(scored: Scored, rl: RLConfig) -> dict[str, list[np.ndarray]]:
    """On-policy distillation: A + c (log p_teacher - log p_old) for each token.

    A is the trajectory's `group_relative` and c its `teacher_coefficient`. The mean of the second term over tokens that
    the policy samples is -c KL(policy || teacher), so the policy moves towards the teacher on its own samples
    (arXiv 2306.13649; thinkingmachines.ai/blog/on-policy-distillation).
    """
    advantages = []
    teacher_logprobs, old_logprobs = _float64(scored, "teacher_logprobs"), _float64(scored, "old_logprobs")
    parts = per_group(scored, group_relative), penalties(scored, rl), teacher_logprobs, old_logprobs
    for value, penalty, teacher, old in zip(*parts, strict=True):
        advantages.append(value + teacher_coefficient(rl.teacher, value) * (teacher - old) - penalty)
    return {"advantages": _as_columns(advantages, scored.sampled)}


def teacher_coefficient(teacher: TeacherConfig, advantage: float) -> float:
    """The weight of the teacher's term in a trajectory whose answer has this advantage A.

    plain: `coefficient`. gated: low + (high - low) sigmoid(-slope A), which is largest for wrong answers
    (github.com/YoungZ365/SOD, token_kl_reg).
    """
    if teacher.form == "plain":
        return teacher.coefficient
    gate = (1.0 - np.tanh(teacher.gate_slope * advantage / 2)) / 2  # sigmoid(-x), which cannot overflow in this form
    return float(teacher.gate_low + (teacher.gate_high - teacher.gate_low) * gate)


def generalised(scored: Scored, rl: RLConfig) -> dict[str, list[np.ndarray]]:
    """PPO's advantages by `gae`, then `whitened` over the step, and the "returns" that the critic learns.

    The last sampled token gets the trajectory's reward. With rl.kl.place=reward, coefficient * the divergence from the
    reference is subtracted from each token's reward.
    """
    advantages, returns = [], []
    parts = zip(scored.rewards, penalties(scored, rl), scored.sampled, _float64(scored, "values"), strict=True)
    for reward, penalty, sampled, values in parts:
        rewards = np.zeros(len(sampled)) - penalty
        rewards[np.flatnonzero(sampled)[-1:]] += reward
        advantage = gae(rewards, values, sampled, rl.discount, rl.gae_lambda)
        advantages.append(advantage)
        returns.append(advantage + values)
    return {
        "advantages": _as_columns(whitened(advantages, scored.sampled), scored.sampled),
        "returns": _as_columns(returns, scored.sampled),
    }


def gae(rewards: np.ndarray, values: np.ndarray, sampled: np.ndarray, discount: float, lam: float) -> np.ndarray:
    """Generalised advantage estimates over the sampled tokens alone, arXiv 1506.02438 eq. 16.

        A_t = delta_t + discount lam A_next,  delta_t = r_t + discount V_next - V_t

    All arrays are [T]; V_t is the value of the prefix before token t. "next" is the next sampled token, and after the
    last one V and A are 0. Tokens that were not sampled are not actions, so they are skipped and get 0 (verl's
    compute_gae_advantage_return).
    """
    at = np.flatnonzero(sampled)
    next_values = np.append(values[at], 0.0)[1:]
    deltas = rewards[at] + discount * next_values - values[at]
    running, sums = 0.0, []
    for delta in reversed(deltas.tolist()):
        running = delta + discount * lam * running
        sums.append(running)
    advantages = np.zeros(len(sampled))
    advantages[at] = sums[::-1]
    return advantages


def whitened(values: Sequence[np.ndarray], sampled: Sequence[np.ndarray], eps: float = 1e-8) -> list[np.ndarray]:
    """(x - mean) / sqrt(variance + eps) over all sampled tokens of all trajectories; 0 elsewhere.

    The variance has Bessel's correction, as verl's masked_whiten; a single token gets 0.
    """
    pooled = np.concatenate([x[at] for x, at in zip(values, sampled, strict=True)] or [np.zeros(0)])
    if len(pooled) < 2:
        return [np.zeros(len(x)) for x in values]
    mean, scale = pooled.mean(), np.sqrt(pooled.var(ddof=1) + eps)
    return [np.where(at, (x - mean) / scale, 0.0) for x, at in zip(values, sampled, strict=True)]


def penalties(scored: Scored, rl: RLConfig) -> list[np.ndarray | float]:
    """The KL penalty of each token of each trajectory, [T_i]; 0 unless rl.kl.place=reward."""
    if not rl.kl.coefficient or rl.kl.place != "reward":
        return [0.0] * len(scored.rewards)
    pairs = zip(_float64(scored, "old_logprobs"), _float64(scored, "reference_logprobs"), strict=True)
    return [rl.kl.coefficient * divergence(old, reference, rl.kl.estimator) for old, reference in pairs]


def _float64(scored: Scored, name: str) -> list[np.ndarray]:
    """A column in float64, 0 where not sampled."""
    pairs = zip(scored.columns[name], scored.sampled, strict=True)
    return [np.where(sampled, x, 0.0).astype(np.float64) for x, sampled in pairs]


def _as_columns(values: Sequence[np.ndarray | float], sampled: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Values of each trajectory, or of each of its tokens, as columns [T_i] float32 that are 0 where not sampled."""
    return [np.where(at, x, 0.0).astype(np.float32) for x, at in zip(values, sampled, strict=True)]
