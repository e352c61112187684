"""The cold start: imitate demonstrations, so that reinforcement learning has tool calls to choose from."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from retool_jax.checkpoint import Checkpoints, abstract_like
from retool_jax.clock import Clock
from retool_jax.config import SFTRun, claim_folder, differences
from retool_jax.data import arithmetic
from retool_jax.data.packing import Example, PackedBatch, pack
from retool_jax.errors import UserError
from retool_jax.mesh import check_rows, make_mesh
from retool_jax.metrics import MetricsLog, Progress
from retool_jax.models.transformer import Params
from retool_jax.tokens.chat import demonstration_ids
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer
from retool_jax.update import TokenTerms, TrainState, init_state, make_update, param_shardings, state_shardings


def imitation_loss(logprobs: jax.Array, entropy: jax.Array, batch: PackedBatch) -> TokenTerms:
    """Negative log-likelihood of the demonstrated policy's tokens."""
    return TokenTerms(-logprobs, {})


def train(run: SFTRun) -> TrainState:
    """Train to the last step, resuming from the newest checkpoint, and return the final state."""
    tokenizer = load_tokenizer(run.tokenizer)
    check_vocabulary(run, tokenizer)
    mesh = mesh_of(run)
    folder = claim_folder(run)
    checkpoints = Checkpoints(folder / "checkpoints", run.checkpoint.keep)
    clock = Clock()
    start = checkpoints.latest() or 0
    if start:
        state, notes = checkpoints.restore(start, abstract_state(run, mesh))
        clock.seconds = notes["seconds"]
    else:
        state = init_state(run.model, run.sft.optimizer, mesh, run.seed)
    if start >= run.sft.steps:
        checkpoints.close()
        return state
    update = make_update(run.model, run.sft.optimizer, imitation_loss, mesh)
    batches = Demonstrations(run, tokenizer)
    with MetricsLog(folder, start or None) as log, Progress("cold start", run.sft.steps, start) as bar:
        for step in range(start + 1, run.sft.steps + 1):
            with clock.part("update"):
                batch = batches.at(step - 1)
                state, metrics = update(state, batch)
                metrics = jax.device_get(metrics)
            rate = int((batch.segments > 0).sum()) * step / max(clock.seconds["update"], 1e-9)
            log.write("sft", step, metrics | {"perf/tokens_per_s": rate})
            bar.step(step, {"loss": float(metrics["loss"]), "tokens/s": rate})
            if step % run.checkpoint.every == 0 or step == run.sft.steps:
                checkpoints.save(step, state, {"seconds": clock.seconds, "tokens_per_s": rate})
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
    """The newest weights of a cold start's run folder, in this run's shardings.

    Raises:
        UserError: there is no checkpoint in that folder, or it is of another model.
    """
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


def abstract_state(run: SFTRun, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a cold start's state."""
    shapes = jax.eval_shape(lambda: init_state(run.model, run.sft.optimizer, mesh, run.seed))
    return abstract_like(shapes, state_shardings(run.model, run.sft.optimizer, mesh))


def check_vocabulary(run: SFTRun, tokenizer: Tokenizer) -> None:
    if run.model.vocab_size < len(tokenizer):
        raise UserError(
            f"model.vocab_size={run.model.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens;"
            f" set model.vocab_size={len(tokenizer)} or choose another tokenizer"
        )


class Demonstrations:
    """Packed batches of demonstrations; batch i is the same in every run with this config."""

    def __init__(self, run: SFTRun, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._tools, self._seed, self._config = tokenizer, run.tools == "python", run.seed, run.sft
        # A fixed number of demonstrations per step keeps batches a function of the step. It follows from their mean
        # length, so that runs with shorter ones (text only) see as many tokens, and cost as much.
        mean = np.mean([len(self._example(index).ids) for index in range(256)])
        self.per_step = max(round(run.sft.batch_tokens / mean), 1)
        rows = -(-int(1.5 * run.sft.batch_tokens) // run.sft.row_length)
        self._micro_batches = -(-rows // run.sft.rows_per_micro)

    def at(self, index: int) -> PackedBatch:
        first = index * self.per_step
        examples = [self._example(i) for i in range(first, first + self.per_step)]
        return pack(examples, self._config.row_length, self._config.rows_per_micro, self._micro_batches)

    def _example(self, index: int) -> Example:
        messages = arithmetic.demonstration(index, self._tools, self._seed)
        tokens = demonstration_ids(self._tokenizer, messages)
        return Example(tokens.ids, tokens.sampled)
