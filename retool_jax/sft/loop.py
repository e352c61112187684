"""The cold start: imitate demonstrations, so that the policy makes tool calls from which RL can learn.

A step is one update on one packed batch. Its loss is the mean negative log-likelihood of the tokens that the
demonstrated policy wrote. The step number determines the demonstrations of its batch (`demonstrations.py`), so a
resumed run continues exactly.
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
    """Train from the state after step `start` to the last step, saving every `every` steps; returns the final state.

    The metrics of a step are logged while the devices compute the next step, or before a save.
    """
    trained, before = 0, clock.seconds.get("update", 0.0)  # the tokens/s are those of this process
    batch = batches.at(start) if start < batches.steps else None
    pending: list[tuple[int, Metrics]] = []  # at most one step, not logged yet

    def log_pending() -> None:
        while pending:
            step, metrics = pending.pop()
            log.write("sft", step, metrics)
            bar.step(step, {"loss": float(metrics["loss"]), "tokens/s": metrics["perf/tokens_per_s"]})
            if warning := skipped(metrics):
                bar.say(f"step {step}: {warning}")

    for step in range(start + 1, batches.steps + 1):
        trained += int((batch.segments > 0).sum())
        with clock.part("update"):
            state, metrics = update(state, batch)
            log_pending()  # while the devices compute
            if step < batches.steps:
                batch = batches.at(step)
            metrics = jax.device_get(metrics)
        rate = trained / max(clock.seconds["update"] - before, 1e-9)
        pending.append((step, metrics | {"perf/tokens_per_s": rate}))
        if step % every == 0 or step == batches.steps:
            log_pending()
            checkpoints.save(step, state, {"seconds": clock.seconds, "tokens_per_s": rate, "data": batches.digest})
    return state


def optimizer_of(sft: SFTConfig, steps: int) -> OptimizerConfig:
    """The optimiser's config for a run of `steps`, with the schedule that `sft.warmup_fraction` sets."""
    if not sft.warmup_fraction:
        return sft.optimizer
    warmup = int(sft.warmup_fraction * steps)
    return dataclasses.replace(sft.optimizer, warmup_steps=warmup, decay_steps=steps - warmup)
