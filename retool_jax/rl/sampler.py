"""Which prompts are drawn from next: one stream of groups in one order, whatever becomes of those before.

A group is taken, drawn somewhere, and consumed: learned from or left out. Groups are consumed in the order in which
they were taken, so that a step's prompts do not depend on whose trajectories were short or whose tools were quick. A
checkpoint keeps where the first group that was not consumed stands; after a resume it and those behind it are taken
again, with the same requests.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

from retool_jax.data.problems import Problem, Problems
from retool_jax.rl.config import RLConfig
from retool_jax.rollout.reward import is_right
from retool_jax.rollout.rollout import Sample
from retool_jax.rollout.trajectory import Trajectory


class Group(NamedTuple):
    """The samples of one prompt. Groups of a run are numbered from 0, and sample m's request is number * n + m."""

    number: int
    problem: Problem
    samples: list[Sample]  # n = rl.group_size


@dataclass
class Record:
    """What became of a prompt so far; a trajectory that the machinery dropped has no part in it."""

    tried: int = 0  # trajectories
    right: int = 0
    streak: int = 0  # of its latest groups, those that were all right


class Sampler:
    """Gives out groups and remembers how prompts fared.

    Args:
        problems: the stream.
        rl: sizes, and how often in a row a prompt is solved before it is passed over (`groups.skip_solved`).
        state: of a checkpoint, as `state` gave it; None at the beginning of a run, and empty where a checkpoint keeps
            none, as that of a replay.
        step: that of such a checkpoint, of a run in which group g had problem g.
    """

    def __init__(self, problems: Problems, rl: RLConfig, state: dict | None = None, step: int = 0) -> None:
        if not state:
            behind = step * rl.prompts_per_step
            state = {"number": behind, "issued": [], "position": behind, "table": {}}
        self._problems = problems
        self._rl = rl
        self._number: int = state["number"]  # of the first group that was not consumed
        self._issued: list[int] = list(state["issued"])  # where in the stream it and those behind it stand
        self._position: int = state["position"]  # what comes behind all of them
        self._taken = 0  # of `issued`, from this object
        self._table = {id: Record(*counts) for id, counts in state["table"].items()}

    def take(self, count: int) -> list[Group]:
        """The next groups."""
        while len(self._issued) < self._taken + count:
            self._issued.append(self._next())
        first, self._taken = self._taken, self._taken + count
        return [self._group(self._number + i, self._issued[i]) for i in range(first, self._taken)]

    def consumed(self, group: Group, trajectories: Sequence[Trajectory]) -> None:
        """Note that a group is done with, in the order of `take`, and what its scored trajectories say of its prompt.

        Raises:
            ValueError: it is not the first of those that were taken.
        """
        if not self._taken or group.number != self._number:
            raise ValueError(f"group {group.number} was consumed out of its turn: the next one is {self._number}")
        del self._issued[0]
        self._number += 1
        self._taken -= 1
        right = [is_right(self._rl.reward, trajectory) for trajectory in trajectories if not trajectory.dropped]
        if right:
            record = self._table.setdefault(group.problem.id, Record())
            record.tried += len(right)
            record.right += sum(right)
            record.streak = record.streak + 1 if all(right) else 0

    def state(self) -> dict:
        """What a checkpoint keeps, as JSON; groups that are under way are in it as if they had not been taken."""
        return {
            "number": self._number,
            "issued": list(self._issued),
            "position": self._position,
            "table": {id: list(astuple(record)) for id, record in self._table.items()},
        }

    def _group(self, number: int, position: int) -> Group:
        problem, n = self._problems[position], self._rl.group_size
        requests = range(number * n, (number + 1) * n)
        return Group(number, problem, [Sample(problem, request, self._rl.temperature) for request in requests])

    def _next(self) -> int:
        """The next position whose prompt is not to be passed over.

        Where all prompts of a data set are, their streaks begin anew: the alternative to drawing from solved prompts
        would be to draw from none.
        """
        finite = self._problems.finite
        if finite is not None and all(self._solved(problem) for problem in finite):
            for record in self._table.values():
                record.streak = 0
        while self._solved(self._problems[self._position]):
            self._position += 1
        self._position += 1
        return self._position - 1

    def _solved(self, problem: Problem) -> bool:
        times = self._rl.groups.skip_solved
        record = self._table.get(problem.id)
        return bool(times) and record is not None and record.streak >= times
