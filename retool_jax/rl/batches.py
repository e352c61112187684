"""Scored trajectories to packed batches: what is known of their tokens as columns, one batch per optimiser step."""

from collections.abc import Mapping, Sequence

import numpy as np

from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.rl.advantage import Scored
from retool_jax.rl.config import RLConfig
from retool_jax.rl.loss import aggregation_weights
from retool_jax.rollout.trajectory import Trajectory

Columns = Mapping[str, Sequence[np.ndarray]]  # by name, an array [T_i] for each trajectory


def counted(trajectories: Sequence[Trajectory], group_size: int) -> tuple[list[Trajectory], np.ndarray]:
    """The trajectories that say something about the policy, and the number of each one's group.

    What the machinery dropped has no part in anything that is learned.
    """
    pairs = [(t, index // group_size) for index, t in enumerate(trajectories) if not t.dropped]
    return [t for t, _ in pairs], np.array([group for _, group in pairs], np.int64)


def scored_of(kept: Sequence[Trajectory], groups: np.ndarray, columns: Columns) -> Scored:
    """What advantages are computed from."""
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
    """One packed batch per optimiser step, with these columns, of the chosen trajectories; whole groups are dealt out.

    Every one has the same shape, so that one compiled update serves all.
    """
    rows = rl.prompts_per_step // rl.minibatches * rl.group_size  # at worst each trajectory fills a row
    limit = -(-rows // rl.rows_per_micro)
    members = [[i for i in np.flatnonzero(groups == group) if chosen[i]] for group in dict.fromkeys(groups.tolist())]
    members = [group for group in members if group]
    dealt = [[i for group in members[part :: rl.minibatches] for i in group] for part in range(rl.minibatches)]
    batches = []
    for part in filter(None, dealt):
        told = [{name: values[i] for name, values in columns.items()} for i in part]
        weights = aggregation_weights(aggregation, np.array([sum(kept[i].sampled) for i in part]), longest)
        if weights is not None:
            told = [
                row | {"weights": np.full(len(kept[i].ids), w)} for i, row, w in zip(part, told, weights, strict=True)
            ]
        examples = [Example(kept[i].ids, kept[i].sampled, row) for i, row in zip(part, told, strict=True)]
        batches.append(pack(examples, rl.row_length, rl.rows_per_micro, limit, share_prefixes))
    return batches
