"""Rewards to advantages."""

import numpy as np


def group_relative(rewards: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """GRPO: (r - mean of the group) / (standard deviation of the group + eps), arXiv 2402.03300 eq. 4.1.2.

    Takes and returns one group [n] of samples of one prompt; the deviation is the population's. A group of equal
    rewards says nothing about which sample was better and gets zeros.
    """
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + eps)
