"""Scored trajectories to packed batches: advantages within groups, and one batch per optimiser step."""

from collections.abc import Sequence

import numpy as np

from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.rl.advantage import group_relative
from retool_jax.rl.config import RLConfig
from retool_jax.rl.trajectory import Trajectory


def learnable_groups(trajectories: Sequence[Trajectory], group_size: int) -> list[list[Example]]:
    """Groups with their advantages, without what cannot teach.

    A trajectory that the machinery dropped is no signal about the policy. A group of equal rewards has
    zero advantage everywhere and is left out of the batch, so the token mean is over tokens that carry a gradient.
    """
    groups = []
    for first in range(0, len(trajectories), group_size):
        kept = [t for t in trajectories[first : first + group_size] if not t.dropped]
        rewards = np.array([t.reward for t in kept])
        if len(kept) > 1 and rewards.std() > 0:
            pairs = zip(kept, group_relative(rewards), strict=True)
            groups.append([trajectory.example(float(advantage)) for trajectory, advantage in pairs])
    return groups


def batches_of(rl: RLConfig, groups: list[list[Example]]) -> list[Batch]:
    """One packed batch per optimiser step; every one has the same shape, so one compiled update serves all."""
    rows = rl.prompts_per_step // rl.minibatches * rl.group_size  # at worst each trajectory fills a row
    limit = -(-rows // rl.rows_per_micro)
    dealt = [[e for group in groups[i :: rl.minibatches] for e in group] for i in range(rl.minibatches)]
    return [pack(examples, rl.row_length, rl.rows_per_micro, limit) for examples in dealt if examples]
