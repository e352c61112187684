"""Rewards of trajectories (docs/rewards.md).

A reward is a function of a trajectory and its verdict, chosen by `rl.reward.name`. In a group without a right answer
all rewards are set to the lowest (`guarded`), and long responses may get a penalty (`overlong_term`).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from retool_jax.answers import Verdict
from retool_jax.errors import UserError, one_line
from retool_jax.rollout.config import RewardConfig
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.tools.toolbox import INVALID, imported

Reward = Callable[[Trajectory, Verdict], float]
NOT_RUN = (INVALID, "rejected")  # statuses of calls that were not executed
STRICT_TAIL = 100  # the strict rule looks for a box in the last so many characters


def strict_box(text: str) -> str | None:
    r"""The answer by the strict rule of verl's `math_dapo`: the last `\boxed{` that begins in the last 100 characters.

    Braces are counted, including escaped ones. A last box that does not end is not an answer, nor is one that begins
    before those characters. verl cuts a response to its last 300 characters first, which changes nothing.
    """
    _, box, content = text[-STRICT_TAIL:].rpartition(r"\boxed{")
    depth = 1
    for place, character in enumerate(content if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return content[:place]
    return None


def executed_calls(trajectory: Trajectory) -> int:
    """The number of calls that ran, however they ended; calls that were invalid or rejected do not count."""
    return sum(use.status not in NOT_RUN for use in trajectory.tool_uses)


# --- rewards by name --------------------------------------------------------------------------------------------------


def default(trajectory: Trajectory, verdict: Verdict) -> float:
    """+1 for a correct answer, -1 for any other (ReTool, arXiv 2504.11536, section 3)."""
    return 1.0 if verdict.correct else -1.0


def dapo_strict(trajectory: Trajectory, verdict: Verdict) -> float:
    """+1 if `strict_box` equals the ground truth character by character, else -1 (verl's `math_dapo`)."""
    return 1.0 if trajectory.exact else -1.0


def recipe(trajectory: Trajectory, verdict: Verdict) -> float:
    """As verl-recipe's `retool/retool.py`: +1 if `strict_box` equals the ground truth, else min(-0.6, -1 + 0.1 k).

    k is the number of executed calls; from the fourth on they add nothing.
    """
    return 1.0 if trajectory.exact else min(-0.6, -1.0 + 0.1 * executed_calls(trajectory))


def shaped(trajectory: Trajectory, verdict: Verdict) -> float:
    """1.0 for a correct answer, 0.1 for an answer in a box, 0.05 for a call, added up: 0 to 1.15.

    The answer is judged as for `default`. A box counts whatever its content, if it is closed and the last turn ended by
    itself. A call counts if it was executed, however it ended, and further calls add nothing. The weights are those in
    the documentation of miles for its ReTool example.
    """
    return 1.0 * verdict.correct + 0.1 * (verdict.answer is not None) + 0.05 * (executed_calls(trajectory) > 0)


REWARDS: dict[str, Reward] = {"default": default, "recipe": recipe, "dapo_strict": dapo_strict, "shaped": shaped}
BY_STRICT_RULE = ("recipe", "dapo_strict")


def reward_named(name: str) -> Reward:
    """The function that `rl.reward.name` chooses.

    Raises:
        UserError: there is no such function, or it cannot be loaded.
    """
    if name in REWARDS:
        return REWARDS[name]
    if ":" not in name:
        raise UserError(f"rl.reward.name={name} is not one of: {', '.join(REWARDS)}, or my_package.my_module:my_reward")
    function = imported(name, "rl.reward.name")
    if not callable(function):
        raise UserError(f"rl.reward.name={name} is no function; it must take a trajectory and a verdict")
    return function


def is_right(config: RewardConfig, trajectory: Trajectory) -> bool:
    """Whether an answer is right for a reward: by the strict rule if the reward uses it, else by the verdict."""
    return trajectory.exact if config.name in BY_STRICT_RULE else trajectory.verdict.correct


# --- a step's rewards -------------------------------------------------------------------------------------------------


class RewardParts(NamedTuple):
    """A trajectory's reward, and the terms that add up to it: the function's by its name, `guard` and `overlong`."""

    reward: float
    terms: dict[str, float]


def rewards_of(config: RewardConfig, trajectories: Sequence[Trajectory], groups: Sequence[int]) -> list[RewardParts]:
    """The rewards of trajectories that have a verdict; `groups` is equal for the samples of one prompt.

    The guard applies first, and the penalty for length is added after it, since it does not reward tool use.

    Raises:
        UserError: the function raised an error, or returned no finite number.
    """
    function = reward_named(config.name)
    own = [_call(function, config.name, trajectory) for trajectory in trajectories]
    right = [is_right(config, trajectory) for trajectory in trajectories]
    levels = guarded(own, right, groups) if config.guard else own
    rewards = []
    for trajectory, value, level in zip(trajectories, own, levels, strict=True):
        terms = {config.name: value}
        if level != value:
            terms["guard"] = level - value
        if penalty := overlong_term(config, trajectory):
            terms["overlong"] = penalty
        rewards.append(RewardParts(level + penalty, terms))
    return rewards


def guarded(rewards: Sequence[float], right: Sequence[bool], groups: Sequence[int]) -> list[float]:
    """The rewards, but in a group without a right answer each sample gets the group's lowest reward.

    Advantages compare the samples of a group. If all are wrong, the sample with the most calls would be reinforced as
    much as a single right answer in another group. Equal rewards teach nothing.
    """
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    levels = list(rewards)
    for indices in members.values():
        if not any(right[index] for index in indices):
            lowest = min(rewards[index] for index in indices)
            for index in indices:
                levels[index] = lowest
    return levels


def overlong_term(config: RewardConfig, trajectory: Trajectory) -> float:
    """The penalty for a long response, 0 or less: p times DAPO's soft punishment (arXiv 2503.14476 eq. 13).

        0                      |y| <= L - C
        ((L - C) - |y|) / C    L - C < |y| <= L
        -1                     if it was cut off (`token_limit`)

    |y| is the response's length in tokens, including tools' answers; L is the room that it had, `engine.max_length`
    without the prompt; C is `overlong_tokens` and p is `overlong_penalty`.
    """
    if not config.overlong_tokens:
        return 0.0
    over = trajectory.response_tokens - (trajectory.room - config.overlong_tokens)
    share = 1.0 if trajectory.end is End.TOKEN_LIMIT else min(over / config.overlong_tokens, 1.0)
    return -config.overlong_penalty * share if share > 0 else 0.0


def _call(function: Reward, name: str, trajectory: Trajectory) -> float:
    """Call a reward function and check that it returns a finite number."""
    way_out = "mend the function and start the same command again, which goes on from the last checkpoint"
    try:
        value = float(function(trajectory, trajectory.verdict))
    except Exception as error:  # of the user's code
        said = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"rl.reward.name={name} gave no number for {trajectory.id} ({said}); {way_out}") from error
    if not math.isfinite(value):
        raise UserError(f"rl.reward.name={name} gave {value} for {trajectory.id}, which is not finite; {way_out}")
    return value
