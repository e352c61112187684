"""The cold start: imitate demonstrations, so that reinforcement learning has tool calls to choose from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from retool_jax.checkpoint import Checkpoints, abstract_like
from retool_jax.clock import Clock
from retool_jax.config import SFTConfig, SFTRun
from retool_jax.data import arithmetic
from retool_jax.data.packing import Example, PackedBatch, pack
from retool_jax.data.problems import tools_of
from retool_jax.data.sources import read_rows
from retool_jax.data.traces import BadTrace, messages_of
from retool_jax.errors import UserError
from retool_jax.fields import show
from retool_jax.mesh import check_rows, make_mesh
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.models.attention import resolve_kernel
from retool_jax.models.config import ARCHITECTURE, ModelConfig
from retool_jax.models.huggingface import find_folder, load_params
from retool_jax.models.transformer import Params, abstract_params
from retool_jax.run_folder import CONFIG, check_folder, claim_folder, read_model, write_config
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.grammar import CODE_TOOL, DEFAULT_GRAMMAR
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer
from retool_jax.tools.toolbox import Toolbox, load_tools
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


def train(run: SFTRun, wait: bool = False) -> TrainState:
    """Train to the last step, resuming from the newest checkpoint, and return the final state.

    With `wait` a folder that another process is training in is waited for; else it is refused.
    """
    require_checkpoint(run)
    tokenizer = load_tokenizer(run.tokenizer)
    run = dataclasses.replace(run, model=model_for(run, tokenizer))
    mesh = mesh_of(run)
    # Loaded early when they will be needed: a wrong path is told before anything is written.
    given = load_weights(run, Path(run.init_from)) if run.init_from and not has_checkpoints(run) else None
    batches = Demonstrations(run, tokenizer)
    steps, optimizer = batches.steps, optimizer_of(run.sft, batches.steps)
    with ExitStack() as stack:
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
        if start >= steps:
            return state
        update = make_update(run.model, optimizer, imitation_loss, mesh)
        print(f"attention: {resolve_kernel(run.model, mesh.devices.flat[0].platform)}")
        log = stack.enter_context(MetricsLog(folder, start or None))
        bar = stack.enter_context(Progress("cold start", steps, start))
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
        return state


def finished_weights(run: SFTRun) -> Params | None:
    """The weights of a run that is complete, read without a claim to its folder; None where it is not.

    Raises:
        UserError: the folder holds another run, or its data has changed since.
    """
    path = Path(run.run) / "checkpoints"
    check_folder(run)
    if not path.is_dir():
        return None
    with closing(Checkpoints(path, keep=None)) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            return None
        batches = Demonstrations(run, load_tokenizer(run.tokenizer))
        if step < batches.steps:
            return None
        params, notes = checkpoints.restore_params(step, abstract_weights(run))
    check_data(run, notes, batches)
    return params


def check_data(run: SFTRun, notes: dict, batches: "Demonstrations") -> None:
    """Refuse to go on with other data than a checkpoint was made of."""
    if notes.get("data", batches.digest) != batches.digest:
        raise UserError(
            f"sft.data={run.sft.data} is not what {run.run} began with; restore it, or choose another run=FOLDER"
        )


def mesh_of(run: SFTRun) -> Mesh:
    """The run's mesh over the devices that are here; a `UserError` when its rows or weights do not divide over it."""
    mesh = make_mesh(run.mesh)
    check_rows(mesh.shape, "sft.rows_per_micro", run.sft.rows_per_micro)
    param_shardings(run.model, mesh)
    return mesh


def load_weights(run: SFTRun, folder: Path) -> Params:
    """The newest weights of a run folder, or those of a Hugging Face folder or hub id, in this run's shardings.

    Raises:
        UserError: there is no checkpoint in that folder, or it is of another model or another vocabulary.
    """
    folder = find_folder(str(folder))
    if (folder / "config.json").is_file():
        return load_params(run.model, folder, make_mesh(run.mesh))
    path = folder / "checkpoints"
    if not path.is_dir():
        raise no_checkpoint(folder)
    with closing(Checkpoints(path, keep=None)) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            raise no_checkpoint(folder)
        if (folder / CONFIG).is_file():
            check_model(run, folder)
        return checkpoints.restore_params(latest, abstract_weights(run))[0]


def require_checkpoint(run: SFTRun) -> None:
    """Refuse a run that takes its first weights, or its tokenizer, from where there is no checkpoint."""
    if not run.init_from or (has_checkpoints(run) and run.tokenizer != run.init_from):
        return
    folder = find_folder(run.init_from, weights=False)
    if not (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        raise no_checkpoint(folder)


def no_checkpoint(folder: Path) -> UserError:
    return UserError(
        f"no checkpoint at {folder}: expected checkpoints of a run, or config.json of a model, there; run config=sft"
        f" run={folder} first, choose another init_from, or leave init_from empty"
    )


def check_model(run: SFTRun, folder: Path) -> None:
    """Refuse the weights of a run folder that are of another shape, or of another vocabulary.

    How they are computed with (dtypes, kernels, what is computed again) is each run's own.
    """
    model, name = read_model(folder)
    for key in ARCHITECTURE:
        there, here = getattr(model, key), getattr(run.model, key)
        if there != here:
            raise UserError(
                f"{folder} holds another model: model.{key} is {show(there)} there and {show(here)} here;"
                " make them equal"
            )
    if name == run.tokenizer:
        return
    try:
        theirs = load_tokenizer(name)
    except UserError as error:
        print(f"{folder} was trained with tokenizer={name}, which cannot be compared with this run's ({error})")
        return
    if theirs.hf.get_vocab() != load_tokenizer(run.tokenizer).hf.get_vocab():
        raise UserError(
            f"{folder} was trained with another vocabulary: tokenizer is {name} there and {run.tokenizer} here;"
            " make them equal"
        )


def has_checkpoints(run: SFTRun) -> bool:
    return (Path(run.run) / "checkpoints").is_dir()


def abstract_weights(run: SFTRun) -> Params:
    """Shapes and shardings of a run's weights."""
    return abstract_like(abstract_params(run.model)[1], param_shardings(run.model, make_mesh(run.mesh)))


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
        self._tokenizer, self._tools, self._seed, self._config = tokenizer, load_tools(run.tools), run.seed, sft
        if sft.data == "arithmetic" and self._tools and CODE_TOOL not in self._tools.names:
            raise UserError(
                f"sft.data=arithmetic calls {CODE_TOOL}, and tools has {', '.join(self._tools.names)}; add python to"
                " it, or give other sft.data, or init_from"
            )
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
        messages = arithmetic.demonstration(index, self._tools is not None, self._seed)
        return to_example(self._tokenizer, messages, self._tools, self._config.grammar)


def to_example(tokenizer: Tokenizer, messages: list[dict], tools: Toolbox | None, grammar: str = "") -> Example:
    """A conversation as ids and mask, with RL's tools in the prompt as RL shows them."""
    schemas = tools.schemas if tools else None
    tokens = demonstration_ids(tokenizer, messages, schemas, grammar or DEFAULT_GRAMMAR)
    return Example(np.asarray(tokens.ids, np.int32), np.asarray(tokens.sampled, bool))


def read_demonstrations(sft: SFTConfig, tokenizer: Tokenizer, tools: Toolbox | None) -> list[Example]:
    """All rows of `sft.data` as examples, in their order; those that are too long by the rule of `sft.overlong`.

    Raises:
        UserError: a row is no conversation, calls a tool in a run without, cannot be written in the grammar, or is too
            long; or none is left.
    """
    examples, too_long = [], []
    for number, row in enumerate(read_rows(sft.data, ", or arithmetic"), start=1):
        where = f"sft.data={sft.data} row {number}"
        try:
            messages = messages_of(row, tools.names if tools else (CODE_TOOL,))
        except BadTrace as reason:
            raise UserError(
                f"{where}: {reason}; python -m retool_jax.prepare converts rows and drops bad ones"
            ) from None
        if not tools and any(turn.get("tool_calls") for turn in messages):
            raise UserError(
                f"{where} calls a tool, which tools=none has not; set tools=python, or give data without calls"
            )
        own = tools.of(tools_of(row, where), where) if tools else None
        try:
            example = to_example(tokenizer, messages, own, sft.grammar)
        except UserError as reason:
            raise UserError(f"{where}: {reason}") from None
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
