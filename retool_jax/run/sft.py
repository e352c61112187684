"""An SFT run (cold start): train it to its last step, and read its weights once it is complete."""

import dataclasses
from contextlib import ExitStack, closing
from functools import lru_cache
from pathlib import Path

from retool_jax import hosts
from retool_jax.checkpoint import Checkpoints
from retool_jax.clock import Clock
from retool_jax.errors import UserError
from retool_jax.learn.optimizer import TrainState, begin_from, init_state
from retool_jax.learn.step import Outputs, make_step
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.models.attention import resolve_kernel
from retool_jax.models.decoder import Params
from retool_jax.run.build import demonstrations_of, explain_out_of_memory, mesh_of, model_for
from retool_jax.run.folder import check_folder, claim_folder, to_flat, write_config
from retool_jax.run.origin import write_origin
from retool_jax.run.schema import SFTRun
from retool_jax.run.weights import (
    abstract_state,
    abstract_weights,
    has_checkpoints,
    load_weights,
    require_checkpoint,
)
from retool_jax.sft import loop
from retool_jax.sft.demonstrations import Demonstrations
from retool_jax.sft.loop import imitation_loss, optimizer_of
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.trackers import check_loggers

_step = lru_cache(maxsize=4)(make_step)  # so that a process that trains several runs of the same sizes compiles once


def train(run: SFTRun, wait: bool = False) -> TrainState:
    """Train to the last step, resuming from the newest checkpoint, and return the final state.

    If another process is training in the folder, wait for it with `wait`; otherwise this is a `UserError`.
    """
    require_checkpoint(run)
    check_loggers(run.logger)
    tokenizer = load_tokenizer(run.tokenizer)
    run = dataclasses.replace(run, model=model_for(run, tokenizer))
    mesh = mesh_of(run)
    # Weights that will be needed are loaded now: a wrong path is reported before anything is written.
    given = load_weights(run, Path(run.init_from)) if run.init_from and not has_checkpoints(run) else None
    batches = demonstrations_of(run, tokenizer)
    hosts.require_same({"the digest of sft.data": batches.digest})
    optimizer = optimizer_of(run.sft, batches.steps)
    with ExitStack() as stack:
        stack.enter_context(explain_out_of_memory(run))
        folder = stack.enter_context(claim_folder(run, wait))
        checkpoints = stack.enter_context(closing(Checkpoints(folder / "checkpoints", run.checkpoint.keep)))
        clock = stack.enter_context(closing(Clock()))
        start = checkpoints.latest() or 0
        if start:
            state, notes = checkpoints.restore(start, abstract_state(run, mesh))
            check_data(run, notes, batches)
            clock.seconds = notes["seconds"]
        elif run.init_from:
            params = given if given is not None else load_weights(run, Path(run.init_from))
            state = begin_from(params, run.model, optimizer, mesh)
        else:
            state = init_state(run.model, optimizer, mesh, run.seed)
        write_config(run)
        if start >= batches.steps:
            return state
        write_origin(folder)
        update = _step(Outputs(run.model), imitation_loss, optimizer, mesh)
        print(f"attention: {resolve_kernel(run.model, mesh.devices.flat[0].platform)}")
        first = hosts.is_first()
        log = stack.enter_context(MetricsLog(folder if first else None, start or None, run.logger, to_flat(run)))
        bar = stack.enter_context(Progress("cold start", batches.steps, start, quiet=not first))
        if batches.description:
            bar.say(batches.description)
        state = loop.train(state, start, batches, update, checkpoints, run.checkpoint.every, clock, log, bar)
        if left_out := len(batches.left_out):
            bar.say(f"{left_out} demonstrations of more than sft.row_length={run.sft.row_length} tokens were left out")
        return state


def finished_weights(run: SFTRun) -> Params | None:
    """The weights of a complete run, read without locking its folder; None if it is not complete.

    Raises:
        UserError: the folder holds another run, or its data has changed since.
    """
    path = Path(run.run) / "checkpoints"
    check_folder(run)
    if not hosts.broadcast(path.is_dir()):
        return None
    with closing(Checkpoints(path, keep=None)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            return None
        batches = demonstrations_of(run, load_tokenizer(run.tokenizer))
        if step < batches.steps:
            return None
        params, notes = checkpoints.restore_params(step, abstract_weights(run.model, mesh_of(run)))
    check_data(run, notes, batches)
    return params


def check_data(run: SFTRun, notes: dict, batches: Demonstrations) -> None:
    """A `UserError` when the data differs from that of the checkpoint."""
    if notes.get("data", batches.digest) != batches.digest:
        raise UserError(
            f"sft.data={run.sft.data} is not what {run.run} began with; restore it, or choose another run=FOLDER"
        )
