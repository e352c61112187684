"""The config of trajectories and rewards."""

from typing import Literal

from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, NotNegative, Positive


@dataclass(frozen=True, config=CHECKED)
class RolloutConfig:
    """Limits of a trajectory; its total length is the engine's `max_length`."""

    max_prompt_tokens: Positive = 40
    max_turns: Positive = 4  # policy turns, the last of which must be the answer
    turn_tokens: Count | None = 0  # of one turn, up to its call or its end; 0 or null: as many as there is room for
    tool_output_tokens: Positive = 200  # of one tool output; a longer one is cut in the middle
    answer_tokens: Count = 0  # reserved for a forced final answer when turns or tokens run out; 0: end without it
    grammar: Literal["hermes", "retool"] = "hermes"  # of calls: hermes (<tool_call> JSON), retool (the paper's <code>)
    tool_prompt: str = ""
    """The explanation of <code> before a question: a text; paper, for the paper's; empty: a short one."""
    strict_calls: bool = False  # refuse calls that deviate from the grammar, with an error text, even if readable

    def __post_init__(self) -> None:
        if self.tool_prompt and self.grammar != "retool":
            raise UserError(
                f"rollout.tool_prompt explains <code>, and rollout.grammar={self.grammar} is explained by the chat"
                " template; set rollout.grammar=retool, or leave rollout.tool_prompt out"
            )


@dataclass(frozen=True, config=CHECKED)
class RewardConfig:
    """The reward of a trajectory (docs/rewards.md)."""

    name: str = "default"  # or recipe, dapo_strict, shaped, my_package.my_module:my_reward
    guard: bool = True  # in a group without a right answer all get the lowest reward, so that none is reinforced
    overlong_tokens: Count = 0  # the last tokens of the room for a response, over which a penalty grows; 0: none
    overlong_penalty: NotNegative = 1.0  # the penalty at their end (DAPO, arXiv 2503.14476 eq. 13)

    def __post_init__(self) -> None:
        if self.overlong_penalty != RewardConfig.overlong_penalty and not self.overlong_tokens:
            raise UserError(
                f"rl.reward.overlong_penalty={self.overlong_penalty} is what the last of rl.reward.overlong_tokens"
                " cost, and there are none; set these above 0, or leave the penalty out"
            )
