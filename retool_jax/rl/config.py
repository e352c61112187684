"""What a run may set of reinforcement learning."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, NotNegative, Positive, Share
from retool_jax.learn.config import OptimizerConfig


@dataclass(frozen=True, config=CHECKED)
class RolloutConfig:
    """Limits of a trajectory; its total length is the engine's `max_length`."""

    max_prompt_tokens: Positive = 40
    max_turns: Positive = 4  # policy turns, the last of which must be the answer
    turn_tokens: Count | None = 0  # of one turn, up to its call or its end; 0 or null: as many as there is room for
    tool_output_tokens: Positive = 200  # of one tool output, cut in the middle
    answer_tokens: Count = 0  # kept for a last turn, asked for where turns or tokens run out; 0: it ends there
    grammar: Literal["hermes", "retool"] = "hermes"  # of calls: hermes (<tool_call> JSON), retool (the paper's <code>)
    tool_prompt: str = ""
    """What explains <code> before a question: a text; paper, for the paper's; empty: a short one."""
    strict_calls: bool = False  # refuse, in words, calls that could be read but are not as the grammar writes them

    def __post_init__(self) -> None:
        if self.tool_prompt and self.grammar != "retool":
            raise UserError(
                f"rollout.tool_prompt explains <code>, and rollout.grammar={self.grammar} is explained by the chat"
                " template; set rollout.grammar=retool, or leave rollout.tool_prompt out"
            )


@dataclass(frozen=True, config=CHECKED)
class ClipConfig:
    """Bounds of the probability ratio new / old."""

    low: Share = 0.2  # the ratio may fall to 1 - low
    high: NotNegative = 0.28  # and rise to 1 + high: more room for unlikely tokens (DAPO, arXiv 2503.14476 section 3.1)
    dual: Annotated[float, Field(ge=1)] = 10.0
    """A token with negative advantage A costs at most dual * |A| (arXiv 1912.09729)."""


@dataclass(frozen=True, config=CHECKED)
class RLConfig:
    """GRPO: groups of samples, rewards on the final answer, clipped updates."""

    steps: Positive = 80
    prompts_per_step: Positive = 24
    group_size: Annotated[int, Field(ge=2)] = 8  # samples per prompt, which are compared
    minibatches: Positive = 2  # optimiser steps per rollout; divides prompts_per_step
    max_dropped: Annotated[float, Field(ge=0, le=0.99)] = 0.5
    """Share of a step's trajectories that the machinery may lose before the run stops."""
    temperature: Annotated[float, Field(gt=0)] = 1.0  # above 0: groups need different samples
    row_length: Positive = 256  # T of a packed row; at least engine.max_length
    rows_per_micro: Positive = 4  # B of a micro-batch
    clip: ClipConfig = ClipConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        if self.prompts_per_step % self.minibatches:
            raise UserError(
                f"rl.prompts_per_step={self.prompts_per_step} does not divide into rl.minibatches={self.minibatches};"
                f" choose prompts_per_step as a multiple of {self.minibatches}"
            )


@dataclass(frozen=True, config=CHECKED)
class EvaluationConfig:
    """Accuracy on held-out problems, sampled at temperature 1 and greedily."""

    every: Count = 10  # RL steps between looks at the dev split; 0 never looks
    problems: Positive = 256
    answer_tokens: Count = 256  # as rollout.answer_tokens, which is training's
    final_split: Literal["dev", "test"] = "test"  # for the table before and after RL; use dev while tuning
