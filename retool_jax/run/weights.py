"""A run's first weights, from another run or a Hugging Face checkpoint, checked against its model and vocabulary."""

import dataclasses
from contextlib import closing
from pathlib import Path

from jax.sharding import Mesh

from retool_jax import hosts
from retool_jax.checkpoint import Checkpoints, abstract_like
from retool_jax.errors import UserError
from retool_jax.fields import show
from retool_jax.learn import optimizer as optimizers
from retool_jax.learn.optimizer import TrainState
from retool_jax.mesh import make_mesh
from retool_jax.models.config import ARCHITECTURE, ModelConfig, config_from_hf
from retool_jax.models.decoder import Params, abstract_params
from retool_jax.models.huggingface import find_folder, load_params
from retool_jax.models.sharding import param_shardings
from retool_jax.run.folder import CONFIG, read_model, saved_config
from retool_jax.run.schema import EngineRun, RLRun, Run
from retool_jax.tokens.grammar import DEFAULT_GRAMMAR
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.config import words_of


def load_weights(run: Run, folder: Path) -> Params:
    """The newest weights of a run folder, or those of a Hugging Face folder or hub id, in this run's shardings.

    Raises:
        UserError: the folder has no checkpoint, or one of another model or vocabulary, or its policy writes calls in
            another grammar than this run reads.
    """
    name, folder = str(folder), find_folder(str(folder))
    print(f"reading the weights of {name}", flush=True)
    if (folder / "config.json").is_file():
        if (folder / "tokenizer.json").is_file():  # a folder may hold only weights
            check_vocabulary(run, name, folder)
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
        return checkpoints.restore_params(latest, abstract_weights(run.model, make_mesh(run.mesh)))[0]


def load_teacher(run: RLRun, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """The frozen model that `rl.teacher.init_from` names, with the dtypes and kernels of this run's model.

    Raises:
        UserError: there is no checkpoint, it is the run's own `init_from`, or its vocabulary or chat template differs
            from the student's, so that it would score other ids or texts in an unknown form.
    """
    name = run.rl.teacher.init_from
    if run.init_from and Path(name).resolve() == Path(run.init_from).resolve():
        raise UserError(
            f"rl.teacher.init_from={name} is what the run begins from, and a model has nothing to learn from itself;"
            " choose another teacher, or other first weights"
        )
    folder = find_folder(name)
    if (folder / CONFIG).is_file():
        model, tokenizer = read_model(folder)
    elif (folder / "config.json").is_file():
        model, tokenizer = config_from_hf(folder), name
    else:
        raise no_checkpoint(folder, "rl.teacher.init_from")
    check_teacher(run, name, tokenizer)
    shape = {key: getattr(model, key) for key in ARCHITECTURE}
    # Dtypes and kernels are the run's. The embedding may be padded to another size than the student's.
    model = dataclasses.replace(run.model, real_vocab=min(len(load_tokenizer(tokenizer)), model.vocab_size), **shape)
    if (folder / "config.json").is_file():
        return model, load_params(model, folder, mesh)
    with closing(Checkpoints(folder / "checkpoints", keep=None)) as checkpoints:
        latest = checkpoints.latest()
        if latest is None:
            raise no_checkpoint(folder, "rl.teacher.init_from")
        return model, checkpoints.restore_params(latest, abstract_weights(model, mesh))[0]


def check_teacher(run: RLRun, name: str, tokenizer: str) -> None:
    """A `UserError` when the teacher's vocabulary or chat template differs from the student's."""
    if tokenizer == run.tokenizer:
        return
    theirs, ours = load_tokenizer(tokenizer).hf, load_tokenizer(run.tokenizer).hf
    for what, differs in (
        ("vocabulary", theirs.get_vocab() != ours.get_vocab()),
        ("chat template", theirs.chat_template != ours.chat_template),
    ):
        if differs:
            raise UserError(
                f"rl.teacher.init_from={name} has another {what} (tokenizer={tokenizer}) than this run"
                f" (tokenizer={run.tokenizer}), so it would score other texts than the student's; choose a teacher of"
                " the student's family"
            )


def require_checkpoint(run: Run) -> None:
    """A `UserError` when a run needs `init_from` for its weights or tokenizer and there is no checkpoint."""
    if not run.init_from or (has_checkpoints(run) and run.tokenizer != run.init_from):
        return
    require_folder(run.init_from)


def require_folder(name: str) -> None:
    """A `UserError` when a folder or hub id has neither checkpoints of a run nor a model."""
    folder = find_folder(name, weights=False)
    if not (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir():
        raise no_checkpoint(folder)


def no_checkpoint(folder: Path, key: str = "init_from") -> UserError:
    return UserError(
        f"no checkpoint at {folder}: expected checkpoints of a run, or config.json of a model, there; run config=sft"
        f" run={folder} first, choose another {key}, or leave {key} empty"
    )


def check_model(run: Run, folder: Path) -> None:
    """A `UserError` when the weights of a run folder have another shape, vocabulary or grammar than this run.

    Dtypes, kernels and rematerialisation may differ.
    """
    model, name = read_model(folder)
    for key in ARCHITECTURE:
        there, here = getattr(model, key), getattr(run.model, key)
        if there != here:
            raise UserError(
                f"{folder} holds another model: model.{key} is {show(there)} there and {show(here)} here;"
                " make them equal"
            )
    check_vocabulary(run, name, folder)
    if isinstance(run, EngineRun):
        check_grammar(run, folder)


def check_vocabulary(run: Run, name: str, folder: Path) -> None:
    """A `UserError` when the tokenizer of a folder's weights, `name`, has another vocabulary than this run's."""
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


def check_grammar(run: EngineRun, folder: Path) -> None:
    """A `UserError` when the weights learned to write calls in a grammar that this run does not read."""
    there = saved_config(folder)
    key = "sft.grammar" if there.get("task") == "sft" else "rollout.grammar"
    grammar = there.get(key) or DEFAULT_GRAMMAR
    if grammar != run.rollout.grammar and words_of(run.tools) and words_of(there.get("tools", "python")):
        raise UserError(
            f"{folder} was trained to write calls in the grammar {grammar}, and rollout.grammar={run.rollout.grammar}"
            f" reads none of them; set rollout.grammar={grammar}, or begin from other weights"
        )


def has_checkpoints(run: Run) -> bool:
    return hosts.broadcast((Path(run.run) / "checkpoints").is_dir())


def abstract_weights(model: ModelConfig, mesh: Mesh) -> Params:
    """Shapes and shardings of a model's weights."""
    return abstract_like(abstract_params(model)[1], param_shardings(model, mesh))


def abstract_state(run: Run, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a run's train state, without a critic."""
    optimizer = run.rl.optimizer if isinstance(run, RLRun) else run.sft.optimizer
    return optimizers.abstract_state(run.model, optimizer, mesh)
