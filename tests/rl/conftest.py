"""What the tests of rollouts and rewards share."""

from collections.abc import Callable, Sequence

import pytest

from retool_jax.rl.algorithms import ALGORITHMS
from retool_jax.rl.batches import counted, scored_of
from retool_jax.rl.config import RLConfig
from retool_jax.rl.trajectory import Trajectory


@pytest.fixture(scope="session")
def advantages() -> Callable[[Sequence[Trajectory], int], list[list[float]]]:
    """The advantages that GRPO gives to trajectories, by group: of those that say something, in groups that teach."""

    def of(trajectories: Sequence[Trajectory], group_size: int) -> list[list[float]]:
        kept, groups = counted(trajectories, group_size)
        columns = ALGORITHMS["grpo"].advantage(scored_of(kept, groups, {}), RLConfig())["advantages"]
        found: dict[int, list[float]] = {}
        for trajectory, group, values in zip(kept, groups.tolist(), columns, strict=True):
            if values.any():
                found.setdefault(group, []).append(float(values[trajectory.sampled][0]))
        return list(found.values())

    return of
