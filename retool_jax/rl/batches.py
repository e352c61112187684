"""Scored trajectories to packed batches, one per optimiser step, with per-token values as columns."""

from collections.abc import Mapping, Sequence

import numpy as np

from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.learn.step import WEIGHTS
from retool_jax.rl.advantage import Scored
from retool_jax.rl.config import RLConfig
from retool_jax.rl.loss import aggregation_weights
from retool_jax.rollout.trajectory import Trajectory

Columns = Mapping[str, Sequence[np.ndarray]]  # by name, an array [T_i] for each trajectory


def kept_and_groups(trajectories: Sequence[Trajectory], group_size: int) -> tuple[list[Trajectory], np.ndarray]:
    """The trajectories to learn from, which are all but the dropped ones, and the group number of each."""
    pairs = [(t, index // group_size) for index, t in enumerate(trajectories) if not t.dropped]
    return [t for t, _ in pairs], np.array([group for _, group in pairs], np.int64)


def scored_of(kept: Sequence[Trajectory], groups: np.ndarray, columns: Columns) -> Scored:
    """The input of the advantage functions."""
    rewards = np.array([t.reward for t in kept], np.float64)
    return Scored(rewards, groups, [np.array(t.sampled, bool) for t in kept], dict(columns))


def batches_of(
    rl: RLConfig,
    kept: Sequence[Trajectory],
    groups: np.ndarray,
    columns: Columns,
    chosen: Sequence[bool],
    aggregation: str,
    longest: int,
    share_prefixes: bool = False,
) -> list[Batch]:
    """Pack the chosen trajectories, with these columns, into one batch per optimiser step; groups stay whole.

    All batches have the same shape, so one compiled update serves them all.
    """
    rows = rl.prompts_per_step // rl.minibatches * rl.group_size  # the worst case: one row for each trajectory
    limit = -(-rows // rl.rows_per_micro)
    members = [[i for i in np.flatnonzero(groups == group) if chosen[i]] for group in dict.fromkeys(groups.tolist())]
    members = [group for group in members if group]
    dealt = [[i for group in members[part :: rl.minibatches] for i in group] for part in range(rl.minibatches)]
    batches = []
    for part in filter(None, dealt):
        weights = aggregation_weights(aggregation, np.array([sum(kept[i].sampled) for i in part]), longest)
        examples = []
        for place, i in enumerate(part):
            own = {name: values[i] for name, values in columns.items()}
            if weights is not None:
                own[WEIGHTS] = np.full(len(kept[i].ids), weights[place])
            examples.append(Example(kept[i].ids, kept[i].sampled, own))
        batches.append(pack(examples, rl.row_length, rl.rows_per_micro, limit, share_prefixes))
    return batches
