"""A step's trajectories: in order, complete, of weights that are not too old, and sampled again if they were lost."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from retool_jax.answers import workers
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.errors import UserError
from retool_jax.evaluation.numbers import summarise
from retool_jax.rl.collector import Collector, Rollouts
from retool_jax.rl.config import GroupsConfig, RLConfig
from retool_jax.rl.sampler import Sampler
from retool_jax.rollout.config import RewardConfig, RolloutConfig
from retool_jax.rollout.rollout import rollout, score
from retool_jax.rollout.trajectory import End
from retool_jax.tokens.grammar import policy_turn_text
from retool_jax.tools import Output, Tool
from retool_jax.tools.toolbox import Toolbox

PROBLEMS = Problems("arithmetic", "train", 3)
LIMITS = RolloutConfig(max_prompt_tokens=60, max_turns=3)
RL = RLConfig(steps=5, prompts_per_step=3, group_size=2, minibatches=1)
DYNAMIC = GroupsConfig(dynamic=True)


class Ask(Tool):
    """Answers calls after `plan(request, attempt)` seconds; None loses the call."""

    name, description, retries = "ask", "Ask.", 0
    parameters = {"type": "object", "properties": {"who": {"type": "string"}}, "required": ["who"]}  # noqa: RUF012

    def __init__(self, plan: Callable[[int, int], float | None]) -> None:
        self.plan = plan
        self.attempts: Counter[int] = Counter()

    async def call(self, arguments: dict, state: object) -> Output:
        request = int(arguments["who"])
        attempt, self.attempts[request] = self.attempts[request], self.attempts[request] + 1
        seconds = self.plan(request, attempt)
        if seconds is None:
            return Output("the connection was lost", "machinery")
        await asyncio.sleep(seconds)
        return Output("well")


def quick(request: int, attempt: int) -> float:
    return 0.0


def right(request: int) -> bool:
    """On average one of four groups is all right and one is all wrong."""
    group, member = divmod(request, RL.group_size)
    return bool(np.random.default_rng(group).integers(4) >> member & 1)


def calls(request: int) -> bool:
    return request % 3 > 0


def call(request: int) -> str:
    function = {"name": "ask", "arguments": {"who": str(request)}}
    return policy_turn_text({"content": "Hm.", "tool_calls": [{"function": function}]})


def answer(request: int) -> str:
    """The final answer of a request, with its own length."""
    truth = PROBLEMS[request // RL.group_size].ground_truth if right(request) else "no"
    return "word " * int(np.random.default_rng([2, request]).integers(0, 25)) + f"\\boxed{{{truth}}}<|im_end|>"


def turns(request: int, plan: Callable[[int, int], float | None] = quick) -> list[str]:
    """The turns of a request; after a lost call they are repeated once."""
    if not calls(request):
        return [answer(request)]
    lost = [plan(request, attempt) is None for attempt in (0, 1)]
    return [call(request)] * (1 + lost[0]) + [answer(request)] * (not all(lost))


@pytest.fixture
def scripted(scripted_engine, tokenizer):
    """`scripted(plan)`: an engine whose policy writes `turns`, and continues when weights change."""

    class Updatable(scripted_engine):
        def update_params(self, params: object) -> None:
            self.version += 1

    def make(plan: Callable[[int, int], float | None] = quick, say=turns, **sizes) -> Updatable:
        script = {request: [tokenizer.encode(turn) for turn in say(request, plan)] for request in range(200)}
        return Updatable(tokenizer.stop_ids, script, **{"slots": 4, "tool_lag": -1, "stale_rows": "keep"} | sizes)

    return make


@pytest.fixture
def collect(tokenizer):
    """`collect(engine, rl, ...)`: all steps of a run, and the state of its data after each of them."""

    def run(
        engine: Engine, rl: RLConfig, tool: Tool | None = None, start: int = 0, state: dict | None = None, weights=None
    ) -> tuple[list[Rollouts], list[dict]]:
        async def main() -> tuple[list[Rollouts], list[dict]]:
            sampler = Sampler(PROBLEMS, rl, state, start)
            tools = Toolbox([tool]) if tool else None
            steps, states = [], []
            async with Collector(engine, tokenizer, tools, sampler, rl, LIMITS, start) as collector:
                for step in range(start, rl.steps):
                    steps.append(await collector.take())
                    await asyncio.sleep(0.005)  # an update, while other rollouts continue
                    collector.update_weights(weights(step) if weights else None)
                    states.append(json.loads(json.dumps(collector.state())))
            return steps, states

        return asyncio.run(asyncio.wait_for(main(), 120))

    return run


def told(step: Rollouts) -> list[tuple]:
    """The parts of a step that an update uses."""
    return [(t.id, t.ids, t.logprobs, t.end, t.reward) for t in step.trajectories]


def requests(step: Rollouts) -> list[int]:
    return [int(trajectory.id.rpartition("/")[2]) for trajectory in step.trajectories]


# --- number and order -------------------------------------------------------------------------------------------------


def test_without_running_ahead_a_step_is_one_rollout(tokenizer, scripted, collect):
    """It has the same ids in the same schedule, for the problems that the step determines."""
    steps, _ = collect(scripted(tool_lag=1), RL, Ask(quick))
    engine = scripted(tool_lag=1)
    tools = Toolbox([Ask(quick)])
    for step, groups in zip(steps, np.arange(15).reshape(5, 3), strict=True):
        samples = [s for group in Sampler(PROBLEMS, RL).take(15)[groups[0] : groups[-1] + 1] for s in group.samples]
        trajectories, statistics = asyncio.run(rollout(engine, tokenizer, tools, samples, LIMITS))
        score(tokenizer, trajectories)
        assert told(step) == told(Rollouts(trajectories, statistics, {}))
        assert requests(step) == [group * 2 + member for group in groups for member in range(2)]
        for name in ("decoded_tokens", "prefilled_tokens", "appended_tokens", "row_steps"):
            assert getattr(step.statistics, name) == getattr(statistics, name)
        assert step.statistics.total_s > 0 and len(step.statistics.turn_s) == len(statistics.turn_s)
        assert set(step.numbers) == {f"groups/{name}" for name in ("all_right", "all_wrong", "refills", "retried")}


@pytest.mark.parametrize("groups", [GroupsConfig(), DYNAMIC])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_long_trajectories_and_slow_tools_are_not_underrepresented(scripted, collect, ahead, groups):
    """However long tools take, each step has the same trajectories, so their lengths are the same too."""
    rl = replace(RL, ahead=ahead, groups=groups, prompts_per_step=2)

    def slow(request: int, attempt: int) -> float:
        return 0.06 if request % 7 < 3 else 0.0

    expected, _ = collect(scripted(), rl, Ask(quick))
    steps, _ = collect(scripted(), rl, Ask(slow))
    assert [told(step) for step in steps] == [told(step) for step in expected]
    lengths = [t.response_tokens for step in steps for t in step.trajectories]
    assert len(set(lengths)) > 5 and len({t.finished_s for step in steps for t in step.trajectories}) > 5


@pytest.mark.parametrize("ahead", [0, 1])
def test_groups_without_a_difference_are_left_out_and_replaced(scripted, collect, ahead):
    steps, states = collect(scripted(), replace(RL, groups=DYNAMIC, ahead=ahead), Ask(quick))
    outcomes = [{right(2 * group), right(2 * group + 1)} for group in range(100)]
    at, refilled = 0, 0
    for step, state in zip(steps, states, strict=True):
        found: list[int] = []
        begin, rounds = at, 0
        while len(found) < 3:
            missing = 3 - len(found)
            found += [group for group in range(at, at + missing) if len(outcomes[group]) == 2]
            at, rounds = at + missing, rounds + 1
        assert requests(step) == [request for group in found for request in (2 * group, 2 * group + 1)]
        assert step.numbers["groups/all_right"] == outcomes[begin:at].count({True})
        assert step.numbers["groups/all_wrong"] == outcomes[begin:at].count({False})
        assert step.numbers["groups/refills"] == rounds - 1 and state["number"] == at
        refilled += rounds - 1
    assert refilled > 3


@pytest.mark.parametrize(("name", "left_out"), [("dapo_strict", False), ("default", True)])
def test_a_group_has_a_difference_where_the_reward_sees_one(scripted, collect, name, left_out):
    """The verdict accepts all answers; the strict rule only accepts those without a leading zero."""

    def zeros(request: int, plan) -> list[str]:
        zero = "" if right(request) else "0"
        return [f"\\boxed{{{zero}{PROBLEMS[request // RL.group_size].ground_truth}}}<|im_end|>"]

    groups, reward = GroupsConfig(dynamic=True, refills=2), RewardConfig(name=name)
    (step,), _ = collect(scripted(say=zeros), replace(RL, steps=1, groups=groups, reward=reward))
    differ = [group for group in range(9) if right(2 * group) != right(2 * group + 1)][:3]
    drawn = range(9 if left_out else differ[-1] + 1)
    assert step.numbers["groups/all_right"] == sum(
        left_out or {right(2 * g), right(2 * g + 1)} == {True} for g in drawn
    )
    learned = range(3) if left_out else differ
    assert requests(step) == [request for group in learned for request in (2 * group, 2 * group + 1)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_refills_have_an_end(scripted, collect, ahead):
    """A step that finds no mixed group uses those that it sampled first, so that it can be logged."""

    def wrong(request: int, plan) -> list[str]:
        return ["No.<|im_end|>"]

    rl = replace(RL, steps=2, groups=GroupsConfig(dynamic=True, refills=2), ahead=ahead)
    steps, states = collect(scripted(say=wrong), rl)
    assert [requests(step) for step in steps] == [list(range(6)), list(range(18, 24))]
    assert [step.numbers["groups/all_wrong"] for step in steps] == [9, 9] and states[-1]["number"] == 18
    assert [step.numbers["groups/refills"] for step in steps] == [2, 2]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_resumed_run_has_the_groups_of_an_unbroken_one(scripted, collect, ahead):
    """Groups in progress are in the checkpoint only as not consumed; versions are training steps."""
    rl = replace(RL, groups=DYNAMIC, ahead=ahead)
    steps, states = collect(scripted(), rl, Ask(quick))
    assert bool(states[1]["issued"]) == bool(ahead) and not states[-1]["issued"], "nothing beyond the last step"
    resumed, again = collect(scripted(), rl, Ask(quick), 2, states[1])
    assert [told(step) for step in resumed] == [told(step) for step in steps[2:]] and again[-1] == states[-1]
    assert [step.numbers["groups/refills"] for step in resumed] == [s.numbers["groups/refills"] for s in steps[2:]]
    assert min(v for step in resumed for t in step.trajectories for v in t.versions if v >= 0) == 2


# --- infrastructure failures ------------------------------------------------------------------------------------------


def faulty(request: int, attempt: int) -> float | None:
    """Every fifth call is lost."""
    return None if np.random.default_rng([3, request, attempt]).random() < 0.2 else 0.0


@pytest.mark.parametrize("ahead", [0, 1])
def test_lost_trajectories_are_sampled_once_more_and_others_do_not_change(scripted, collect, ahead):
    rl = replace(RL, ahead=ahead, prompts_per_step=6)
    expected, _ = collect(scripted(), replace(rl, ahead=0), Ask(quick))
    steps, _ = collect(scripted(faulty), rl, Ask(faulty))
    lost = [0, 0]
    for step, unbroken in zip(steps, expected, strict=True):
        assert len(step.trajectories) == 12
        for ours, theirs in zip(told(step), told(unbroken), strict=True):
            request = int(ours[0].rpartition("/")[2])
            twice = calls(request) and faulty(request, 0) is faulty(request, 1) is None
            assert ours[3:] == (End.SANDBOX_LOST, None) if twice else ours == theirs
            lost[0] += calls(request) and faulty(request, 0) is None
            lost[1] += twice
    assert sum(step.numbers["groups/retried"] for step in steps) == lost[0] > lost[1] > 0
    assert summarise([t for step in steps for t in step.trajectories], 0.5)["end/sandbox_lost"] == lost[1]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("groups", [GroupsConfig(), DYNAMIC])
def test_where_all_is_lost_the_run_ends_with_the_reason(scripted, collect, ahead, groups):
    def down(request: int, attempt: int) -> None:
        return None

    engine, tool = scripted(down, say=lambda request, plan: [call(request)] * 2), Ask(down)
    with pytest.raises(UserError, match=r"6 of 6 trajectories were dropped.*6 sandbox_lost"):
        steps, _ = collect(engine, replace(RL, groups=groups, ahead=ahead, steps=1), tool)
        summarise(steps[0].trajectories, RL.max_dropped)  # as the loop does
    assert tool.attempts == dict.fromkeys(range(6), 2), "and others are not lost in their place"


def test_an_answer_that_could_not_be_compared_is_compared_once_more(scripted, collect, tmp_path, monkeypatch):
    """The comparing process fails to start at first; after the retry the verdicts are those of any other run."""
    marker, python = tmp_path / "began", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ -e {marker} ] || {{ touch {marker}; exit 1; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(workers.sys, "executable", str(python))
    monkeypatch.setattr(workers, "PAUSES", (0.0,))
    monkeypatch.setattr(workers, "pool", pool := workers.SymbolicPool(workers=1))

    def symbolic(request: int, plan) -> list[str]:
        truth = int(PROBLEMS[request // 2].ground_truth)
        return [f"\\boxed{{{truth - 5 - request % 2}+5}}<|im_end|>"]

    (step,), _ = collect(scripted(say=symbolic), replace(RL, steps=1))
    pool.close()
    outcomes = [(t.end, t.reward, t.fault) for t in step.trajectories]
    assert outcomes == 3 * [(End.ANSWERED, 1.0, ""), (End.ANSWERED, -1.0, "")]
    assert step.numbers["groups/retried"] == 6 and marker.exists()


# --- weights that change during rollouts ------------------------------------------------------------------------------


class Patient(Ask):
    """Makes requests of the second step wait until new weights have come."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(quick)
        self.engine = engine

    async def call(self, arguments: dict, state: object) -> Output:
        while int(arguments["who"]) in range(6, 12) and not self.engine.version:
            await asyncio.sleep(0.001)
        return await super().call(arguments, state)


def ages(step: Rollouts, version: int) -> list[int]:
    """The staleness of each trajectory, after checks of its tokens' versions."""
    found = []
    for trajectory in step.trajectories:
        versions = [v for v in trajectory.versions if v >= 0]
        assert [v >= 0 for v in trajectory.versions] == trajectory.sampled
        assert versions == sorted(versions) and max(versions) <= version
        found.append(version - min(versions))
        if trajectory.end == End.DISCARDED:
            assert trajectory.reward is None and trajectory.verdict is None
    return found


@pytest.mark.parametrize("ahead", [1, 2])
def test_no_token_is_older_than_rollouts_may_run_ahead(scripted, collect, ahead):
    engine = scripted(slots=64)
    steps, _ = collect(engine, replace(RL, ahead=ahead), Patient(engine))
    worst = []
    for version, step in enumerate(steps):  # step s uses the weights of step s - 1
        old = ages(step, version)
        assert step.numbers["staleness/max"] == max(old) and step.numbers["staleness/mean"] == np.mean(old)
        worst.append(max(old))
        drew = [{v for v in t.versions if v >= 0} for t in step.trajectories]
        spans = [max(versions) - min(versions) for versions in drew]
        assert step.numbers["staleness/span/max"] == max(spans)
        assert step.numbers["staleness/span/mean"] == np.mean(spans)
    assert worst[0] == 0 and worst[1] == 1 and max(worst) == worst[ahead] == ahead
    waited = [trajectory for trajectory in steps[1].trajectories if trajectory.tool_uses]
    assert len(waited) == 4 and all(set(trajectory.versions) == {-1, 0, 1} for trajectory in waited)


@pytest.mark.parametrize(("stale_rows", "limit"), [("keep", 0), ("discard", None)])
def test_stale_and_discarded_trajectories_are_counted_and_not_learned_from(scripted, collect, stale_rows, limit):
    engine = scripted(slots=64, decode_steps=100, stale_rows=stale_rows)
    rl = replace(RL, steps=2, ahead=1, max_staleness=limit)
    steps, _ = collect(engine, rl, Patient(engine))
    assert not any(trajectory.dropped for trajectory in steps[0].trajectories)
    discarded = [trajectory for trajectory in steps[1].trajectories if trajectory.end == End.DISCARDED]
    assert ages(steps[1], 1) == [1] * 6 and steps[1].numbers["staleness/max"] == 1
    if stale_rows == "keep":
        assert len(discarded) == 6
        assert {trajectory.fault for trajectory in discarded} == {"a token is 1 steps old (rl.max_staleness=0)"}
    else:
        assert {trajectory.id.rpartition("/")[2] for trajectory in discarded} == {"7", "8", "10", "11"}
        assert {trajectory.fault for trajectory in discarded} == {"new weights came (engine.stale_rows=discard)"}
    with pytest.raises(UserError, match=rf"{len(discarded)} of 6 trajectories were dropped.*discarded"):
        summarise(steps[1].trajectories, RL.max_dropped)


@pytest.fixture(scope="module")
def drawing(make_engine, model) -> Engine:
    """A real engine; every 16th id ends a turn, which has no answer."""
    return make_engine(0, range(0, model.vocab_size, 16), slots=4)


def test_rows_written_again_keep_what_the_old_weights_drew(drawing, params, collect):
    """On a real engine, with new weights after each step."""
    drawing.config = replace(drawing.config, stale_rows="rewrite")
    rl = replace(RL, steps=6, ahead=1)
    steps, _ = collect(drawing, rl, start=1, weights=lambda step: jax.tree.map(lambda x: x * (1 + 0.01 * step), params))
    drawing.update_params(params)
    assert max(age for version, step in enumerate(steps, 1) for age in ages(step, version)) == 1
    assert drawing.counts()["rows"] == 0


def test_a_settled_engine_is_free_and_nothing_is_lost(drawing, params, tokenizer):
    drawing.config = replace(drawing.config, stale_rows="keep")
    rl = replace(RL, steps=3, ahead=1)

    async def main(settling: bool) -> list[Rollouts]:
        async with Collector(drawing, tokenizer, None, Sampler(PROBLEMS, rl), rl, LIMITS) as collector:
            steps = []
            for _ in range(rl.steps):
                steps.append(await collector.take())
                if settling:
                    await collector.drain()
                    assert drawing.counts()["rows"] == 0
                    looked, _ = await rollout(drawing, tokenizer, None, samples, LIMITS)
                    assert [t.ids for t in looked] == [t.ids for t in first]
                collector.update_weights(params)  # which shows how far it has drawn
            return steps

    samples = [sample for group in Sampler(PROBLEMS, RL).take(2) for sample in group.samples]
    first, _ = asyncio.run(rollout(drawing, tokenizer, None, samples, LIMITS))
    settled, plain = (asyncio.run(asyncio.wait_for(main(settling), 60)) for settling in (True, False))
    for ours, theirs in zip(settled, plain, strict=True):
        assert [t.ids for t in ours.trajectories] == [t.ids for t in theirs.trajectories]
        assert ours.statistics.decoded_tokens > 0 and ours.statistics.total_s > 0
    assert sum(step.statistics.decoded_tokens for step in settled) == sum(
        sum(t.sampled) for step in settled for t in step.trajectories
    )


# --- ends -------------------------------------------------------------------------------------------------------------


class Hanging(Tool):
    """A tool that never answers and keeps a state for each trajectory."""

    name, description, lifetime = "ask", "Ask.", "trajectory"
    parameters = Ask.parameters

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.opened = self.closed = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self.opened += 1
        try:
            yield
        finally:
            await asyncio.sleep(0.02)
            self.closed += 1

    async def call(self, arguments: dict, state: None) -> Output:
        self.called.set()
        await asyncio.sleep(600)
        return Output("too late")


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("broken", [False, True])
def test_closing_early_leaves_nothing_behind(scripted, collect, tokenizer, ahead, broken):
    """After a cancellation or a device failure: tools end, their states are closed, and no prompt is skipped."""
    rl = replace(RL, ahead=ahead)
    engine = scripted()
    sampler = Sampler(PROBLEMS, rl)
    tool = Hanging()

    def fail() -> None:
        raise RuntimeError("the device failed")

    async def main() -> None:
        try:
            async with Collector(engine, tokenizer, Toolbox([tool]), sampler, rl, LIMITS) as collector:
                taking = asyncio.create_task(collector.take())
                await tool.called.wait()
                if broken:
                    engine.decode = fail
                else:
                    taking.cancel()
                await taking
        finally:
            assert tool.opened == tool.closed > 0

    with pytest.raises(RuntimeError if broken else asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(main(), 60))
    expected, _ = collect(scripted(), rl, Ask(quick))
    again, _ = collect(scripted(), rl, Ask(quick), state=json.loads(json.dumps(sampler.state())))
    assert [told(step) for step in again] == [told(step) for step in expected]


def test_a_prompt_that_does_not_fit_ends_the_step(scripted, tokenizer):
    async def main(ahead: int) -> None:
        rl, limits = replace(RL, ahead=ahead), replace(LIMITS, max_prompt_tokens=5)
        async with Collector(scripted(), tokenizer, None, Sampler(PROBLEMS, rl), rl, limits) as collector:
            await collector.take()

    for ahead in (0, 1):
        with pytest.raises(UserError, match=r"the limit is rollout.max_prompt_tokens=5"):
            asyncio.run(asyncio.wait_for(main(ahead), 60))
