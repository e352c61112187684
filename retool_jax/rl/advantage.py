"""Rewards to advantages."""

from typing import NamedTuple

import numpy as np


class Scored(NamedTuple):
    """The n trajectories of a step that count, in the order in which they were issued."""

    rewards: np.ndarray  # [n] float64
    groups: np.ndarray  # [n] int, equal for the samples of one prompt
    sampled: list[np.ndarray]  # n of [T_i] bool
    columns: dict[str, list[np.ndarray]]  # n of [T_i] float32 each, 0 where not sampled: "old_logprobs", and "values",
    # "teacher_logprobs", "reference_logprobs" where there is such a model


def group_relative(rewards: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """GRPO: (r - mean of the group) / (standard deviation of the group + eps), arXiv 2402.03300 eq. 4.1.2.

    Takes and returns one group [n] of samples of one prompt; the deviation is the population's. A group of equal
    rewards says nothing about which sample was better and gets zeros.
    """
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + eps)
