"""GRPO with a Python interpreter. One step, in the order of `train` below:

1. Take the step's problems and draw n trajectories for each: the policy writes turns, tools answer its calls
   (`rollout.py`). The weights are those of the last update, so the draws are on-policy.
2. Score each by the final answer in its last turn, and by nothing else (`reward.py`).
3. Subtract the mean reward of its group from each reward and divide by their deviation: the advantage of all tokens
   that the policy drew there (`advantage.py`). Groups of equal rewards, and what the machinery lost, teach nothing and
   are left out (`batches.py`).
4. Pack the rest into one batch per optimiser step and update: a clipped policy loss, averaged over all drawn tokens of
   the batch (`loss.py`, `learn`).
5. Hand the weights to the engine.
6. Log; save; now and then look at held-out problems (`evaluation.py`).
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from retool_jax.clock import Clock
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.learn.optimizer import TrainState
from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Step
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.rl.batches import batches_of, learnable_groups
from retool_jax.rl.config import EvaluationConfig, RLConfig, RolloutConfig
from retool_jax.rl.evaluation import evaluate, faults, looked, splits_at, summarise
from retool_jax.rl.rollout import Sample, rollout, score
from retool_jax.rl.summary import performance
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
    engine: Engine
    update: Step
    save: Callable[[int, TrainState], None]  # the state after a step
    save_every: int  # steps
    log: MetricsLog
    bar: Progress
    clock: Clock
    tokens: dict[str, int]  # decoded, and trained on, by the run so far; the loop counts on


async def train(p: Parts, state: TrainState, start: int | None) -> None:
    """Train from the state after step `start` to the last step; None is a run that has only its first weights."""
    if start is None:
        p.save(0, state)
    await look(p, start or 0)  # what of it is not in the log: a look that was cut off, or that became due since
    for step in range((start or 0) + 1, p.rl.steps + 1):
        with p.clock.part("rollout"):
            samples = samples_of(p.rl, p.problems["train"], step)  # 1
            trajectories, statistics = await rollout(p.engine, p.tokenizer, p.tools, samples, p.rollout)
            await asyncio.to_thread(score, p.tokenizer, trajectories)  # 2
            numbers = summarise(trajectories, p.rl.max_dropped)
        with p.clock.part("update"):
            groups = learnable_groups(trajectories, p.rl.group_size)  # 3
            state, learned = learn(p.update, state, batches_of(p.rl, groups))  # 4
            p.engine.update_params(state.params)  # 5

        p.tokens["decode"] += statistics.decoded_tokens  # 6
        p.tokens["update"] += sum(len(example.ids) for group in groups for example in group)
        numbers |= learned | {"groups_used": len(groups)}
        p.log.write("rl", step, numbers | performance(statistics))
        speed = statistics.decoded_tokens / statistics.total_s
        p.bar.step(step, {"accuracy": numbers["accuracy"], "tool rate": numbers["tool_rate"], "tokens/s": speed})
        if happened := faults(numbers):
            p.bar.say(f"step {step}: {happened}")
        # Before the look, which may take long: a start after a kill takes the look again, not the step.
        if step % p.save_every == 0 or step == p.rl.steps:
            p.save(step, state)
        await look(p, step)


async def look(p: Parts, step: int) -> None:
    """Measure accuracy on the splits whose turn it is after this step and whose numbers are not in the log already."""
    for split in splits_at(p.evaluation, step, p.rl.steps):
        if looked(p.folder, step, split):
            continue
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
            )
        p.log.write("eval", step, numbers)
        p.bar.say(
            f"step {step}: {split} accuracy {numbers['accuracy']:.3f} ± {numbers['accuracy_stderr']:.3f}"
            f" (greedy {numbers['greedy_accuracy']:.3f}), tool rate {numbers['tool_rate']:.2f}"
        )
        if happened := faults(numbers):
            p.bar.say(f"step {step}: {split}: {happened}")


def samples_of(rl: RLConfig, problems: Problems, step: int) -> list[Sample]:
    """The samples of a step, group by group; problems and random streams follow from the step alone."""
    P, n = rl.prompts_per_step, rl.group_size
    first = (step - 1) * P
    return [
        Sample(problems[first + group], (first + group) * n + member, rl.temperature)
        for group in range(P)
        for member in range(n)
    ]


def learn(update: Step, state: TrainState, batches: list[Batch]) -> tuple[TrainState, dict[str, float]]:
    """One optimiser step per batch; returns their mean metrics.

    The first batch is updated with the weights that sampled it, so there the difference between the engine's and
    the trainer's log-probabilities is numerics alone; that is the one to report.
    """
    history = []
    for batch in batches:
        state, metrics = update(state, batch)
        history.append({key: float(value) for key, value in jax.device_get(metrics).items()})
    if not history:
        return state, {}
    means = {key: float(np.mean([metrics[key] for metrics in history])) for key in history[0]}
    return state, means | {"logprob_diff_mean": history[0]["logprob_diff_mean"]}
