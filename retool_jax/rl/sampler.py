"""Which prompts come next: one stream of groups in a fixed order.

A group is taken, sampled, and then consumed: learned from or left out. Groups are consumed in the order in which they
were taken, so a step's prompts do not depend on which trajectories were short or which tools were fast. A checkpoint
keeps the position of the first group that was not consumed. After a resume, that group and all later ones are taken
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
    """The samples of one prompt. The groups of a run are numbered from 0; the request of sample m is number * n + m."""

    number: int
    problem: Problem
    samples: list[Sample]  # n = rl.group_size


@dataclass
class PromptResults:
    """The results of a prompt so far; dropped trajectories do not count."""

    tried: int = 0  # trajectories
    right: int = 0
    streak: int = 0  # how many of its latest groups in a row were all right


class Sampler:
    """Gives out groups and remembers the results of each prompt.

    Args:
        problems: the stream.
        rl: sizes, and after how many solved groups in a row a prompt is skipped (`groups.skip_solved`).
        state: from a checkpoint, as `state` returned it; None at the beginning of a run, and empty if the checkpoint
            has none, such as that of a replay.
        step: the checkpoint's step if it has no state; group g then had problem g.
    """

    def __init__(self, problems: Problems, rl: RLConfig, state: dict | None = None, step: int = 0) -> None:
        if not state:
            done = step * rl.prompts_per_step
            state = {"number": done, "issued": [], "position": done, "table": {}}
        self._problems = problems
        self._rl = rl
        self._number: int = state["number"]  # of the first group that was not consumed
        self._issued: list[int] = list(state["issued"])  # positions in the stream of that group and later ones
        self._position: int = state["position"]  # the next position to look at
        self._taken = 0  # how many of `_issued` this object has given out
        self._table = {id: PromptResults(*counts) for id, counts in state["table"].items()}

    def take(self, count: int) -> list[Group]:
        """The next groups."""
        while len(self._issued) < self._taken + count:
            self._issued.append(self._next())
        first, self._taken = self._taken, self._taken + count
        return [self._group(self._number + i, self._issued[i]) for i in range(first, self._taken)]

    def consumed(self, group: Group, trajectories: Sequence[Trajectory]) -> None:
        """Record that a group is finished, in the order of `take`, and the results of its scored trajectories.

        Raises:
            ValueError: it is not the first of the groups that were taken.
        """
        if not self._taken or group.number != self._number:
            raise ValueError(f"group {group.number} was consumed out of its turn: the next one is {self._number}")
        del self._issued[0]
        self._number += 1
        self._taken -= 1
        right = [is_right(self._rl.reward, trajectory) for trajectory in trajectories if not trajectory.dropped]
        if right:
            record = self._table.setdefault(group.problem.id, PromptResults())
            record.tried += len(right)
            record.right += sum(right)
            record.streak = record.streak + 1 if all(right) else 0

    def state(self) -> dict:
        """What a checkpoint keeps, as JSON. Groups that were taken and not consumed count as not taken."""
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
        """The next position whose prompt is not skipped.

        If all prompts of a finite data set would be skipped, all streaks are reset, since no prompt would be left.
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
