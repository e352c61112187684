"""Reinforcement learning with a Python interpreter. One step, in the order of `train` below:

1. Sample n trajectories for each prompt of the step: the policy writes turns, tools answer its calls (`collector.py`,
   `rollout.py`). With `rl.ahead=0` the weights are those of the last update, so the samples are on-policy. A replay
   reads the trajectories of an earlier run from files instead (`replay.py`).
2. Score each trajectory by the final answer in its last turn (`reward.py`).
3. Run the algorithm's other models (critic, reference, teacher) and turn rewards into an advantage for each token that
   the policy sampled (`learner.py`, `advantage.py`). Dropped trajectories (`Trajectory.dropped`) are left out.
4. Pack the trajectories into one batch per optimiser step and update; the loss covers the sampled tokens only
   (`batches.py`, `loss.py`, `learn`). A record in `algorithms.py` names the advantage, the loss and the models.
5. Hand the new weights to the engine.
6. Log, save a checkpoint, and at intervals evaluate on held-out problems (`evaluation`).

With several hosts, each host samples its share of the trajectories, in training and in evaluation, and then all hosts
gather all trajectories. So every host continues with the same batch, and the update is one computation on the devices
of all hosts (`hosts.py`).
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
from retool_jax.evaluation.measure import evaluate, read_evaluation, splits_at
from retool_jax.evaluation.numbers import describe_failures, dropped_reasons, summarise
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
    """What the loop works with. The caller creates and closes it."""

    rl: RLConfig
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    folder: Path  # the run's folder; trajectories are written there
    tokenizer: Tokenizer
    problems: Mapping[str, Problems]  # by split
    tools: Toolbox | None  # already open; None: a text-only run
    engine: Engine | None  # None: a replay, without evaluations
    rollouts: Collector | Replay
    learner: Learner | None  # None: trajectories are sampled and saved, but nothing is trained
    save: Callable[[int, State, dict], None]  # takes the step, the state after it, and `rollouts.state()`
    save_every: int  # steps
    log: MetricsLog
    bar: Progress
    clock: Clock
    tokens: dict[str, int]  # tokens that the run has decoded and trained on so far; the loop adds to it


async def train(p: Parts, state: State, start: int | None) -> None:
    """Train from the state after step `start` to the last step; `start` is None for a run without a checkpoint."""
    if start is None:
        p.save(0, state, p.rollouts.state())
    await evaluate_if_due(p, start or 0)  # of the first weights, or of the step after which the run stopped
    for step in range((start or 0) + 1, p.rl.steps + 1):
        with p.clock.part("rollout"):
            rollouts: Rollouts = await p.rollouts.take()  # 1, 2
            sampled = [*rollouts.trajectories, *rollouts.others]
            numbers = summarise(sampled, p.rl.max_dropped, p.evaluation.purposes, p.tokenizer) | rollouts.numbers
        if (p.rl.save_rollouts or p.rl.rollout_only) and hosts.is_first():
            write_rollouts(rollouts_path(p.folder, step), rollouts.trajectories, p.rl.group_size, p.tokenizer)
        with p.clock.part("update"):
            if p.learner:
                # In a thread, so that rollouts that run ahead continue meanwhile.
                learning = asyncio.to_thread(learn, p.learner, state, rollouts.trajectories, step)
                state, learned, tokens = await learning  # 3, 4
                numbers |= learned
                p.tokens["update"] += tokens
            p.rollouts.update_weights(state.params)  # 5

        p.tokens["decode"] += rollouts.statistics.decoded_tokens  # 6
        p.log.write("rl", step, numbers | performance(rollouts.statistics, sampled))
        speed = rollouts.statistics.decoded_tokens / rollouts.statistics.total_s
        p.bar.step(step, {"accuracy": numbers["accuracy"], "tool rate": numbers["tool_rate"], "tokens/s": speed})
        if warning := describe_failures(numbers):
            p.bar.say(f"step {step}: {warning}{dropped_reasons(sampled)}")
        if warning := skipped(numbers):
            p.bar.say(f"step {step}: {warning}")
        # Save before a long evaluation: a run that is killed in it repeats the evaluation, not the step.
        if step % p.save_every == 0 or step == p.rl.steps:
            p.save(step, state, p.rollouts.state())
        await evaluate_if_due(p, step)


async def evaluate_if_due(p: Parts, step: int) -> None:
    """Measure accuracy on the splits that are due after this step and whose numbers are not in the log yet."""
    due = splits_at(p.evaluation, step, p.rl.steps) if p.engine else []
    for split in due:
        if hosts.broadcast(bool(read_evaluation(p.folder, step, split))):
            continue
        await p.rollouts.drain()  # the evaluation needs the engine for itself
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
        if warning := describe_failures(numbers):
            p.bar.say(f"step {step}: {split}: {warning}")
