"""Contract 7 in every number: dropped trajectories are counted and limited, and left out of all other numbers."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from retool_jax.answers import Verdict, workers
from retool_jax.answers.workers import SymbolicPool
from retool_jax.clock import Clock
from retool_jax.data.arithmetic import SPLITS
from retool_jax.data.problems import Problem, Problems
from retool_jax.errors import UserError
from retool_jax.evaluation.config import MOST_PROBLEMS, MOST_SAMPLES
from retool_jax.evaluation.measure import draw, evaluate, request_of
from retool_jax.evaluation.numbers import describe_failures, summarise
from retool_jax.rl.collector import Collector
from retool_jax.rl.loop import Parts, train
from retool_jax.rl.sampler import Sampler
from retool_jax.rollout.config import RewardConfig
from retool_jax.rollout.reward import default
from retool_jax.rollout.rollout import RolloutConfig, Sample, rollout, score
from retool_jax.rollout.trajectory import INFRASTRUCTURE, End, ToolUse, Trajectory
from retool_jax.run.load import load
from retool_jax.sandbox import SandboxConfig, ToolResult
from retool_jax.tokens.grammar import policy_turn_text
from retool_jax.tools.python import Python
from retool_jax.tools.toolbox import Toolbox

RIGHT, WRONG = "\\boxed{40+5}<|im_end|>", "\\boxed{5}<|im_end|>"
LIMITS = RolloutConfig(max_prompt_tokens=60)


def called(code: str) -> str:
    function = {"name": "code_interpreter", "arguments": {"code": code}}
    return policy_turn_text({"content": "", "tool_calls": [{"function": function}]})


CALL = called("print(6)")


def scored(end: End, correct: bool = False, reason: str = "integer") -> Trajectory:
    """A trajectory of five ids that has ended, and is scored unless it was dropped."""
    trajectory = Trajectory("p/0", Problem("p", ({"role": "user", "content": "?"},), "6"), end=end)
    trajectory.add("prompt", [1, 2])
    trajectory.add("policy", [3, 4, 5], [-0.5] * 3)
    if trajectory.dropped:
        trajectory.fault = f"fault of {end}"
    else:
        trajectory.verdict = Verdict(correct, "6", reason)
        trajectory.reward = default(trajectory, trajectory.verdict)
    return trajectory


@pytest.fixture
def problems(tmp_path) -> Problems:
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {i}?"}], "reward_model": {"ground_truth": "45"}}
        for i in range(5)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Problems(str(path), "dev", 0)


@pytest.fixture
def broken_tools() -> Toolbox:
    """An interpreter that loses every call."""

    async def lose(code: str) -> ToolResult:
        return ToolResult("infra_error", backend="process", message="worker died")

    return Toolbox([Python(SimpleNamespace(run=lose, config=SandboxConfig()))])


@pytest.fixture
def look(scripted_engine, tokenizer, problems, broken_tools, tmp_path):
    """`look(turn of problem 0, ...)`: an evaluation in which each problem is answered twice with that turn."""

    def run(*turns: str, max_dropped: float = 0.5, reward: RewardConfig | None = None) -> dict:
        first = (1 << 31) + (SPLITS.index("dev") << 24)
        script = {first + i: [tokenizer.encode(turn)] * 2 for i, turn in enumerate(turns)}

        async def main() -> dict:
            engine = scripted_engine(tokenizer.stop_ids, script)
            count, folder = len(turns), tmp_path / "run"
            return await evaluate(
                engine, tokenizer, broken_tools, problems, 3, count, LIMITS, folder, max_dropped, reward
            )

        return asyncio.run(main())

    return run


@pytest.mark.parametrize("end", INFRASTRUCTURE)
def test_what_the_machinery_ended_is_counted_and_has_no_other_part(tokenizer, advantages, end):
    trajectories = [scored(end), scored(End.ANSWERED, True), scored(End.NO_ANSWER), scored(End.ANSWERED, True)]
    score(tokenizer, trajectories[:1])
    assert trajectories[0].end == end and trajectories[0].verdict is None and trajectories[0].reward is None
    numbers = summarise(trajectories, 0.5)
    assert numbers["dropped"] == 0.25 and numbers[f"end/{end}"] == 1
    assert numbers["accuracy"] == pytest.approx(2 / 3) and numbers["reward_mean"] == pytest.approx(1 / 3)
    assert describe_failures(numbers) == f"1 trajectories {end.replace('_', ' ')}"
    assert advantages(trajectories, 4) == [pytest.approx([0.7071, -1.4142, 0.7071], abs=1e-3)]
    assert trajectories[0].record(tokenizer)["fault"] == f"fault of {end}"


def test_ends_of_the_policys_own_are_signal():
    own = [scored(end) for end in End if end not in INFRASTRUCTURE]
    assert summarise(own, 0.0)["dropped"] == 0.0 and describe_failures(summarise(own, 0.0)) == ""
    assert {str(end) for end in INFRASTRUCTURE} == {"sandbox_lost", "discarded", "checker_lost"}


def told(length: int, *calls: tuple[str, str], correct: bool = False, answer: str | None = "6") -> Trajectory:
    """A scored trajectory of a turn for each (status, program) and a last one of so many tokens."""
    trajectory = Trajectory("p/0", Problem("p", ({"role": "user", "content": "?"},), "6"), end=End.ANSWERED)
    trajectory.add("prompt", [1, 2])
    for turn, (status, program) in enumerate(calls):
        trajectory.add("policy", [3], [-0.5])
        trajectory.add("tool", [4])
        trajectory.tool_uses.append(ToolUse(turn, program, status, ""))
    trajectory.add("policy", [5] * length, [-0.5] * length)
    trajectory.verdict, trajectory.reward = Verdict(correct, answer, "integer"), 1.0 if correct else -1.0
    return trajectory


def test_numbers_have_the_names_that_other_recipes_give_them_too():
    calls = [("success", "print(1)"), ("timeout", "while 1: pass"), ("oom", "x = [0]"), ("invalid_call", "")]
    trajectories = [
        told(4, *calls, correct=True),
        told(8, ("success", "1")),
        told(2, answer=None),
        scored(End.DISCARDED),
    ]
    trajectories[0].exact = True
    trajectories[1].reward_terms = {"recipe": -0.9, "guard": -0.1, "overlong": -0.6}
    numbers = summarise(trajectories, 0.5)
    assert numbers["retool/tool_calls_per_sample"] == numbers["calls_per_sample"] == pytest.approx(5 / 3)
    assert numbers["retool/tool_success_rate"] == numbers["tool_success"] == 0.4
    assert numbers["retool/avg_code_length_chars"] == pytest.approx((8 + 13 + 7 + 1) / 4), "of calls that could be read"
    assert numbers["reward/exact_match"] == pytest.approx(1 / 3)
    assert numbers["reward/format_bonus"] == pytest.approx(2 / 3)
    assert numbers["reward/guarded"] == pytest.approx(1 / 3) and numbers["reward/overlong"] == pytest.approx(-0.2)
    assert numbers["sandbox/timeout_rate"] == numbers["sandbox/oom_rate"] == 0.2


def test_what_a_mean_hides_is_told_by_percentiles():
    numbers = summarise([told(n, *[("success", "1")] * (n > 8)) for n in range(1, 12)], 0.0)
    assert numbers["response_tokens"] == pytest.approx(6 + 2 * 3 / 11)
    assert (numbers["response_tokens_p10"], numbers["response_tokens_p90"]) == (2, 12)
    assert numbers["turns_mean"] == pytest.approx(1 + 3 / 11)
    assert (numbers["turns_p10"], numbers["turns_p90"]) == (1, 2)
    assert (numbers["calls_p10"], numbers["calls_p90"]) == (0, 1)


def test_a_share_of_no_calls_is_no_number():
    numbers = summarise([told(3)], 0.0)
    names = ("tool_success_rate", "avg_code_length_chars")
    assert [numbers[f"retool/{name}"] for name in names] == [None, None] and numbers["sandbox/timeout_rate"] is None


def test_more_dropped_than_allowed_stops_with_reasons_counts_and_the_way_out():
    lost = [scored(End.SANDBOX_LOST)] * 2 + [scored(End.DISCARDED)]
    trajectories = [*lost, scored(End.ANSWERED, True), scored(End.ANSWERED)]
    assert summarise(trajectories, 0.6)["dropped"] == pytest.approx(0.6)
    with pytest.raises(UserError) as caught:
        summarise(trajectories, 0.5)
    assert str(caught.value) == (
        "3 of 5 trajectories were dropped, a share above rl.max_dropped=0.5: 2 sandbox_lost (fault of sandbox_lost), 1"
        " discarded (fault of discarded). This is not the policy's fault, and the run's last checkpoint is good: fix"
        " the cause and start the same command again, or raise rl.max_dropped"
    )


def test_the_limit_is_a_share_below_one():
    assert load(["config=grpo"]).rl.max_dropped == 0.5
    for value in ("1.0", "-0.1"):
        with pytest.raises(UserError, match=rf"rl.max_dropped={value} must be between 0 and 0.99"):
            load(["config=grpo", f"rl.max_dropped={value}"])


def test_answers_that_cost_too_much_are_counted_and_wrong():
    trajectories = [scored(End.ANSWERED, True), scored(End.ANSWERED, False, "timeout")]
    numbers = summarise(trajectories, 0.0)
    assert numbers["checker_timeouts"] == 1 and numbers["accuracy"] == 0.5
    assert describe_failures(numbers) == "1 answers not compared in time, which count as wrong"


def test_the_error_of_an_accuracy_is_that_of_the_problems_that_were_kept(look, tmp_path):
    numbers = look(RIGHT, RIGHT, CALL, RIGHT, WRONG)
    assert numbers["accuracy"] == numbers["greedy_accuracy"] == 0.75 and numbers["dropped"] == pytest.approx(0.2)
    assert numbers["accuracy_stderr"] == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
    records = [json.loads(line) for line in (tmp_path / "run" / numbers["trajectories"]).read_text().splitlines()]
    assert [record["end"] for record in records].count("sandbox_lost") == 1 and len(records) == 5
    assert [record["group"] for record in records] == [0, 1, 2, 3, 4]
    assert numbers["val-core/problems/acc/mean@1"] == 0.75, "of those that were kept"
    assert [numbers[f"val-aux/num_turns/{what}"] for what in ("mean", "min", "max")] == [2, 2, 2], "question and answer"


def test_an_evaluation_goes_by_the_runs_reward_and_its_accuracy_does_not(look):
    numbers = look(RIGHT, WRONG, reward=RewardConfig(name="shaped"))
    assert numbers["reward_mean"] == pytest.approx((1.1 + 0.1) / 2) and numbers["accuracy"] == 0.5
    assert numbers["reward/exact_match"] == 0.0 and numbers["reward/format_bonus"] == 1.0, "40+5 is not the string 45"


def test_an_evaluation_of_too_few_is_an_error(look):
    with pytest.raises(UserError, match=r"3 of 5 trajectories were dropped, .*: 3 sandbox_lost \(worker died\)"):
        look(RIGHT, CALL, CALL, CALL, WRONG)
    assert look(RIGHT, CALL, CALL, CALL, WRONG, max_dropped=0.6)["accuracy"] == 0.5


def test_an_answer_that_cannot_be_compared_is_no_signal(look, monkeypatch):
    pool = SymbolicPool(workers=1)
    monkeypatch.setattr(workers, "pool", pool)
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.01))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.sys, "executable", "/bin/false")
        numbers = look(RIGHT, "I do not know<|im_end|>", "I do not know<|im_end|>")
    assert numbers["end/checker_lost"] == 1 and numbers["dropped"] == pytest.approx(1 / 3)
    assert numbers["accuracy"] == 0.0 and numbers["end/answered"] == 0 and numbers["end/no_answer"] == 2
    assert look(RIGHT)["accuracy"] == 1.0
    pool.close()


def test_the_event_loop_turns_while_answers_are_compared(
    scripted_engine, tokenizer, problems, broken_tools, tmp_path, monkeypatch
):
    """The comparison waits for a worker that has yet to import SymPy, which takes about a second."""
    pool = SymbolicPool(workers=1)
    monkeypatch.setattr(workers, "pool", pool)
    first = (1 << 31) + (SPLITS.index("dev") << 24)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        engine = scripted_engine(tokenizer.stop_ids, {first: [tokenizer.encode(RIGHT)] * 2})
        await evaluate(engine, tokenizer, broken_tools, problems, 0, 1, LIMITS, tmp_path, 0.5)
        ticking.cancel()

    asyncio.run(main())
    pool.close()
    assert ticks > 10


def test_a_step_that_loses_too_much_ends_the_run_before_anything_is_learned(
    scripted_engine, tokenizer, broken_tools, tmp_path
):
    """At `rl.max_dropped` training continues, and then fails because this test has no training state."""
    call = tokenizer.encode(CALL)

    def step(calls: int) -> None:
        run = load(["config=grpo", f"run={tmp_path}", "rl.prompts_per_step=2", "rl.group_size=4", "rl.minibatches=1"])
        turns = [call] * calls + [tokenizer.encode(f"\\boxed{{{i}}}<|im_end|>") for i in range(8 - calls)]
        # What is lost is drawn once more.
        engine = scripted_engine(tokenizer.stop_ids, {request: [turn] * 2 for request, turn in enumerate(turns, 8)})
        clock, sampler = Clock(), Sampler(Problems("arithmetic", "train", 0), run.rl, None, step=1)
        parts = Parts(
            rl=run.rl,
            rollout=run.rollout,
            evaluation=run.evaluation,
            folder=Path(tmp_path),
            tokenizer=tokenizer,
            problems={},
            tools=broken_tools,
            engine=engine,
            rollouts=Collector(engine, tokenizer, broken_tools, sampler, run.rl, run.rollout, step=1),
            learner=None,
            save=None,
            save_every=run.checkpoint.every,
            log=None,
            bar=None,
            clock=clock,
            tokens={},
        )
        try:
            asyncio.run(train(parts, None, 1))  # the second step, before which no look is due
        finally:
            clock.close()

    with pytest.raises(UserError, match="5 of 8 trajectories were dropped, a share above"):
        step(calls=5)
    with pytest.raises(AttributeError, match="no attribute 'params'"):
        step(calls=4)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_every_sample_has_a_request_of_its_own_behind_those_of_training():
    first, last = request_of(0, 0), request_of(MOST_PROBLEMS - 1, MOST_SAMPLES - 1)
    assert first == request_of(1, 0) - MOST_SAMPLES and last == (1 << 32) - 1, "all that the engine takes"
    assert first > (1 << 31) + (len(SPLITS) << 24), "and behind the looks"
    assert len({request_of(i, j) for i in range(300) for j in range(40)}) == 300 * 40
    for problem, sample in ((MOST_PROBLEMS, 0), (0, MOST_SAMPLES), (-1, 0)):
        with pytest.raises(ValueError, match=f"problem {problem}, sample {sample}: below"):
            request_of(problem, sample)


def drawn(engine, tokenizer, tools, samples: list[Sample], stream: bool = True) -> list[tuple[int, Trajectory]]:
    """What `draw` gives to `take`, in that order."""
    found: list[tuple[int, Trajectory]] = []
    asyncio.run(draw(engine, tokenizer, tools, iter(samples), LIMITS, found.extend, stream=stream))
    return found


def test_a_sample_is_what_its_request_draws_whatever_is_drawn_beside_it(make_engine, tokenizer, problems):
    engine = make_engine(slots=2)
    samples = [Sample(problems[i], request_of(i, j), 1.0, 0.9) for i in range(5) for j in range(3)]
    every = {t.id: t for _, t in drawn(engine, tokenizer, None, samples)}
    assert len(every) == 15 and len({tuple(t.ids) for t in every.values()}) == 15
    some = drawn(engine, tokenizer, None, samples[::-4], stream=False)
    for number, one in some:
        assert one.id.endswith(f"/{samples[::-4][number].request}"), "numbered as they were given"
        assert (one.ids, one.end) == (every[one.id].ids, every[one.id].end)
        assert one.logprobs == pytest.approx(every[one.id].logprobs, abs=1e-5)
    plain = drawn(engine, tokenizer, None, [replace(sample, top_p=1.0) for sample in samples[:3]])
    assert any(one.ids != every[one.id].ids for _, one in plain), "top_p reaches the engine"


def test_a_stream_of_samples_is_taken_as_seats_become_free(scripted_engine, tokenizer, problems):
    found: list[tuple[int, Trajectory]] = []
    engine = scripted_engine(tokenizer.stop_ids, {r: [tokenizer.encode(RIGHT)] for r in range(40)}, slots=2)
    under_way = []

    def samples():
        for request in range(40):
            under_way.append(request - len(engine.left))  # rows that were let go, and a kept prompt at times
            yield Sample(problems[0], request)

    asyncio.run(draw(engine, tokenizer, None, samples(), LIMITS, found.extend, stream=True))
    assert sorted(number for number, _ in found) == list(range(40)) and all(t.verdict.correct for _, t in found)
    assert max(under_way) < 20


def test_what_the_machinery_lost_is_drawn_once_more(scripted_engine, tokenizer, problems):
    """The first call of request 0 and both of request 1 are lost, the last one without a way out."""
    lost = ["print(1)", "print(2)"]

    async def run(code: str) -> ToolResult:
        if code == "print(2)" or code in lost:
            lost.remove(code) if code == "print(1)" else None
            return ToolResult("infra_error", backend="process", message="worker died")
        return ToolResult("success", stdout="1\n", backend="process")

    tools = Toolbox([Python(SimpleNamespace(run=run, config=SandboxConfig()))])
    call = [tokenizer.encode(called(f"print({i})")) for i in (1, 2)]
    right = tokenizer.encode(RIGHT)
    script = {0: [call[0], call[0], right], 1: [call[1]] * 2, 2: [right]}
    samples = [Sample(problems[0], request) for request in range(3)]
    found = dict(drawn(scripted_engine(tokenizer.stop_ids, script), tokenizer, tools, samples))
    assert [found[i].end for i in range(3)] == [End.ANSWERED, End.SANDBOX_LOST, End.ANSWERED]
    assert len(found[0].tool_uses) == 1 and found[0].verdict.correct and found[1].verdict is None
    lost.append("print(1)")
    ends = [t.end for _, t in drawn(scripted_engine(tokenizer.stop_ids, script), tokenizer, tools, samples, False)]
    assert ends == [End.SANDBOX_LOST, End.SANDBOX_LOST, End.ANSWERED], "not in a look while a run trains"


class Raising(Toolbox):
    """A toolbox that raises an exception itself, unlike one whose tool fails."""

    async def run(self, call, states):
        raise ZeroDivisionError("of the toolbox")

    def subset(self, names, where):
        return self


def test_a_fault_of_one_conversation_ends_no_other_but_the_engines_ends_all(scripted_engine, tokenizer, problems):
    right, call = tokenizer.encode(RIGHT), tokenizer.encode(CALL)
    samples = [Sample(problems[0], request) for request in range(3)]
    tools = Raising([Python(SimpleNamespace(run=None, config=SandboxConfig()))])
    engine = scripted_engine(tokenizer.stop_ids, {0: [right], 1: [call] * 2, 2: [right]})
    found = dict(drawn(engine, tokenizer, tools, samples))
    assert [found[i].end for i in range(3)] == [End.ANSWERED, End.DISCARDED, End.ANSWERED]
    assert found[1].fault == "ZeroDivisionError: of the toolbox"
    with pytest.raises(ZeroDivisionError):
        drawn(
            scripted_engine(tokenizer.stop_ids, {0: [right], 1: [call], 2: [right]}), tokenizer, tools, samples, False
        )
    with pytest.raises(KeyError):  # a script that is not there: a fault of the engine
        drawn(scripted_engine(tokenizer.stop_ids, {0: [right], 1: [right]}), tokenizer, None, samples)


def test_a_fault_of_whoever_takes_ends_the_drawing(scripted_engine, tokenizer, problems):
    def full(scored) -> None:
        raise OSError(28, "No space left on device")

    engine = scripted_engine(tokenizer.stop_ids, {0: [tokenizer.encode(RIGHT)]})
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(draw(engine, tokenizer, None, [Sample(problems[0], 0)], LIMITS, full, stream=True))


def test_a_look_is_what_a_rollout_of_its_requests_is(make_engine, tokenizer, problems, tmp_path):
    """Equal to the bit, including log-probabilities."""
    engine, first = make_engine(slots=4), (1 << 31) + (SPLITS.index("dev") << 24)
    asyncio.run(evaluate(engine, tokenizer, None, problems, 7, 5, LIMITS, tmp_path, 0.0))
    samples = [Sample(problems[i], first + i, temperature) for temperature in (1.0, 0.0) for i in range(5)]
    expected, _ = asyncio.run(rollout(engine, tokenizer, None, samples, LIMITS))
    score(tokenizer, expected)
    written = []
    for name in ("dev-000007", "dev-000007-greedy"):
        lines = (tmp_path / "trajectories" / f"{name}.jsonl").read_text().splitlines()
        written += [json.loads(line) for line in lines]
    for group, (record, trajectory) in enumerate(zip(written, expected, strict=True)):
        theirs = trajectory.record(tokenizer, split="dev", step=7, group=group % 5)
        assert record | {"timings": 0} == json.loads(json.dumps(theirs)) | {"timings": 0}
