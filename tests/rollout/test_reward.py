"""Rewards of trajectories: every formula, the guard, the penalty for length, and the user's own functions."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.rl.advantage import group_relative
from retool_jax.rollout.config import RewardConfig
from retool_jax.rollout.reward import reward_named, rewards_of, strict_box
from retool_jax.rollout.rollout import score
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory

RIGHT, WRONG, NO_BOX = Verdict(True, "45", "integer"), Verdict(False, "44", "mismatch"), Verdict(False, None, "no_box")


def scored(verdict: Verdict, *statuses: str, exact: bool | None = None, length: int = 10, **more) -> Trajectory:
    """A trajectory with a response of so many tokens, calls with these statuses, and a verdict."""
    problem = Problem("p", ({"role": "user", "content": "?"},), "45")
    trajectory = Trajectory("p/0", problem, **{"end": End.ANSWERED, "room": 100} | more)
    trajectory.add("prompt", [1, 2])
    trajectory.add("policy", [3] * length, [-0.5] * length)
    trajectory.tool_uses = [ToolUse(0, "1", status, "1") for status in statuses]
    trajectory.verdict, trajectory.exact = verdict, verdict.correct if exact is None else exact
    return trajectory


def worth(config: RewardConfig, *trajectories: Trajectory, groups: list[int] | None = None) -> list[float]:
    """The rewards of trajectories, which are one group by default."""
    given = rewards_of(config, trajectories, [0] * len(trajectories) if groups is None else groups)
    assert all(one.reward == pytest.approx(sum(one.terms.values())) for one in given)
    return [one.reward for one in given]


def alone(name: str, trajectory: Trajectory) -> float:
    return worth(RewardConfig(name=name), trajectory)[0]


# --- the rewards ------------------------------------------------------------------------------------------------------


def test_the_default_is_plus_or_minus_one_with_the_guard_and_without():
    group = [scored(RIGHT), scored(NO_BOX, "success"), scored(Verdict(False, "x", "undecided"))]
    for guard in (True, False):
        config = RewardConfig(guard=guard)
        assert worth(config, *group) == [1.0, -1.0, -1.0] and worth(config, *group[1:]) == [-1.0, -1.0]
    assert [given.terms for given in rewards_of(RewardConfig(), group, [0, 0, 0])][1] == {"default": -1.0}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{42}<|im_end|>", "42"),
        (r"\boxed{'42'}", "'42'"),
        (r"\boxed{ 42 }", " 42 "),
        (r"\boxed{\text{42}}", r"\text{42}"),
        (r"\boxed{1} no, \boxed{42}", "42"),
        (r"\boxed{1} no, \boxed{42", None),  # the last one does not end, and an earlier one is not used instead
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {42}", None),
        (r"\fbox{42}", None),
        ("Answer: 42", None),
        ("", None),
        (r"\boxed{42}" + "x" * 90, "42"),  # begins 100 characters before the end
        (r"\boxed{42}" + "x" * 91, None),
        (r"\boxed{a\}b}", "a\\"),  # an escaped brace counts like any other
    ],
)
def test_the_strict_rule_is_that_of_verls_math_dapo(text, answer):
    assert strict_box(text) == answer


@pytest.mark.parametrize(("calls", "wrong"), [(0, -1.0), (1, -0.9), (3, -0.7), (4, -0.6), (9, -0.6)])
def test_the_recipe_counts_executed_calls_of_wrong_answers(calls, wrong):
    ran = ["success", "user_error", "timeout"] * 3
    assert alone("recipe", scored(WRONG, *ran[:calls])) == pytest.approx(wrong)
    assert alone("recipe", scored(WRONG, *ran[:calls], "invalid_call", "rejected")) == pytest.approx(wrong)
    assert alone("recipe", scored(RIGHT, *ran[:calls])) == 1.0


def test_two_rewards_judge_by_the_strict_rule_and_leave_the_verdict_alone():
    """042 is right, but not equal to 42 as a string."""
    other_spelling = scored(RIGHT, exact=False)
    assert [alone(name, other_spelling) for name in ("dapo_strict", "recipe", "default")] == [-1.0, -1.0, 1.0]
    assert alone("dapo_strict", scored(RIGHT)) == 1.0 and other_spelling.verdict.correct


@pytest.mark.parametrize(
    ("verdict", "statuses", "value"),
    [
        (RIGHT, ["user_error", "success"], 1.15),
        (RIGHT, [], 1.1),
        (WRONG, ["timeout"], 0.15),
        (NO_BOX, ["success"], 0.05),
        (NO_BOX, ["invalid_call"], 0.0),
    ],
)
def test_the_shaped_reward_adds_answer_box_and_call(verdict, statuses, value):
    assert alone("shaped", scored(verdict, *statuses)) == pytest.approx(value)


# --- the guard --------------------------------------------------------------------------------------------------------


def test_calls_are_no_reason_to_prefer_one_wrong_answer_to_another():
    """Without the guard the wrong answer with the most calls gets the advantage of a single right one."""
    group = [scored(WRONG, *["success"] * 4), scored(WRONG), scored(NO_BOX), scored(WRONG)]
    plain = worth(RewardConfig(name="recipe", guard=False), *group)
    assert plain == pytest.approx([-0.6, -1, -1, -1])
    assert group_relative(np.array(plain))[0] == pytest.approx(group_relative(np.array([1.0, -1, -1, -1]))[0], abs=1e-3)
    assert worth(RewardConfig(name="recipe"), *group) == [-1.0] * 4
    assert worth(RewardConfig(name="shaped"), *group) == [0.0] * 4
    terms = rewards_of(RewardConfig(name="recipe"), group, [0] * 4)[0].terms
    assert terms == {"recipe": -0.6, "guard": pytest.approx(-0.4)}


def test_a_right_answer_in_its_own_group_keeps_a_groups_rewards():
    trajectories = [scored(RIGHT), scored(WRONG, "success"), scored(WRONG, "success"), scored(WRONG)]
    assert worth(RewardConfig(name="recipe"), *trajectories) == pytest.approx([1.0, -0.9, -0.9, -1.0])
    by_group = worth(RewardConfig(name="recipe"), *trajectories, groups=[7, 7, 3, 3])
    assert by_group == pytest.approx([1.0, -0.9, -1.0, -1.0])


def test_the_guard_asks_the_rule_that_the_reward_goes_by():
    """No answer is right by the strict rule, so only calls would distinguish the samples."""
    group = [scored(RIGHT, "success", exact=False), scored(WRONG)]
    assert worth(RewardConfig(name="recipe"), *group) == [-1.0, -1.0]
    assert worth(RewardConfig(name="shaped"), *group) == pytest.approx([1.15, 0.1])


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "penalty"), [(10, 0), (60, 0), (61, -0.025), (80, -0.5), (100, -1), (130, -1)])
def test_the_end_of_the_room_costs_what_dapo_says(length, penalty):
    config = RewardConfig(overlong_tokens=40)
    assert worth(config, scored(RIGHT, length=length)) == [pytest.approx(1 + penalty)]
    assert worth(RewardConfig(overlong_tokens=40, overlong_penalty=0.5), scored(WRONG, length=length)) == [
        pytest.approx(-1 + penalty / 2)
    ]
    (given,) = rewards_of(config, [scored(RIGHT, length=length)], [0])
    assert given.terms == {"default": 1.0} | ({"overlong": pytest.approx(penalty)} if penalty else {})


def test_a_cut_off_response_gets_the_full_penalty_if_there_is_one():
    short = scored(NO_BOX, length=5, end=End.TOKEN_LIMIT)
    assert worth(RewardConfig(overlong_tokens=40), short) == [-2.0] and worth(RewardConfig(), short) == [-1.0]


def test_the_length_penalty_is_added_after_the_guard():
    group = [scored(WRONG, "success", length=100), scored(WRONG, length=10)]
    assert worth(RewardConfig(name="recipe", overlong_tokens=40), *group) == [-2.0, -1.0]


# --- the user's own functions -----------------------------------------------------------------------------------------

OWN = """
import numpy as np

def brief(trajectory, verdict):
    return np.float32(verdict.correct) - trajectory.response_tokens / trajectory.room

def absent(trajectory, verdict):
    return None

def endless(trajectory, verdict):
    return float("nan")

def broken(trajectory, verdict):
    raise ValueError("two\\nlines")

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch) -> Iterator[str]:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_a_users_reward_function_gets_the_trajectory_and_the_verdict(own):
    name = f"{own}:brief"
    given = rewards_of(RewardConfig(name=name, overlong_tokens=10), [scored(RIGHT), scored(WRONG)], [0, 1])
    assert [one.reward for one in given] == pytest.approx([0.9, -0.1])
    assert given[0].terms == {name: pytest.approx(0.9)}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("absent", r"gave no number for p/0 \(TypeError: .*NoneType"),
        ("broken", r"gave no number for p/0 \(ValueError: two lines\)"),
        ("endless", "gave nan for p/0, which is not finite"),
    ],
)
def test_a_function_that_gives_no_number_is_named(own, function, said):
    with pytest.raises(UserError, match=rf"rl.reward.name=own_rewards:{function} {said}.*start the same command") as no:
        worth(RewardConfig(name=f"{own}:{function}"), scored(RIGHT))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("recpie", "rl.reward.name=recpie is not one of: default, recipe, dapo_strict, shaped, or my_package"),
        ("own_rewards:nothing", r"rl.reward.name=own_rewards:nothing cannot be loaded \(AttributeError"),
        ("no_such_module:reward", r"cannot be loaded \(ModuleNotFoundError"),
        ("own_rewards:number", "rl.reward.name=own_rewards:number is no function"),
    ],
)
def test_an_unknown_reward_name_is_reported(own, name, said):
    with pytest.raises(UserError, match=said):
        reward_named(name)


# --- from ids to rewards ----------------------------------------------------------------------------------------------


def spoken(tokenizer, text: str, end: End = End.ANSWERED, printed: str = "", room: int = 300) -> Trajectory:
    """A trajectory whose policy called a tool, if `printed` is given, and then wrote a text."""
    trajectory = Trajectory("p/0", Problem("p", ({"role": "user", "content": "?"},), "42"), end=end, room=room)
    trajectory.add("prompt", [1, 2])
    if printed:
        trajectory.add("policy", [3], [-0.5])
        trajectory.add("tool", tokenizer.encode(printed))
        trajectory.tool_uses = [ToolUse(0, "print()", "success", printed)]
    ids = tokenizer.encode(text)
    trajectory.add("policy", ids, [-0.5] * len(ids))
    return trajectory


def test_scoring_gives_terms_beside_a_verdict_that_stays_apart(tokenizer):
    said = [r"\boxed{042}<|im_end|>", r"\boxed{42}<|im_end|>", r"\boxed{41}<|im_end|>", "I do not know.<|im_end|>"]
    trajectories = [spoken(tokenizer, text, printed="6") for text in said]
    trajectories[3].end = End.NO_ANSWER
    trajectories[2].tool_uses *= 2  # it would get 0.1 more if its group had a right answer
    score(tokenizer, trajectories, RewardConfig(name="recipe"), group_size=2)
    assert [t.verdict.correct for t in trajectories] == [True, True, False, False]
    assert [t.exact for t in trajectories] == [False, True, False, False]
    assert [t.reward for t in trajectories] == pytest.approx([-0.9, 1.0, -0.9, -0.9])
    assert [t.final_text for t in trajectories] == [text.removesuffix("<|im_end|>") for text in said]
    record = trajectories[0].record(tokenizer, group=0)
    assert (record["correct"], record["exact_match"], record["reward_terms"]) == (True, False, {"recipe": -0.9})
    assert (record["prompt_id"], record["group"]) == ("p", 0)


def test_a_box_that_a_tool_printed_is_not_an_answer(tokenizer):
    printed = spoken(tokenizer, "So it is.<|im_end|>", End.NO_ANSWER, printed=r"\boxed{42}")
    cut_off = spoken(tokenizer, r"\boxed{42}", End.TOKEN_LIMIT)
    score(tokenizer, [printed, cut_off], RewardConfig(name="dapo_strict"))
    assert [t.exact for t in (printed, cut_off)] == [False, False] and printed.reward == cut_off.reward == -1.0
    assert cut_off.final_text == ""


def test_a_dropped_trajectory_gets_no_reward_and_does_not_shift_its_group(tokenizer):
    said = [r"\boxed{42}<|im_end|>", r"\boxed{1}<|im_end|>"] * 2
    trajectories = [spoken(tokenizer, text, printed="6") for text in said]
    trajectories[0].end = End.SANDBOX_LOST
    score(tokenizer, trajectories, RewardConfig(name="recipe"), group_size=2)
    assert [t.reward for t in trajectories] == [None, -0.9, 1.0, -0.9]
    assert trajectories[0].reward_terms == {} and trajectories[0].record(tokenizer)["reward"] is None


def test_an_end_mark_takes_no_room_from_the_strict_rule(tokenizer):
    for distance, exact in ((100, True), (101, False)):
        text = r"\boxed{42}" + "x" * (distance - 10)
        trajectory = spoken(tokenizer, f"{text}<|im_end|>")
        score(tokenizer, [trajectory])
        assert trajectory.exact is exact and trajectory.verdict.correct and trajectory.reward == 1.0
