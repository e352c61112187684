"""The trajectories of each step: drawn, scored and, where the algorithm asks for it, chosen.

Groups are consumed in the order in which the sampler gave them out, whatever finished first, so neither long
trajectories nor slow tools are seldom learned from. With `rl.ahead` = 0 a step's groups are drawn with the weights
that learn from them, and nothing is under way when `take` returns. With k >= 1, groups of up to k further steps draw
on while the caller updates, and take new weights between two dispatches (`engine.stale_rows`). No more are ever taken
from the sampler than the k steps behind the present one consume at the least, so a token is never older than k steps
when it is learned from.
"""

import asyncio
import dataclasses
import time
from collections import Counter, deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import jax

from retool_jax import hosts
from retool_jax.engine.conversation import Statistics
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import Service
from retool_jax.evaluation.numbers import require_kept
from retool_jax.models.decoder import Params
from retool_jax.rl.config import RLConfig
from retool_jax.rl.sampler import Group, Sampler
from retool_jax.rollout.config import RewardConfig, RolloutConfig
from retool_jax.rollout.reward import is_right
from retool_jax.rollout.rollout import Dialogue, Sample, dialogues_of, rollout, score, trajectories_of
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox

T = TypeVar("T")


class Rollouts(NamedTuple):
    """What a step learns from."""

    trajectories: list[Trajectory]  # scored, group by group in the order of issue, rl.group_size each
    statistics: Statistics  # since the last step's
    numbers: dict[str, float]  # for the log, under groups/ and staleness/
    others: Sequence[Trajectory] = ()  # of groups that were drawn and left out; accuracies are of all that was drawn


class _UnderWay(NamedTuple):
    group: Group
    tasks: list[asyncio.Task[tuple[Trajectory, bool]]]  # one for each sample of this host's, see `Collector._play`


class Collector:
    """Draws the groups that a sampler gives out: `async with Collector(...) as collector`.

    Methods belong to the thread of the event loop, which is the engine's. The caller's update may run in another one,
    so that what is under way goes on meanwhile.

    Args:
        step: steps that the engine's weights have learned from. `engine.version` is set to it, and `updated` counts it
            on, so that a token's version is a step also after a resume.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        tools: Toolbox | None,
        sampler: Sampler,
        rl: RLConfig,
        limits: RolloutConfig,
        step: int = 0,
    ) -> None:
        self._engine, self._tokenizer, self._tools = engine, tokenizer, tools
        self._sampler, self._rl, self._limits = sampler, rl, limits
        self._service: Service | None = None  # while something is, or may soon be, under way
        self._under_way: deque[_UnderWay] = deque()  # groups that were not consumed, in order
        self._statistics = Statistics()  # of what was drawn since the last step, the service's latest aside
        self._origin = time.perf_counter()  # of trajectories' times, with rl.ahead > 0
        engine.version = step

    async def __aenter__(self) -> "Collector":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- what the loop asks for ---

    async def take(self) -> Rollouts:
        """The next step's trajectories, of weights that have learned from all steps before it.

        With `rl.groups.dynamic`, groups that are all right or all wrong are left out, and as many others are drawn as
        are missing, `rl.groups.refills` times at most. A step that finds none at all has those that it began with,
        which have nothing to tell apart.

        Raises:
            UserError: as `rollout`, or, among all that was drawn for a choice, more was dropped than `rl.max_dropped`.
        """
        rl = self._rl
        drawn: list[list[Trajectory]] = []
        found: list[list[Trajectory]] = []
        counts: Counter[str] = Counter()
        ages: list[tuple[int, int]] = []
        for refills in range(rl.groups.refills + 1 if rl.groups.dynamic else 1):
            groups, own, retried = await self._draw(rl.prompts_per_step - len(found))
            new_ages = self._drop_stale(own)
            retried += await self._score(own)
            every = await _from_all((_named(own), new_ages, retried))
            # Each group is one host's; here they stand in the order of issue again.
            new = [next(filter(None, parts)) for parts in zip(*(told[0] for told in every), strict=True)]
            ages += [age for told in every for age in told[1]]
            retried = sum(told[2] for told in every)
            for group, trajectories in zip(groups, new, strict=True):
                self._sampler.consumed(group, trajectories)
                kind = _kind(trajectories, rl.reward)
                counts[kind] += 1
                if kind == "mixed" or not rl.groups.dynamic:
                    found.append(trajectories)
            drawn += new
            counts["retried"] += retried
            counts["refills"] = refills
            if len(found) == rl.prompts_per_step:
                break
            require_kept([t for trajectories in drawn for t in trajectories], rl.max_dropped)
        numbers = {f"groups/{name}": counts[name] for name in ("all_right", "all_wrong", "refills", "retried")}
        if rl.ahead:
            old, spans = zip(*ages or [(0, 0)], strict=True)
            numbers |= {"staleness/max": max(old), "staleness/mean": sum(old) / len(old)}
            numbers |= {"staleness/span/max": max(spans), "staleness/span/mean": sum(spans) / len(spans)}
        chosen = found or drawn[: rl.prompts_per_step]
        taken = {id(trajectories) for trajectories in chosen}
        return Rollouts(
            [t for trajectories in chosen for t in trajectories],
            together(await _from_all(self._take_statistics())),
            numbers,
            [t for trajectories in drawn if id(trajectories) not in taken for t in trajectories],
        )

    def updated(self, params: Params) -> None:
        """Give the engine the weights that have learned from one step more; to be called once for each step."""
        self._engine.update_params(params)

    async def settle(self) -> None:
        """Let what is under way run to its end, so that others may use the engine; `take` has it later."""
        if tasks := [task for under_way in self._under_way for task in under_way.tasks]:
            await asyncio.wait(tasks)  # what one of them met is raised by the `take` that it is for
        await self._stop()

    async def close(self) -> None:
        """Drop what is under way and give everything back; a run that goes on from `state` draws it again."""
        tasks = [task for under_way in self._under_way for task in under_way.tasks]
        self._under_way.clear()
        try:
            await self._stop()  # drops dialogues and ends their tools, and with that their tasks
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)

    def state(self) -> dict:
        """For a checkpoint, see `Sampler.state`."""
        return self._sampler.state()

    # --- drawing ---

    async def _draw(self, count: int) -> tuple[list[Group], list[list[Trajectory]], int]:
        """The next groups with their trajectories, and how many of these were drawn a second time.

        A group that another host draws has none here.
        """
        if self._rl.ahead:
            return await self._wait_for(count)
        groups = self._sampler.take(count)
        samples = [sample for group in groups for sample in _own_samples(group)]
        trajectories = await self._rollout(samples)
        lost = [i for i, trajectory in enumerate(trajectories) if trajectory.end == End.SANDBOX_LOST]
        if lost:
            again = await self._rollout([samples[i] for i in lost])
            for i, trajectory in zip(lost, again, strict=True):
                trajectories[i] = trajectory
        drawn = iter(trajectories)
        return groups, [list(islice(drawn, len(_own_samples(group)))) for group in groups], len(lost)

    async def _rollout(self, samples: Sequence[Sample]) -> list[Trajectory]:
        trajectories, statistics = await rollout(self._engine, self._tokenizer, self._tools, samples, self._limits)
        self._statistics += statistics
        return trajectories

    async def _wait_for(self, count: int) -> tuple[list[Group], list[list[Trajectory]], int]:
        """As `_draw`, of what is under way, once there is enough of it for the next steps as well."""
        left = self._rl.steps - self._engine.version - 1  # steps behind this one
        more = count + min(self._rl.ahead, max(left, 0)) * self._rl.prompts_per_step - len(self._under_way)
        await self._submit(self._sampler.take(max(more, 0)))
        groups, drawn, retried = [], [], 0
        for _ in range(count):
            group, tasks = self._under_way[0]
            if tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()  # raises what a dialogue, or the engine, met
            self._under_way.popleft()
            results = [task.result() for task in tasks]
            groups.append(group)
            drawn.append([trajectory for trajectory, _ in results])
            retried += sum(again for _, again in results)
        return groups, drawn, retried

    async def _submit(self, groups: Sequence[Group]) -> None:
        """Let groups draw beside those that are under way."""
        if self._service is None:
            self._service = await Service(self._engine, self._tools.at_once if self._tools else 0).__aenter__()
        for group in groups:
            samples = _own_samples(group)
            pairs = zip(samples, self._dialogues(samples), strict=True)
            tasks = [asyncio.create_task(self._play(self._service, *pair)) for pair in pairs]
            self._under_way.append(_UnderWay(group, tasks))

    async def _play(self, service: Service, sample: Sample, dialogue: Dialogue) -> tuple[Trajectory, bool]:
        """Run a dialogue to its end, and once more where the machinery lost it; says whether that was so."""
        trajectory = await self._run(service, dialogue)
        if trajectory.end != End.SANDBOX_LOST:
            return trajectory, False
        (again,) = self._dialogues([sample])
        return await self._run(service, again), True

    async def _run(self, service: Service, dialogue: Dialogue) -> Trajectory:
        try:
            await service.submit(dialogue, dialogue.sampling, dialogue.on_tokens)
        finally:
            await dialogue.close()
        return trajectories_of([dialogue], self._origin)[0]

    def _dialogues(self, samples: Sequence[Sample]) -> list[Dialogue]:
        return dialogues_of(self._engine, self._tokenizer, self._tools, samples, self._limits)

    async def _stop(self) -> None:
        """Give the engine back, with nothing in flight."""
        service, self._service = self._service, None
        if service is not None:
            await service.close()
            self._statistics += service.take_statistics()

    def _take_statistics(self) -> Statistics:
        statistics, self._statistics = self._statistics, Statistics()
        return statistics + self._service.take_statistics() if self._service is not None else statistics

    # --- judging ---

    async def _score(self, groups: Sequence[list[Trajectory]]) -> int:
        """Score whole groups, and once more those with an answer that could not be compared; returns how many had one.

        Comparing takes long, so it is done beside the event loop.
        """
        ends = await self._judge(groups)
        again = [group for group in groups if any(trajectory.end == End.CHECKER_LOST for trajectory in group)]
        lost = 0
        for trajectory in (trajectory for group in again for trajectory in group):
            trajectory.verdict = trajectory.reward = None
            if trajectory.end == End.CHECKER_LOST:
                trajectory.end, trajectory.fault = ends[trajectory.id], ""
                lost += 1
        if again:
            await self._judge(again)
        return lost

    async def _judge(self, groups: Sequence[list[Trajectory]]) -> dict[str, End]:
        """Score them; returns the ends of all as they were before."""
        trajectories = [trajectory for group in groups for trajectory in group]
        ends = {trajectory.id: trajectory.end for trajectory in trajectories}
        await asyncio.to_thread(score, self._tokenizer, trajectories, self._rl.reward, self._rl.group_size)
        return ends

    def _drop_stale(self, groups: Sequence[Sequence[Trajectory]]) -> list[tuple[int, int]]:
        """Drop what is older than `rl.max_staleness`; returns staleness and span of what was not dropped before.

        Staleness is the number of steps between the weights that drew a trajectory's oldest token and the present ones,
        the span that between its oldest and its newest token.
        """
        if not self._rl.ahead:
            return []
        found, limit = [], self._rl.max_staleness
        for trajectory in (trajectory for group in groups for trajectory in group if not trajectory.dropped):
            versions = [version for version in trajectory.versions if version >= 0]
            age = self._engine.version - min(versions)
            found.append((age, max(versions) - min(versions)))
            if limit is not None and age > limit:
                trajectory.end = End.DISCARDED
                trajectory.fault = f"a token is {age} steps old (rl.max_staleness={limit})"
        return found


def _own_samples(group: Group) -> list[Sample]:
    """What this host draws of a group: all of it or nothing, since its samples share a prompt."""
    return group.samples if hosts.is_mine(group.number) else []


def _named(groups: Sequence[list[Trajectory]]) -> Sequence[list[Trajectory]]:
    """Groups with the host in the fault of each trajectory that its machinery lost."""
    for trajectory in (trajectory for group in groups for trajectory in group if trajectory.dropped):
        trajectory.fault = hosts.here(trajectory.fault)
    return groups


async def _from_all(value: T) -> list[T]:
    """`hosts.gather` beside the event loop, so that what is under way here goes on while another host is waited for."""
    return await asyncio.to_thread(hosts.gather, value) if jax.process_count() > 1 else [value]


def together(every: Sequence[Statistics]) -> Statistics:
    """The statistics of all hosts, which worked side by side: their counts, and the time of the longest."""
    total = sum(every[1:], every[0])
    return dataclasses.replace(total, total_s=max(one.total_s for one in every))


def _kind(group: Sequence[Trajectory], reward: RewardConfig) -> str:
    """Whether a group's samples are all right, all wrong, or mixed; those that were dropped do not count."""
    right = {is_right(reward, trajectory) for trajectory in group if not trajectory.dropped}
    if not right:
        return "dropped"
    return "mixed" if len(right) == 2 else "all_right" if right.pop() else "all_wrong"
