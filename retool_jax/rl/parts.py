"""The parts that the loop of RL works with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from retool_jax.clock import Clock
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.learn.optimizer import TrainState
from retool_jax.learn.step import Step
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.rl.config import EvaluationConfig, RLConfig, RolloutConfig
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox


@dataclass(frozen=True)
class Parts:
    """Made, and closed in the end, by whoever calls the loop."""

    rl: RLConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    folder: Path  # of the run; trajectories are written there
    tokenizer: Tokenizer
    problems: Mapping[str, Problems]  # by split
    tools: Toolbox | None  # open; None: a text-only run
    engine: Engine
    update: Step
    save: Callable[[int, TrainState], None]  # the state after a step
    save_every: int  # steps
    log: MetricsLog
    bar: Progress
    clock: Clock
    tokens: dict[str, int]  # decoded, and trained on, by the run so far; the loop counts on
