"""The trajectories of each step: sampled, scored and, with `rl.groups.dynamic`, selected.

Groups are consumed in the order in which the sampler gave them out, even if later ones finish first, so training is
not biased against long trajectories and slow tools. With `rl.ahead` = 0 a step's groups are sampled with the weights
that learn from them, and nothing is in progress when `take` returns. With k >= 1, the groups of up to k further steps
continue while the caller updates, and use new weights from the next dispatch on (`engine.stale_rows`). The collector
takes only as many groups ahead as the next k steps need at least, so a token is never older than k steps when it is
learned from.
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
    """The trajectories that a step learns from, with their statistics."""

    trajectories: list[Trajectory]  # scored, group by group in the sampler's order, rl.group_size each
    statistics: Statistics  # since the previous step
    numbers: dict[str, float]  # for the log, under groups/ and staleness/
    others: Sequence[Trajectory] = ()  # of groups that were sampled and left out; the logged accuracy includes them


class _InProgress(NamedTuple):
    group: Group
    tasks: list[asyncio.Task[tuple[Trajectory, bool]]]  # `Collector._run_sample` for each sample of this host


class Collector:
    """Samples the groups that a sampler gives out: `async with Collector(...) as collector`.

    Call its methods on the event loop's thread, which is the engine's. The caller's update may run in another thread
    while rollouts continue.

    Args:
        step: the training step of the engine's weights. `engine.version` is set to it and `update_weights` increments
            it, so the version of a token is a training step, also after a resume.
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
        self._service: Service | None = None  # open while rollouts run ahead
        self._in_progress: deque[_InProgress] = deque()  # groups that were not consumed, in order
        self._statistics = Statistics()  # since the last step, without what `_service` still holds
        self._origin = time.perf_counter()  # trajectories' times count from here, with rl.ahead > 0
        engine.version = step

    async def __aenter__(self) -> "Collector":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- the interface of the loop ---

    async def take(self) -> Rollouts:
        """The next step's trajectories.

        With `rl.groups.dynamic`, groups that are all right or all wrong are left out and replaced by newly sampled
        groups, in at most `rl.groups.refills` rounds. A step that finds no mixed group at all uses the groups that it
        sampled first.

        Raises:
            UserError: as `rollout`; or more than `rl.max_dropped` was dropped while groups were being selected.
        """
        rl = self._rl
        drawn: list[list[Trajectory]] = []
        selected: list[list[Trajectory]] = []
        counts: Counter[str] = Counter()
        ages: list[tuple[int, int]] = []
        for refills in range(rl.groups.refills + 1 if rl.groups.dynamic else 1):
            groups, own, own_retried = await self._draw(rl.prompts_per_step - len(selected))
            own_ages = self._drop_stale(own)
            own_retried += await self._score(own)
            by_host = await _from_all((_named(own), own_ages, own_retried))
            groups_by_host, ages_by_host, retried_by_host = zip(*by_host, strict=True)
            # Each group was sampled by one host, and is empty on the others.
            new = [next(filter(None, parts)) for parts in zip(*groups_by_host, strict=True)]
            ages += [age for host_ages in ages_by_host for age in host_ages]
            for group, trajectories in zip(groups, new, strict=True):
                self._sampler.consumed(group, trajectories)
                kind = _kind(trajectories, rl.reward)
                counts[kind] += 1
                if kind == "mixed" or not rl.groups.dynamic:
                    selected.append(trajectories)
            drawn += new
            counts["retried"] += sum(retried_by_host)
            counts["refills"] = refills
            if len(selected) == rl.prompts_per_step:
                break
            require_kept([t for trajectories in drawn for t in trajectories], rl.max_dropped)
        numbers = {f"groups/{name}": counts[name] for name in ("all_right", "all_wrong", "refills", "retried")}
        if rl.ahead:
            staleness, spans = zip(*ages or [(0, 0)], strict=True)
            numbers |= {"staleness/max": max(staleness), "staleness/mean": sum(staleness) / len(staleness)}
            numbers |= {"staleness/span/max": max(spans), "staleness/span/mean": sum(spans) / len(spans)}
        selected = selected or drawn[: rl.prompts_per_step]
        selected_ids = {id(trajectories) for trajectories in selected}
        return Rollouts(
            [t for trajectories in selected for t in trajectories],
            merge_statistics(await _from_all(self._take_statistics())),
            numbers,
            [t for trajectories in drawn if id(trajectories) not in selected_ids for t in trajectories],
        )

    def update_weights(self, params: Params) -> None:
        """Give the engine the weights of the next training step; call it once for each step."""
        self._engine.update_params(params)

    async def drain(self) -> None:
        """Let rollouts in progress finish, so that others may use the engine; `take` returns them later."""
        if tasks := [task for group in self._in_progress for task in group.tasks]:
            await asyncio.wait(tasks)  # `take` raises their errors when it comes to their group
        await self._stop()

    async def close(self) -> None:
        """Drop rollouts in progress and release everything; a run that resumes from `state` samples them again."""
        tasks = [task for group in self._in_progress for task in group.tasks]
        self._in_progress.clear()
        try:
            await self._stop()  # drops dialogues and cancels their tools, so their tasks end
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)

    def state(self) -> dict:
        """For a checkpoint, see `Sampler.state`."""
        return self._sampler.state()

    # --- sampling ---

    async def _draw(self, count: int) -> tuple[list[Group], list[list[Trajectory]], int]:
        """The next groups, their trajectories, and how many of these were sampled a second time.

        A group of another host has no trajectories here.
        """
        if self._rl.ahead:
            return await self._take_in_progress(count)
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

    async def _take_in_progress(self, count: int) -> tuple[list[Group], list[list[Trajectory]], int]:
        """As `_draw`, from the groups in progress; before it waits, it submits groups for the next steps as well."""
        left = self._rl.steps - self._engine.version - 1  # steps after this one
        more = count + min(self._rl.ahead, max(left, 0)) * self._rl.prompts_per_step - len(self._in_progress)
        await self._submit(self._sampler.take(max(more, 0)))
        groups, drawn, retried = [], [], 0
        for _ in range(count):
            group, tasks = self._in_progress[0]
            if tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()  # raises the error of a dialogue or of the engine
            self._in_progress.popleft()
            results = [task.result() for task in tasks]
            groups.append(group)
            drawn.append([trajectory for trajectory, _ in results])
            retried += sum(again for _, again in results)
        return groups, drawn, retried

    async def _submit(self, groups: Sequence[Group]) -> None:
        """Start the dialogues of groups, beside those in progress."""
        if self._service is None:
            self._service = await Service(self._engine, self._tools.at_once if self._tools else 0).__aenter__()
        for group in groups:
            samples = _own_samples(group)
            pairs = zip(samples, self._dialogues(samples), strict=True)
            tasks = [asyncio.create_task(self._run_sample(self._service, *pair)) for pair in pairs]
            self._in_progress.append(_InProgress(group, tasks))

    async def _run_sample(self, service: Service, sample: Sample, dialogue: Dialogue) -> tuple[Trajectory, bool]:
        """Run a dialogue to its end, and once more if the sandbox lost it; also returns whether it ran twice."""
        trajectory = await self._run_dialogue(service, dialogue)
        if trajectory.end != End.SANDBOX_LOST:
            return trajectory, False
        (again,) = self._dialogues([sample])
        return await self._run_dialogue(service, again), True

    async def _run_dialogue(self, service: Service, dialogue: Dialogue) -> Trajectory:
        try:
            await service.submit(dialogue, dialogue.sampling, dialogue.on_tokens)
        finally:
            await dialogue.close()
        return trajectories_of([dialogue], self._origin)[0]

    def _dialogues(self, samples: Sequence[Sample]) -> list[Dialogue]:
        return dialogues_of(self._engine, self._tokenizer, self._tools, samples, self._limits)

    async def _stop(self) -> None:
        """Close the service, so that nothing is in flight on the engine."""
        service, self._service = self._service, None
        if service is not None:
            await service.close()
            self._statistics += service.take_statistics()

    def _take_statistics(self) -> Statistics:
        statistics, self._statistics = self._statistics, Statistics()
        return statistics + self._service.take_statistics() if self._service is not None else statistics

    # --- scoring ---

    async def _score(self, groups: Sequence[list[Trajectory]]) -> int:
        """Score groups. If an answer could not be compared, score its group once more; returns how many such answers.

        Comparing is slow, so it runs in a thread beside the event loop.
        """
        ends = {trajectory.id: trajectory.end for group in groups for trajectory in group}
        await self._score_once(groups)
        again = [group for group in groups if any(trajectory.end == End.CHECKER_LOST for trajectory in group)]
        lost = 0
        for trajectory in (trajectory for group in again for trajectory in group):
            trajectory.verdict = trajectory.reward = None
            if trajectory.end == End.CHECKER_LOST:
                trajectory.end, trajectory.fault = ends[trajectory.id], ""
                lost += 1
        if again:
            await self._score_once(again)
        return lost

    async def _score_once(self, groups: Sequence[list[Trajectory]]) -> None:
        trajectories = [trajectory for group in groups for trajectory in group]
        await asyncio.to_thread(score, self._tokenizer, trajectories, self._rl.reward, self._rl.group_size)

    def _drop_stale(self, groups: Sequence[Sequence[Trajectory]]) -> list[tuple[int, int]]:
        """Drop trajectories older than `rl.max_staleness`; returns staleness and span of all not dropped before.

        Staleness is the number of steps between the weights that sampled a trajectory's oldest token and the current
        weights. The span is the number of steps between its oldest and its newest token.
        """
        if not self._rl.ahead:
            return []
        ages, limit = [], self._rl.max_staleness
        for trajectory in (trajectory for group in groups for trajectory in group if not trajectory.dropped):
            versions = [version for version in trajectory.versions if version >= 0]
            age = self._engine.version - min(versions)
            ages.append((age, max(versions) - min(versions)))
            if limit is not None and age > limit:
                trajectory.end = End.DISCARDED
                trajectory.fault = f"a token is {age} steps old (rl.max_staleness={limit})"
        return ages


def _own_samples(group: Group) -> list[Sample]:
    """The samples of a group that this host runs: all or none, since they share a prompt."""
    return group.samples if hosts.is_mine(group.number) else []


def _named(groups: Sequence[list[Trajectory]]) -> Sequence[list[Trajectory]]:
    """The groups, with this host's name added to the fault of each dropped trajectory."""
    for trajectory in (trajectory for group in groups for trajectory in group if trajectory.dropped):
        trajectory.fault = hosts.with_host_name(trajectory.fault)
    return groups


async def _from_all(value: T) -> list[T]:
    """`hosts.gather` in a thread, so that rollouts here continue while this host waits for another one."""
    return await asyncio.to_thread(hosts.gather, value) if jax.process_count() > 1 else [value]


def merge_statistics(every: Sequence[Statistics]) -> Statistics:
    """The statistics of all hosts, which worked in parallel: counts are summed, and the time is the longest one."""
    total = sum(every[1:], every[0])
    return dataclasses.replace(total, total_s=max(one.total_s for one in every))


def _kind(group: Sequence[Trajectory], reward: RewardConfig) -> str:
    """Whether a group's samples are all right, all wrong, or mixed; dropped ones do not count."""
    right = {is_right(reward, trajectory) for trajectory in group if not trajectory.dropped}
    if not right:
        return "dropped"
    return "mixed" if len(right) == 2 else "all_right" if right.pop() else "all_wrong"
