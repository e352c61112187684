"""The cold start: imitate demonstrations, so that reinforcement learning has tool calls to choose from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from retool_jax.checkpoint import Checkpoints, abstract_like
from retool_jax.clock import Clock
from retool_jax.config import SFTConfig, SFTRun, claim_folder, differences
from retool_jax.data import arithmetic
from retool_jax.data.packing import Example, PackedBatch, pack
from retool_jax.data.sources import read_rows
from retool_jax.data.traces import BadTrace, messages_of
from retool_jax.errors import UserError
from retool_jax.mesh import check_rows, make_mesh
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.models.attention import resolve_kernel
from retool_jax.models.config import ModelConfig
from retool_jax.models.huggingface import find_folder, load_params
from retool_jax.models.transformer import Params
from retool_jax.tokens.chat import demonstration_ids
from retool_jax.tokens.protocol import TOOL_SCHEMA
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer
from retool_jax.update import (
    OptimizerConfig,
    TokenTerms,
    TrainState,
    begin_from,
    init_state,
    make_update,
    param_shardings,
    state_shardings,
)


def imitation_loss(logprobs: jax.Array, entropy: jax.Array, batch: PackedBatch) -> TokenTerms:
    """Negative log-likelihood of the demonstrated policy's tokens."""
    return TokenTerms(-logprobs, {})


def train(run: SFTRun) -> TrainState:
    """Train to the last step, resuming from the newest checkpoint, and return the final state."""
    tokenizer = load_tokenizer(run.tokenizer)
    run = dataclasses.replace(run, model=model_for(run, tokenizer))
    mesh = mesh_of(run)
    # Loaded early when they will be needed: a wrong path is told before anything is written.
    given = load_weights(run, Path(run.init_from)) if run.init_from and not has_checkpoints(run) else None
    batches = Demonstrations(run, tokenizer)
    steps, optimizer = batches.steps, optimizer_of(run.sft, batches.steps)
    folder = claim_folder(run)
    checkpoints = Checkpoints(folder / "checkpoints", run.checkpoint.keep)
    clock = Clock()
    start = checkpoints.latest() or 0
    if start:
        state, notes = checkpoints.restore(start, abstract_state(run, mesh))
        if notes.get("data", batches.digest) != batches.digest:
            raise UserError(
                f"sft.data={run.sft.data} is not what {folder} began with; restore it, or choose another run="
            )
        clock.seconds = notes["seconds"]
    elif run.init_from:
        params = given if given is not None else load_weights(run, Path(run.init_from))
        state = begin_from(params, run.model, optimizer, mesh)
    else:
        state = init_state(run.model, optimizer, mesh, run.seed)
    if start >= steps:
        checkpoints.close()
        return state
    update = make_update(run.model, optimizer, imitation_loss, mesh)
    print(f"attention: {resolve_kernel(run.model, mesh.devices.flat[0].platform)}")
    with MetricsLog(folder, start or None) as log, Progress("cold start", steps, start) as bar:
        if batches.description:
            bar.say(batches.description)
        trained, before = 0, clock.seconds.get("update", 0.0)  # the rate is this process's
        for step in range(start + 1, steps + 1):
            with clock.part("update"):
                batch = batches.at(step - 1)
                state, metrics = update(state, batch)
                metrics = jax.device_get(metrics)
            trained += int((batch.segments > 0).sum())
            rate = trained / max(clock.seconds["update"] - before, 1e-9)
            log.write("sft", step, metrics | {"perf/tokens_per_s": rate})
            bar.step(step, {"loss": float(metrics["loss"]), "tokens/s": rate})
            if step % run.checkpoint.every == 0 or step == steps:
                notes = {"seconds": clock.seconds, "tokens_per_s": rate, "data": batches.digest}
                checkpoints.save(step, state, notes)
    clock.close()
    checkpoints.close()
    return state


def mesh_of(run: SFTRun) -> Mesh:
    """The run's mesh over the devices that are here; a `UserError` when its rows or weights do not divide over it."""
    mesh = make_mesh(run.mesh)
    check_rows(mesh.shape, "sft.rows_per_micro", run.sft.rows_per_micro)
    param_shardings(run.model, mesh)
    return mesh


def load_weights(run: SFTRun, folder: Path) -> Params:
    """The newest weights of a run folder, or those of a Hugging Face folder or hub id, in this run's shardings.

    Raises:
        UserError: there is no checkpoint in that folder, or it is of another model.
    """
    folder = find_folder(str(folder))
    if (folder / "config.json").is_file():
        return load_params(run.model, folder, make_mesh(run.mesh))
    path = folder / "checkpoints"
    latest = Checkpoints(path, keep=None) if path.is_dir() else None
    if latest is None or latest.latest() is None:
        raise UserError(
            f"no checkpoint of a cold start at {folder}; run config=sft run={folder} first, or leave init_from empty"
        )
    for key, there, here in differences(run, folder) if (folder / "config.yaml").is_file() else ():
        if key.startswith("model."):
            raise UserError(f"{folder} holds another model: {key} is {there} there and {here} here; make them equal")
    state, _ = latest.restore(latest.latest(), abstract_state(run, make_mesh(run.mesh)))
    latest.close()
    return state.params


def has_checkpoints(run: SFTRun) -> bool:
    return (Path(run.run) / "checkpoints").is_dir()


def abstract_state(run: SFTRun, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a cold start's state."""
    shapes = jax.eval_shape(lambda: init_state(run.model, run.sft.optimizer, mesh, run.seed))
    return abstract_like(shapes, state_shardings(run.model, run.sft.optimizer, mesh))


def model_for(run: SFTRun, tokenizer: Tokenizer) -> ModelConfig:
    """The run's model with the number of ids that stand for text, so that an embedding's padding is never drawn."""
    tokens, rows = len(tokenizer), run.model.vocab_size
    if rows < tokens:
        raise UserError(
            f"model.vocab_size={rows} is smaller than the tokenizer's {tokens} tokens;"
            f" set model.vocab_size={tokens} or choose another tokenizer"
        )
    return run.model if rows == tokens else dataclasses.replace(run.model, real_vocab=run.model.real_vocab or tokens)


def optimizer_of(sft: SFTConfig, steps: int) -> OptimizerConfig:
    """The optimiser with its schedule for a run of `steps`, where that is given as a share of them."""
    if not sft.warmup_fraction:
        return sft.optimizer
    warmup = int(sft.warmup_fraction * steps)
    return dataclasses.replace(sft.optimizer, warmup_steps=warmup, decay_steps=steps - warmup)


class Demonstrations:
    """Packed batches of demonstrations; batch i is the same in every run with this config.

    Finite data is read in a new order each epoch, and an epoch has whole steps only: the rows that would not fill the
    last one wait for another epoch, whose order leaves out others.

    Attributes:
        per_step: demonstrations in each batch. A fixed number keeps batches a function of the step.
        steps: batches that the run takes.
        digest: of finite data, as ids and mask; empty for the miniature.
        description: finite data in a sentence; empty for the miniature.
    """

    def __init__(self, run: SFTRun, tokenizer: Tokenizer) -> None:
        sft = run.sft
        self._tokenizer, self._tools, self._seed, self._config = tokenizer, run.tools == "python", run.seed, sft
        self._finite = None if sft.data == "arithmetic" else read_demonstrations(sft, tokenizer, self._tools)
        # Its number follows from their mean length, so that runs with shorter ones (text only) see as many tokens, and
        # cost as much.
        known = [self._example(i) for i in range(256)] if self._finite is None else self._finite
        lengths = sorted((len(example.ids) for example in known), reverse=True)
        self.per_step = sft.batch_size or max(round(sft.batch_tokens / np.mean(lengths)), 1)
        self.steps, self.digest, self.description = sft.steps, "", ""
        if self._finite is None:
            tokens = self.per_step * np.mean(lengths) if sft.batch_size else sft.batch_tokens
            rows = -(-int(1.5 * tokens) // sft.row_length)
        else:
            self._epoch_steps = len(lengths) // self.per_step
            if not self._epoch_steps:
                raise UserError(
                    f"sft.data={sft.data} has {len(lengths)} demonstrations, fewer than the {self.per_step} of one"
                    " step; lower sft.batch_size or sft.batch_tokens"
                )
            self.steps = sft.steps or sft.epochs * self._epoch_steps
            # Any two rows of a first fit hold more than one row together: a bound for every order, the longest ones
            # in one batch included.
            rows = min(self.per_step, 2 * sum(lengths[: self.per_step]) // sft.row_length + 1)
            self.digest = _digest(self._finite)
            self.description = (
                f"{len(lengths):,} demonstrations of {np.mean(lengths):,.0f} tokens on average, {lengths[0]:,} at most;"
                f" {self.per_step} a step, {self._epoch_steps} steps an epoch"
            )
        self._micro_batches = -(-rows // sft.rows_per_micro)

    def at(self, index: int) -> PackedBatch:
        examples = [self._example(i) for i in self._members(index)]
        return pack(examples, self._config.row_length, self._config.rows_per_micro, self._micro_batches)

    def _members(self, index: int) -> Sequence[int]:
        """The demonstrations of batch `index`, by number."""
        if self._finite is None:
            return range(index * self.per_step, (index + 1) * self.per_step)
        epoch, part = divmod(index, self._epoch_steps)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._finite))
        return order[part * self.per_step : (part + 1) * self.per_step].tolist()

    def _example(self, index: int) -> Example:
        if self._finite is not None:
            return self._finite[index]
        return to_example(self._tokenizer, arithmetic.demonstration(index, self._tools, self._seed), self._tools)


def to_example(tokenizer: Tokenizer, messages: list[dict], tools: bool) -> Example:
    """A conversation as ids and mask, with RL's tool schema in the prompt where the template shows one."""
    tokens = demonstration_ids(tokenizer, messages, [TOOL_SCHEMA] if tools else None)
    return Example(np.asarray(tokens.ids, np.int32), np.asarray(tokens.sampled, bool))


def read_demonstrations(sft: SFTConfig, tokenizer: Tokenizer, tools: bool) -> list[Example]:
    """All rows of `sft.data` as examples, in their order; those that are too long by the rule of `sft.overlong`.

    Raises:
        UserError: a row is no conversation, calls a tool in a run without, or is too long; or none is left.
    """
    examples, too_long = [], []
    for number, row in enumerate(read_rows(sft.data, ", or arithmetic"), start=1):
        where = f"sft.data={sft.data} row {number}"
        try:
            messages = messages_of(row)
        except BadTrace as reason:
            raise UserError(
                f"{where}: {reason}; python -m retool_jax.prepare converts rows and drops bad ones"
            ) from None
        if not tools and any(turn.get("tool_calls") for turn in messages):
            raise UserError(
                f"{where} calls a tool, which tools=none has not; set tools=python, or give data without calls"
            )
        example = to_example(tokenizer, messages, tools)
        if len(example.ids) > sft.row_length:
            too_long.append((len(example.ids), where))
        else:
            examples.append(example)
    if too_long:
        length, where = max(too_long)
        if sft.overlong == "error":
            raise UserError(
                f"{where} has {length} tokens, and {len(too_long)} row(s) more than sft.row_length={sft.row_length};"
                " raise it, or set sft.overlong=drop"
            )
        print(f"dropped {len(too_long)} row(s) of sft.data={sft.data} above sft.row_length={sft.row_length} tokens")
    if not examples:
        raise UserError(
            f"sft.data={sft.data} has no rows to learn from; give at least one of at most sft.row_length tokens"
        )
    return examples


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(np.int32(len(example.ids)).tobytes() + example.ids.tobytes() + example.sampled.tobytes())
    return digest.hexdigest()
