"""Reinforcement learning with a Python interpreter. One step, in the order of `train` below:

1. Draw n trajectories for each of the step's prompts: the policy writes turns, tools answer its calls (`collector.py`,
   `rollout.py`). With `rl.ahead=0` the weights are those of the last update, so the draws are on-policy. A replay
   takes those of an earlier run from files instead (`replay.py`).
2. Score each by the final answer in its last turn (`reward.py`).
3. Ask the models that the algorithm has beside the policy, and turn rewards into the advantage of each token that the
   policy drew (`learner.py`, `advantage.py`). What the machinery lost has no part in it.
4. Pack them into one batch per optimiser step and update: a loss that covers the drawn tokens and no others
   (`batches.py`, `loss.py`, `learn`). Which advantage, which loss and which models is one record of `algorithms.py`.
5. Hand the weights to the engine.
6. Log; save; now and then look at held-out problems (`evaluation.py`).

Of several hosts each draws its share of 1 and of the looks, and the trajectories of all come together there. So each
does the rest with the same batch, and the update is one computation on the devices of all (`hosts.py`).
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retool_jax import hosts
from retool_jax.clock import Clock
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.evaluation.config import EvaluationConfig
from retool_jax.evaluation.measure import evaluate, looked, splits_at
from retool_jax.evaluation.numbers import faults, reasons, summarise
from retool_jax.learn.step import skipped
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.rl.collector import Collector, Rollouts
from retool_jax.rl.config import RLConfig
from retool_jax.rl.learner import Learner, State, learn
from retool_jax.rl.replay import Replay, rollouts_path, write_rollouts
from retool_jax.rl.summary import performance
from retool_jax.rollout.config import RolloutConfig
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox


@dataclass(frozen=True)
class Parts:
    """What the loop works with: made, and closed in the end, by whoever calls it."""

    rl: RLConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    folder: Path  # of the run; trajectories are written there
    tokenizer: Tokenizer
    problems: Mapping[str, Problems]  # by split
    tools: Toolbox | None  # open; None: a text-only run
    engine: Engine | None  # None: the rollouts are those of a replay, and nothing is looked at
    rollouts: Collector | Replay
    learner: Learner | None  # None: trajectories are drawn and kept, and nothing is learned
    save: Callable[[int, State, dict], None]  # the state after a step, and where the rollouts stand
    save_every: int  # steps
    log: MetricsLog
    bar: Progress
    clock: Clock
    tokens: dict[str, int]  # decoded, and trained on, by the run so far; the loop counts on


async def train(p: Parts, state: State, start: int | None) -> None:
    """Train from the state after step `start` to the last step; None is a run that has only its first weights."""
    if start is None:
        p.save(0, state, p.rollouts.state())
    await look(p, start or 0)  # what of it is not in the log: a look that was cut off, or that became due since
    for step in range((start or 0) + 1, p.rl.steps + 1):
        with p.clock.part("rollout"):
            drawn: Rollouts = await p.rollouts.take()  # 1, 2
            every = [*drawn.trajectories, *drawn.others]
            numbers = summarise(every, p.rl.max_dropped, p.evaluation.purposes, p.tokenizer) | drawn.numbers
        if (p.rl.save_rollouts or p.rl.rollout_only) and hosts.is_first():
            write_rollouts(rollouts_path(p.folder, step), drawn.trajectories, p.rl.group_size, p.tokenizer)
        with p.clock.part("update"):
            if p.learner:
                # In a thread, so that rollouts that run ahead go on meanwhile.
                work = asyncio.to_thread(learn, p.learner, state, drawn.trajectories, step)
                state, learned, tokens = await work  # 3, 4
                numbers |= learned
                p.tokens["update"] += tokens
            p.rollouts.updated(state.params)  # 5

        p.tokens["decode"] += drawn.statistics.decoded_tokens  # 6
        p.log.write("rl", step, numbers | performance(drawn.statistics, every))
        speed = drawn.statistics.decoded_tokens / drawn.statistics.total_s
        p.bar.step(step, {"accuracy": numbers["accuracy"], "tool rate": numbers["tool_rate"], "tokens/s": speed})
        if happened := faults(numbers):
            p.bar.say(f"step {step}: {happened}{reasons(every)}")
        if happened := skipped(numbers):
            p.bar.say(f"step {step}: {happened}")
        # Before the look, which may take long: a start after a kill takes the look again, not the step.
        if step % p.save_every == 0 or step == p.rl.steps:
            p.save(step, state, p.rollouts.state())
        await look(p, step)


async def look(p: Parts, step: int) -> None:
    """Measure accuracy on the splits whose turn it is after this step and whose numbers are not in the log already."""
    due = splits_at(p.evaluation, step, p.rl.steps) if p.engine else []
    for split in due:
        if hosts.agreed(bool(looked(p.folder, step, split))):
            continue
        await p.rollouts.settle()  # the engine is the look's alone
        with p.clock.part("evaluation"):
            numbers = await evaluate(
                p.engine,
                p.tokenizer,
                p.tools,
                p.problems[split],
                step,
                p.evaluation.problems,
                replace(p.rollout, answer_tokens=p.evaluation.answer_tokens),
                p.folder,
                p.rl.max_dropped,
                p.rl.reward,
                p.evaluation.purposes,
            )
        p.log.write("eval", step, numbers)
        p.bar.say(
            f"step {step}: {split} accuracy {numbers['accuracy']:.3f} ± {numbers['accuracy_stderr']:.3f}"
            f" (greedy {numbers['greedy_accuracy']:.3f}), tool rate {numbers['tool_rate']:.2f}"
        )
        if happened := faults(numbers):
            p.bar.say(f"step {step}: {split}: {happened}")
