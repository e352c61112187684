"""The curves of the paper: a scripted policy of known behaviour yields known values, in both grammars."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.evaluation.behaviour import behaviour, code_lines
from retool_jax.evaluation.numbers import summarise
from retool_jax.evaluation.purposes import MOST_NAMES
from retool_jax.rl.replay import read_rollouts, write_rollouts
from retool_jax.rollout.config import RolloutConfig
from retool_jax.rollout.rollout import Sample, encode_prompt, rollout, score
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory
from retool_jax.sandbox import SandboxConfig, ToolResult
from retool_jax.tokens.grammar import GRAMMARS, policy_turn_text
from retool_jax.tools.python import Python
from retool_jax.tools.toolbox import Toolbox

USER = {"role": "user", "content": "What is gcd(12, 18)?"}
RIGHT, WRONG = "So it is \\boxed{6}.<|im_end|>", "So it is \\boxed{7}.<|im_end|>"

# Programs named after their outcome, with their lines and purposes.
GCD = "import math\n\n# of both\nprint(math.gcd(12, 18))"  # 2 lines, calculation
DIVISORS = "for d in range(1, 13):\n    if 12 % d == 18 % d == 0:\n        print(d)"  # 3 lines, search
CHECK = "assert 12 % 6 == 0"  # 1 line, verification
BROKEN = "print(math.gcd(12, 18)"  # 1 line, unparsable
ENDLESS = "while True:\n    pass  # for ever"  # 2 lines, calculation
STATUS = {GCD: "success", DIVISORS: "success", CHECK: "success", BROKEN: "user_error", ENDLESS: "timeout"}


def hermes_call(code: str) -> str:
    function = {"name": "code_interpreter", "arguments": {"code": code}}
    return policy_turn_text({"content": "", "tool_calls": [{"function": function}]})


CALLS = {"hermes": hermes_call, "retool": lambda code: f"<code>\n```python\n{code}\n```\n</code>"}
MARKS = {"hermes": "<tool_call>\n", "retool": "<code>\n"}
UNREADABLE = {"hermes": "<tool_call>\n{</tool_call><|im_end|>", "retool": "<code>\n```ruby\nputs 6\n```</code>"}


@pytest.fixture
def play(scripted_engine, tokenizer) -> Callable[..., list[Trajectory]]:
    """`play(grammar, scripts...)`: scored trajectories of these turns of ids; `STATUS` says how the sandbox ends."""

    async def run_program(code: str) -> ToolResult:
        return ToolResult(STATUS[code], stdout="6", queue_s=0.5)

    def run(grammar: str, *scripts: list[list[int]]) -> list[Trajectory]:
        limits = RolloutConfig(max_prompt_tokens=400, max_turns=4, grammar=grammar)
        tools = Toolbox([Python(SimpleNamespace(run=run_program, config=SandboxConfig()))])
        stop_ids = GRAMMARS[grammar].stop_ids(tokenizer)
        engine = scripted_engine(stop_ids, dict(enumerate(scripts)), max_length=2000, decode_steps=100)
        samples = [Sample(Problem("p", (USER,), "6"), request) for request in range(len(scripts))]
        trajectories, _ = asyncio.run(rollout(engine, tokenizer, tools, samples, limits))
        score(tokenizer, trajectories)
        return trajectories

    return run


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_policy_of_known_behaviour_has_the_known_curves(grammar, tokenizer, play):
    call, encode = CALLS[grammar], tokenizer.encode
    thought = {length: encode("a") * length for length in (0, 3, 10, 40)}
    assert all(len(ids) == length for length, ids in thought.items())
    scripts = [
        # Right: a program that breaks, one that works.
        [thought[10] + encode(call(BROKEN)), thought[3] + encode(call(GCD)), encode(RIGHT)],
        # Wrong: one that works, one that does not end.
        [thought[3] + encode(call(DIVISORS)), thought[40] + encode(call(ENDLESS)), encode(WRONG)],
        # Right, and without a program that could be read.
        [thought[10] + encode(UNREADABLE[grammar]), encode(RIGHT)],
        [encode(WRONG)],
        # Wrong, with two that work; no thought before the first.
        [encode(call(GCD)), thought[40] + encode(call(CHECK)), encode(WRONG)],
    ]
    trajectories = play(grammar, *scripts)
    assert [t.end for t in trajectories] == [End.ANSWERED] * 5
    assert [t.verdict.correct for t in trajectories] == [True, False, True, False, False]
    assert [use.status for use in trajectories[2].tool_uses] == ["invalid_call"]
    numbers = summarise(trajectories, 0.0)
    assert numbers["response_tokens"] == sum(t.response_tokens for t in trajectories) / 5
    assert numbers["behaviour/code_ratio"] == 3 / 5
    assert numbers["behaviour/code_lines"] == (1 + 2 + 3 + 2 + 2 + 1) / 5
    assert numbers["behaviour/correct_codes"] == 4
    assert numbers["behaviour/last_code_pass_right"] == 1.0
    assert numbers["behaviour/last_code_pass_wrong"] == 1 / 2

    # The thought before a call is as long as it was made; a turn and the answer to it stand before the second call.
    lengths = [t.response_tokens for t in trajectories]
    tools = [[s.stop - s.start for s in t.segments if s.role == "tool"] for t in trajectories]
    first = [10 / lengths[0], 3 / lengths[1], 0.0]
    second = [
        (len(scripts[i][0]) + tools[i][0] + thinking) / lengths[i]
        for i, thinking in zip((0, 1, 4), (3, 40, 40), strict=True)
    ]
    assert numbers["behaviour/timing"] == pytest.approx(sum(first) / 3)
    assert numbers["behaviour/timing_mean_all"] == pytest.approx(sum(first + second) / 6)
    shares = {"calculation": 3 / 6, "search": 1 / 6, "verification": 1 / 6, "unparsable": 1 / 6}
    assert {name: share for name, share in numbers.items() if "/purpose/" in name and share} == {
        f"behaviour/purpose/{name}": share for name, share in shares.items()
    }
    assert numbers["behaviour/purposes"] == 3, "what does not parse has none"
    for trajectory in trajectories:
        for use in trajectory.record(tokenizer)["tool_calls"]:
            assert tokenizer.decode(trajectory.ids[use["start"] :]).startswith(MARKS[grammar])


def test_calls_of_one_turn_begin_each_at_its_own_mark(tokenizer, play):
    one, other = (tokenizer.encode(hermes_call(code).removesuffix("<|im_end|>")) for code in (GCD, CHECK))
    turn = tokenizer.encode("a") * 2 + one + tokenizer.encode(" and") + other + tokenizer.encode("<|im_end|>")
    (trajectory,) = play("hermes", [turn, tokenizer.encode(RIGHT)])
    prompt = trajectory.segments[0].stop
    assert [use.start - prompt for use in trajectory.tool_uses] == [2, 2 + len(one) + len(tokenizer.encode(" and"))]


# --- by hand ----------------------------------------------------------------------------------------------------------


def coded(*programs: tuple[str, str], right: bool = True, **more) -> Trajectory:
    """A scored trajectory of two ids of prompt and ten of response, with a program (status, code) at each even id."""
    trajectory = Trajectory("p/0", Problem("p", (USER,), "6"), end=End.ANSWERED)
    trajectory.add("prompt", [1, 2])
    trajectory.add("policy", list(range(3, 13)), [-0.5] * 10)
    trajectory.tool_uses = [
        ToolUse(0, code, status, "6", **{"start": 2 + 2 * i, "tool": "code_interpreter"} | more)
        for i, (status, code) in enumerate(programs, 1)
    ]
    trajectory.verdict, trajectory.reward = Verdict(right, "6", "integer"), 1.0 if right else -1.0
    return trajectory


def test_what_is_not_there_is_no_number():
    numbers = behaviour([coded(), coded(right=False)])
    assert numbers["behaviour/code_ratio"] == numbers["behaviour/code_lines"] == numbers["behaviour/correct_codes"] == 0
    shares = {name for name, value in numbers.items() if value is None}
    assert {"behaviour/timing", "behaviour/last_code_pass_right", "behaviour/purpose/search"} <= shares
    assert numbers["behaviour/purposes"] == 0
    numbers = behaviour([coded(("success", GCD))])
    assert numbers["behaviour/last_code_pass_right"] == 1.0 and numbers["behaviour/last_code_pass_wrong"] is None
    assert numbers["behaviour/purpose/search"] == 0.0


def test_calls_of_other_tools_are_no_programs():
    other = coded(("success", '{"text": "six"}'), tool="shout")
    blank = coded(("success", " \n"))
    assert behaviour([other, blank, coded(("success", "6"))])["behaviour/code_ratio"] == 1 / 3


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("", 0),
        ("\n \n\t\n", 0),
        ("# a\n  # b", 0),
        ("x = 1  # one\r\n\r\nprint(x)\r\n", 2),
        ("if x:\n    y = 1\n\n    # so\n", 2),
        ('print("""\n# no comment, and not counted\ntext\n""")', 3),
    ],
)
def test_lines_of_code_are_those_that_say_something(code, lines):
    assert code_lines(code) == lines


def test_records_from_before_starts_were_noted_are_read_and_have_no_timing(tmp_path):
    old, new = coded(("success", GCD), ("success", CHECK)), coded(("success", GCD))
    path = tmp_path / "step.jsonl"
    write_rollouts(path, [old, new], 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [use.pop("start") for use in lines[0]["tool_uses"]] == [4, 6]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    old, new = read_rollouts(path)
    assert [use.start for t in (old, new) for use in t.tool_uses] == [-1, -1, 4]
    assert behaviour([old])["behaviour/timing"] is None and behaviour([old])["behaviour/correct_codes"] == 2
    both = behaviour([old, new])
    assert both["behaviour/timing"] == both["behaviour/timing_mean_all"] == 0.2
    new.tool_uses[0].start = 99  # of another trajectory, in a file that somebody made
    assert behaviour([new])["behaviour/timing"] is None


def test_dropped_trajectories_have_no_part_in_it():
    lost = coded(("success", GCD))
    lost.end, lost.verdict, lost.reward = End.SANDBOX_LOST, None, None
    numbers = summarise([lost, coded()], 0.5)
    assert numbers["behaviour/code_ratio"] == 0.0 and numbers["behaviour/correct_codes"] == 0


# --- a user's classifier ----------------------------------------------------------------------------------------------

heard: list[tuple[str, str]] = []


def listen(code: str, context: str) -> str:
    """Keep what it is asked."""
    heard.append((code, context))
    return "Long  Division! é" + "-" * 10_000


def moody(code: str, context: str) -> str:
    """No two programs have one purpose, some have none and some raise."""
    if code == "0":
        raise RuntimeError("no mood")
    return {"1": None, "2": "", "3": "\x00/\n", "5": "a" * 10_000}.get(code, code)


no_function = 6


def test_a_classifier_of_ones_own_sees_each_program_once_and_what_stands_before_it(tokenizer, play):
    heard.clear()
    turns = [tokenizer.encode("Hm." + hermes_call(GCD)), tokenizer.encode(RIGHT)]
    trajectories = play("hermes", turns, turns)
    numbers = summarise(trajectories, 0.0, f"{__name__}:listen", tokenizer)
    problem, limits = trajectories[0].problem, RolloutConfig(max_prompt_tokens=400)
    tools = Toolbox([Python()])
    assert heard == [(GCD, tokenizer.decode(encode_prompt(tokenizer, problem, tools, limits)) + "Hm.")]
    found = {name: value for name, value in numbers.items() if "/purpose" in name}
    assert found == {"behaviour/purposes": 1, "behaviour/purpose/long_division": 1.0}
    assert summarise(trajectories, 0.0, f"{__name__}:listen") and heard[-1] == (GCD, "")
    old = coded(("success", "6"), start=-1)
    assert behaviour([old], f"{__name__}:listen", tokenizer) and heard[-1] == ("6", "")


def test_what_a_classifier_says_cannot_end_a_run_or_flood_its_numbers():
    programs = [("success", str(i)) for i in range(100)] + [("success", "7")] * 5
    numbers = behaviour([coded(*programs)], f"{__name__}:moody")
    shares = {name.removeprefix("behaviour/purpose/"): n for name, n in numbers.items() if "/purpose/" in name}
    assert len(shares) <= MOST_NAMES and sum(shares.values()) == pytest.approx(1)
    assert shares["7"] == 6 / 105 and shares["other"] > 0.7 and numbers["behaviour/purposes"] == len(shares)
    few = behaviour([coded(*programs[:6])], f"{__name__}:moody")
    assert {name: n for name, n in few.items() if "/purpose" in name} == {
        "behaviour/purposes": 3,
        "behaviour/purpose/failed": 1 / 6,
        "behaviour/purpose/other": 3 / 6,
        "behaviour/purpose/4": 1 / 6,
        f"behaviour/purpose/{'a' * 32}": 1 / 6,
    }
