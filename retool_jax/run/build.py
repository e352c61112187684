"""Build the objects of a run from its config. Each function makes one of them and reports a wrong value."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from retool_jax.data.arithmetic import SPLITS
from retool_jax.data.problems import MADE, Problem, Problems, count_shared, problems_of_set
from retool_jax.engine.ahead import held_bytes
from retool_jax.engine.engine import Engine, compile_ahead
from retool_jax.errors import UserError, one_line
from retool_jax.evaluation.config import MOST_PROBLEMS
from retool_jax.memory import host_bytes
from retool_jax.mesh import make_mesh
from retool_jax.mesh_config import check_heads, check_rows
from retool_jax.models.config import ARCHITECTURE, ModelConfig, config_from_hf
from retool_jax.models.decoder import Params
from retool_jax.models.huggingface import find_folder
from retool_jax.models.sharding import param_shardings
from retool_jax.rollout.config import RolloutConfig
from retool_jax.rollout.rollout import check_prompts, encode_prompt
from retool_jax.run.folder import CONFIG
from retool_jax.run.load import make, read, read_yaml
from retool_jax.run.schema import EngineRun, EvaluateRun, RLRun, Run, SFTRun, micro_batches
from retool_jax.sandbox import Sandbox, SandboxConfig
from retool_jax.sft.demonstrations import Demonstrations
from retool_jax.tokens.grammar import GRAMMARS
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.config import words_of
from retool_jax.tools.toolbox import Toolbox, load_tools

BOX = "oxed{"  # in a prompt that asks for a box, also where `\b` was read as an escape


def resolve(words: list[str]) -> Run:
    """The run that a command line describes, with the model and tokenizer of `init_from` where it sets none.

    Raises:
        UserError: the words are wrong (`load.load`), or the checkpoint's `config.json` describes a model that is not
            supported, or cannot be fetched.
    """
    schema, values = read(words)
    given = make(schema, values)  # reports mistakes in the words before anything is fetched
    run = make(schema, with_checkpoint(values | {"tokenizer": given.tokenizer}))
    if taken := " and ".join(part for part in ("model", "tokenizer") if getattr(run, part) != getattr(given, part)):
        print(f"{taken}: taken from {run.init_from}, since the config sets no other")
    return run


def with_checkpoint(values: dict) -> dict:
    """A run's values, completed from the checkpoint of `init_from`: an empty tokenizer, and the model's shape.

    The shape is read only when no key of it is set. A shape that is set is compared when the weights are loaded.
    """
    name, model = values.get("init_from"), values.get("model") or {}
    if not name:
        return values
    folder = Path(name)
    saved = read_yaml(str(folder / CONFIG)) if (folder / CONFIG).is_file() else {}
    is_run = {"model", "tokenizer"} <= saved.keys()
    if values.get("tokenizer") == "":
        values = values | {"tokenizer": saved["tokenizer"] if is_run else name}
    if set(ARCHITECTURE) & model.keys():
        return values
    if is_run:
        there = saved["model"]
    elif (find_folder(name, weights=False) / "config.json").is_file():
        there = dataclasses.asdict(config_from_hf(find_folder(name, weights=False)))
    else:
        return values  # loading the weights will report that there are none
    return values | {"model": {key: there[key] for key in (*ARCHITECTURE, "max_positions") if key in there} | model}


def model_for(run: Run, tokenizer: Tokenizer) -> ModelConfig:
    """The run's model, with `real_vocab` set to the tokenizer's size so that padding ids are never sampled."""
    tokens, rows = len(tokenizer), run.model.vocab_size
    if rows < tokens:
        raise UserError(
            f"model.vocab_size={rows} is smaller than the tokenizer's {tokens} tokens;"
            f" set model.vocab_size={tokens} or choose another tokenizer"
        )
    return run.model if rows == tokens else dataclasses.replace(run.model, real_vocab=run.model.real_vocab or tokens)


def mesh_of(run: Run) -> Mesh:
    """The run's mesh over this job's devices; a `UserError` when rows or weights do not divide over it."""
    mesh = make_mesh(run.mesh)
    check_heads(mesh.shape, run.model.num_kv_heads)
    for key, rows in micro_batches(run).items():
        check_rows(mesh.shape, key, rows)
    param_shardings(run.model, mesh)
    return mesh


@contextmanager
def explain_out_of_memory(run: Run) -> Iterator[None]:
    """Turn a device's out-of-memory error in the block into a `UserError` that names the sizes to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes, rows = {}, ("row_length", "rows_per_micro")
        if isinstance(run, SFTRun):
            sizes = {f"sft.{key}": getattr(run.sft, key) for key in rows}
        if isinstance(run, RLRun):
            sizes = {f"rl.{key}": getattr(run.rl, key) for key in rows}
        if isinstance(run, EngineRun):
            sizes |= {f"engine.{key}": getattr(run.engine, key) for key in ("slots", "max_length")}
        raise UserError(
            f"a device has no room for what this run computes ({one_line(error)}); lower"
            f" {', '.join(f'{key}={value}' for key, value in sizes.items())} (a row need be no longer than the longest"
            " text), set model.remat=full, or split the weights over more devices with mesh.fsdp"
        ) from error


def demonstrations_of(run: Run, tokenizer: Tokenizer) -> Demonstrations:
    return Demonstrations(run.sft, load_tools(run.tools), run.seed, tokenizer)


def problems_of(run: RLRun, tokenizer: Tokenizer, tools: Toolbox | None) -> dict[str, Problems]:
    """The problems of each split. Over-long prompts are refused; of an endless set only the first 8 are checked."""
    problems = {split: Problems(getattr(run.data, split), split, run.seed) for split in SPLITS}
    _check_apart(run, problems["train"].finite or [], problems["test"].finite or [])
    for split, stream in problems.items():
        check_prompts(tokenizer, stream.finite or stream.head(8), tools, run.rollout)
        _check_form(f"data.{split}={getattr(run.data, split)}", stream.finite or [], tokenizer, tools, run.rollout)
    return problems


def _check_apart(run: RLRun, train: Sequence[Problem], test: Sequence[Problem]) -> None:
    """Refuse a training set that contains the whole test set; print the overlap when it contains a part."""
    shared = count_shared(test, train)
    if shared and shared == len(test):
        raise UserError(
            f"data.train={run.data.train} has every question of data.test={run.data.test}, so the test would measure"
            " memorisation; train on another set, or test on one that is not trained"
        )
    if shared:
        print(f"data: {shared} of the {len(test)} questions of data.test={run.data.test} are also in data.train")


def problems_to_evaluate(run: EvaluateRun, tokenizer: Tokenizer, tools: Toolbox | None) -> list[Problem]:
    """The problems of an evaluation's set, at most `MOST_PROBLEMS`. A `UserError` when there are more, or a prompt is
    too long."""
    problems = problems_of_set(run.data, run.evaluation.problems)
    if len(problems) > MOST_PROBLEMS:
        raise UserError(
            f"data.source={run.data.source} has {len(problems)} problems, and an evaluation at most {MOST_PROBLEMS};"
            f" set evaluation.problems={MOST_PROBLEMS} or less"
        )
    check_prompts(tokenizer, problems, tools, run.rollout)
    if run.data.source not in MADE:
        _check_form(f"data.source={run.data.source}", problems, tokenizer, tools, run.rollout)
    return problems


def _check_form(
    name: str, problems: Sequence[Problem], tokenizer: Tokenizer, tools: Toolbox | None, limits: RolloutConfig
) -> None:
    """Print how many prompts of a set do not ask for a box. A policy that follows such a prompt has no right answer."""
    silent = [p for p in problems if not any(BOX in str(message["content"]) for message in p.messages)]
    # The grammar's own prompt may ask for it.
    if silent and BOX not in tokenizer.decode(encode_prompt(tokenizer, silent[0], tools, limits)):
        print(
            f"data: {len(silent)} of the {len(problems)} prompts of {name} do not ask for an answer in \\boxed{{}}, and"
            " no other is read; python -m retool_jax.prepare kind=problems writes prompts that do"
        )


def sandbox_config(run: EngineRun) -> SandboxConfig:
    """The sandbox's config with a queue for one call of every engine slot: no call is refused or times out in the queue
    even if all of them run to their time limit."""
    box, slots = run.sandbox, run.engine.slots
    # A server does not say how many programs it runs at once; it may be one.
    at_once = min(box.slot_count, len(box.urls)) if box.urls else box.slot_count
    longest_s = (slots / at_once + 1) * (box.limits.wall_s + 1)
    waiting = max(slots, box.sessions) if "python_session" in words_of(run.tools) else slots
    return dataclasses.replace(
        box, queue_limit=box.queue_limit or waiting, queue_s=min(max(box.queue_s, longest_s), 86400)
    )


def sandbox_lines(box: Sandbox | None) -> list[str]:
    """Lines that name a run's sandbox, and the cost of a call when it is high (measured in docs/sandbox.md)."""
    if box is None:
        return ["sandbox: none"]
    lines = [f"sandbox: {box.description}"]
    if box.backend == "gvisor":
        lines.append(
            "  a call takes about 20 ms of processor time there, with sandbox.backend=[bubblewrap] about 3 ms, and with"
            " sandbox.backend=[process] less, which isolates nothing"
        )
    return lines


@contextmanager
def compiled_ahead(run: EngineRun, mesh: Mesh, tokenizer: Tokenizer) -> Iterator[None]:
    """Compile the programs of the run's engine in threads while the block runs.

    `warm_up` waits for those that are not ready. When the block ends early, compilations that have not begun are
    cancelled.

    Raises:
        UserError: the engine's cache cannot fit.
    """
    _check_cache(run, mesh)
    threads = compile_ahead(run.model, run.engine, mesh, stop_ids_of(run, tokenizer))
    try:
        yield
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _check_cache(run: EngineRun, mesh: Mesh) -> None:
    """A `UserError` when an engine needs more memory than its device has; on CPU, than the machine has."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    needed, there = held_bytes(run.model, run.engine, mesh), (own[0].memory_stats() or {}).get("bytes_limit")
    if own[0].platform == "cpu":
        needed, there = needed * len(own), host_bytes()
    if there and needed > there:
        sizes = [f"engine.{key}={getattr(run.engine, key)}" for key in ("slots", "max_length")]
        others = ("pages", "prefix_tokens")
        sizes += [f"engine.{key}={value}" for key in others if (value := getattr(run.engine, key))]
        raise UserError(
            f"an engine of {', '.join(sizes)} holds {needed / 1e9:,.1f} GB with its weights, and there are"
            f" {there / 1e9:,.1f} GB; lower one of them"
        )


def engine_of(run: EngineRun, params: Params, mesh: Mesh, tokenizer: Tokenizer) -> Engine:
    """The engine over a run's weights."""
    return Engine(run.model, run.engine, params, mesh, stop_ids_of(run, tokenizer), run.seed)


def warm_up(engine: Engine) -> None:
    """Wait until all programs of an engine are compiled, and print that the run waits for this."""
    print("engine: compiling its programs", flush=True)
    engine.warm_up()


def stop_ids_of(run: EngineRun, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a turn: the model family's own stop ids, or with tools those of the run's grammar."""
    return tuple(tokenizer.stop_ids if not words_of(run.tools) else GRAMMARS[run.rollout.grammar].stop_ids(tokenizer))
