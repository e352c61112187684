"""What a run may set of reinforcement learning."""

from dataclasses import dataclass, field

from retool_jax.errors import UserError
from retool_jax.learn.config import OptimizerConfig

GRAMMARS = ("hermes", "retool")  # as in tokens/protocol.py


@dataclass(frozen=True)
class RolloutConfig:
    """Limits of a trajectory; its total length is the engine's `max_length`."""

    max_prompt_tokens: int = 40
    max_turns: int = 4  # policy turns, the last of which must be the answer
    tool_output_tokens: int = 200  # of one tool output, cut in the middle
    answer_tokens: int = 0  # kept for a last turn, asked for where turns or tokens run out; 0: it ends there
    grammar: str = "hermes"  # how calls are written: hermes (<tool_call> JSON), or retool (the paper's <code>)

    def __post_init__(self) -> None:
        if self.grammar not in GRAMMARS:
            raise UserError(f"rollout.grammar={self.grammar} is not one of: {', '.join(GRAMMARS)}")
        if self.answer_tokens < 0:
            raise UserError(f"rollout.answer_tokens={self.answer_tokens} must be at least 0, which asks for no answer")


@dataclass(frozen=True)
class ClipConfig:
    """Bounds of the probability ratio new / old."""

    low: float = 0.2  # the ratio may fall to 1 - low
    high: float = 0.28  # and rise to 1 + high: more room for unlikely tokens (DAPO, arXiv 2503.14476 section 3.1)
    dual: float = 10.0  # a token with negative advantage A costs at most dual * |A| (arXiv 1912.09729)


@dataclass(frozen=True)
class RLConfig:
    """GRPO: groups of samples, rewards on the final answer, clipped updates."""

    steps: int = 80
    prompts_per_step: int = 24
    group_size: int = 8  # samples per prompt
    minibatches: int = 2  # optimiser steps per rollout; divides prompts_per_step
    max_dropped: float = 0.5  # share of a step's trajectories that the machinery may lose before the run stops
    temperature: float = 1.0
    row_length: int = 256  # T of a packed row; at least engine.max_length
    rows_per_micro: int = 4  # B of a micro-batch
    clip: ClipConfig = field(default_factory=ClipConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out problems, sampled at temperature 1 and greedily."""

    every: int = 10  # RL steps between looks at the dev split; 0 never looks
    problems: int = 256
    answer_tokens: int = 256  # as rollout.answer_tokens, which is training's
    final_split: str = "test"  # for the table before and after RL; use dev while tuning
