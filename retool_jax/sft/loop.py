"""The cold start: imitate demonstrations, so that reinforcement learning has tool calls to choose from.

A step is one update on one packed batch, whose loss is the mean negative log-likelihood of what the demonstrated policy
wrote. Which demonstrations a batch holds follows from the step (`demonstrations.py`), so a resumed run goes on exactly.
"""

import dataclasses

import jax

from retool_jax.checkpoint import Checkpoints
from retool_jax.clock import Clock
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState
from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, Metrics, Step, TokenTerms, skipped
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.sft.config import SFTConfig
from retool_jax.sft.demonstrations import Demonstrations


def imitation_loss(outputs: Columns, batch: Batch) -> TokenTerms:
    """Negative log-likelihood of the demonstrated policy's tokens."""
    return TokenTerms(-outputs["logprobs"], {})


def train(
    state: TrainState,
    start: int,
    batches: Demonstrations,
    update: Step,
    checkpoints: Checkpoints,
    every: int,
    clock: Clock,
    log: MetricsLog,
    bar: Progress,
) -> TrainState:
    """Train from the state after step `start` to the last step, saving after each `every` steps; the final state.

    Numbers of a step are written while the devices compute the next one, or before a save.
    """
    trained, before = 0, clock.seconds.get("update", 0.0)  # the rate is this process's
    batch = batches.at(start) if start < batches.steps else None
    untold: list[tuple[int, Metrics]] = []  # one at most

    def tell() -> None:
        while untold:
            step, metrics = untold.pop()
            log.write("sft", step, metrics)
            bar.step(step, {"loss": float(metrics["loss"]), "tokens/s": metrics["perf/tokens_per_s"]})
            if happened := skipped(metrics):
                bar.say(f"step {step}: {happened}")

    for step in range(start + 1, batches.steps + 1):
        trained += int((batch.segments > 0).sum())
        with clock.part("update"):
            state, metrics = update(state, batch)
            tell()  # the devices compute meanwhile
            if step < batches.steps:
                batch = batches.at(step)
            metrics = jax.device_get(metrics)
        rate = trained / max(clock.seconds["update"] - before, 1e-9)
        untold.append((step, metrics | {"perf/tokens_per_s": rate}))
        if step % every == 0 or step == batches.steps:
            tell()
            checkpoints.save(step, state, {"seconds": clock.seconds, "tokens_per_s": rate, "data": batches.digest})
    return state


def optimizer_of(sft: SFTConfig, steps: int) -> OptimizerConfig:
    """The optimiser with its schedule for a run of `steps`, where that is given as a share of them."""
    if not sft.warmup_fraction:
        return sft.optimizer
    warmup = int(sft.warmup_fraction * steps)
    return dataclasses.replace(sft.optimizer, warmup_steps=warmup, decay_steps=steps - warmup)
