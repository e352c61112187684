"""A run as frozen dataclasses, read from a YAML file and `key=value` words. A key that nobody reads is an error."""

import dataclasses
import difflib
import fnmatch
import hashlib
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from retool_jax.data.problems import DataConfig
from retool_jax.engine.engine import EngineConfig
from retool_jax.errors import UserError
from retool_jax.fields import HIDDEN, defaults_of, describe, flatten, flatten_dict, holds_secret, secret_keys, show
from retool_jax.mesh import MeshConfig, check_rows
from retool_jax.models.config import ARCHITECTURE, ModelConfig, config_from_hf
from retool_jax.models.huggingface import find_folder
from retool_jax.rl.loss import ClipConfig
from retool_jax.rl.rollout import RolloutConfig
from retool_jax.sandbox import SandboxConfig
from retool_jax.tokens.grammar import DEFAULT_GRAMMAR, GRAMMARS
from retool_jax.tools.config import NONE, check_tools, words_of
from retool_jax.update import OptimizerConfig

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class SFTConfig:
    """The cold start: imitation of demonstrations."""

    data: str = "arithmetic"  # or a JSONL or parquet file, or a hub id, with rows of `messages`
    grammar: str = ""  # how calls are written: hermes, or retool; empty: as in RL's rollout.grammar, else hermes
    steps: int = 1000  # 0 where epochs are set
    epochs: int = 0  # passes over `data`; each leaves out the rows that do not fill its last step
    batch_tokens: int = 2048  # tokens of demonstrations per step, on average
    batch_size: int = 0  # demonstrations per step; 0: as many as hold batch_tokens on average
    row_length: int = 192  # T of a packed row
    overlong: str = "error"  # for rows of `data` longer than row_length: error, or drop
    warmup_fraction: float = 0.0  # of all steps, and the cosine over the rest; 0: the optimizer's own steps
    rows_per_micro: int = 4  # B of a micro-batch
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class RLConfig:
    """GRPO: groups of samples, rewards on the final answer, clipped updates."""

    steps: int = 80
    prompts_per_step: int = 24
    group_size: int = 8  # samples per prompt
    minibatches: int = 2  # optimiser steps per rollout; divides prompts_per_step
    max_dropped: float = 0.5  # share of a step's trajectories that the machinery may lose before the run stops
    temperature: float = 1.0
    row_length: int = 256  # T of a packed row; at least engine.max_length
    rows_per_micro: int = 4  # B of a micro-batch
    clip: ClipConfig = field(default_factory=ClipConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out problems, sampled at temperature 1 and greedily."""

    every: int = 10  # RL steps between looks at the dev split; 0 never looks
    problems: int = 256
    answer_tokens: int = 256  # as rollout.answer_tokens, which is training's
    final_split: str = "test"  # for the table before and after RL; use dev while tuning


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 10  # steps
    keep: int = 2  # last checkpoints that stay on disk


@dataclass(frozen=True)
class SFTRun:
    """Everything that `config=sft` may set."""

    run: str = ""  # run folder; empty: runs/ and the command's words
    seed: int = 0
    tools: str | tuple[str, ...] = "python"  # or none (text only), calculator, my.module:MyTool; several in a list
    tokenizer: str = "miniature"  # or a folder with tokenizer.json, or a hub id; empty: that of init_from
    init_from: str = ""  # first weights: a run or Hugging Face folder, or a hub id; empty: random, or a cold start
    model: ModelConfig = field(default_factory=ModelConfig)  # where no key of its shape is set: that of init_from
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if isinstance(self.tools, tuple) and len(self.tools) == 1:  # one spelling, whoever compares
            object.__setattr__(self, "tools", self.tools[0])
        if self.sft.grammar not in ("", *GRAMMARS):
            raise UserError(f"sft.grammar={self.sft.grammar} is not one of: {', '.join(GRAMMARS)}")
        check_tools(self.tools, self.sft.grammar)
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed={self.seed} must lie between 0 and {(1 << 32) - 1}")
        check_sft(self.sft)
        positive(self.checkpoint, "checkpoint", "every", "keep")
        check_rows(dataclasses.asdict(self.mesh), "sft.rows_per_micro", self.sft.rows_per_micro)


@dataclass(frozen=True)
class RLRun(SFTRun):
    """Everything that `config=grpo` may set; the cold start's part decides which checkpoint it begins from."""

    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sft.epochs and not self.init_from:
            raise UserError(
                f"sft.epochs={self.sft.epochs} needs a cold start of its own; run config=sft first and give its folder"
                " as init_from, or use sft.steps"
            )
        check_tools(self.tools, self.rollout.grammar)
        if self.sft.grammar not in ("", self.rollout.grammar):
            raise UserError(
                f"sft.grammar={self.sft.grammar} is not rollout.grammar={self.rollout.grammar}; leave it out, so that"
                " the cold start is written as its policy will be read"
            )
        if "python_session" in words_of(self.tools) and self.engine.tool_lag >= 0:
            raise UserError(
                f"engine.tool_lag={self.engine.tool_lag} waits for each call, and with tools=python_session a call may"
                " wait for another trajectory's end; set engine.tool_lag=-1"
            )
        rl = self.rl
        positive(rl, "rl", "steps", "prompts_per_step", "group_size", "minibatches", "row_length", "rows_per_micro")
        positive(self.evaluation, "evaluation", "problems")
        in_range("evaluation.every", self.evaluation.every, 0)
        check_optimizer(rl.optimizer, "rl.optimizer")
        in_range("rl.max_dropped", rl.max_dropped, 0, 0.99)
        in_range("rl.clip.low", rl.clip.low, 0, 1)
        in_range("rl.clip.high", rl.clip.high, 0)
        in_range("rl.clip.dual", rl.clip.dual, 1)
        positive(self.rollout, "rollout", "max_prompt_tokens", "max_turns", "tool_output_tokens")
        check_rows(dataclasses.asdict(self.mesh), "rl.rows_per_micro", rl.rows_per_micro)
        if rl.group_size < 2:
            raise UserError(f"rl.group_size={rl.group_size}: a group needs at least 2 samples to compare")
        if rl.prompts_per_step % rl.minibatches:
            raise UserError(
                f"rl.prompts_per_step={rl.prompts_per_step} does not divide into rl.minibatches={rl.minibatches};"
                f" choose prompts_per_step as a multiple of {rl.minibatches}"
            )
        if rl.temperature <= 0:
            raise UserError(f"rl.temperature={rl.temperature} must be above 0: groups need different samples")
        if rl.row_length < self.engine.max_length:
            raise UserError(
                f"rl.row_length={rl.row_length} is shorter than engine.max_length={self.engine.max_length};"
                " a packed row must hold the longest trajectory"
            )
        if self.rollout.max_prompt_tokens >= self.engine.max_length:
            raise UserError(
                f"rollout.max_prompt_tokens={self.rollout.max_prompt_tokens} leaves no room in"
                f" engine.max_length={self.engine.max_length}"
            )
        for name, section in (("rollout", self.rollout), ("evaluation", self.evaluation)):
            room = self.engine.max_length - self.rollout.max_prompt_tokens
            if not 0 <= section.answer_tokens < room:
                raise UserError(
                    f"{name}.answer_tokens={section.answer_tokens} must lie between 0 (none) and {room - 1}, what"
                    f" engine.max_length={self.engine.max_length} leaves beside rollout.max_prompt_tokens; lower it"
                )
        if self.evaluation.final_split not in ("dev", "test"):
            raise UserError(f"evaluation.final_split={self.evaluation.final_split} is not one of: dev, test")

        if 0 < self.sandbox.queue_limit < self.engine.slots:
            raise UserError(
                f"sandbox.queue_limit={self.sandbox.queue_limit} is below engine.slots={self.engine.slots}: every slot"
                " may wait for a tool at once; raise it, or 0 lets all of them wait"
            )

    def sandbox_for_slots(self) -> SandboxConfig:
        """The sandbox with a queue that holds a call of every engine slot, so that none is refused or waits in vain,
        even if each of them runs to its time limit."""
        box, slots = self.sandbox, self.engine.slots
        longest_s = (slots / box.places + 1) * (box.limits.wall_s + 1)
        waiting = max(slots, box.sessions) if "python_session" in words_of(self.tools) else slots
        return dataclasses.replace(
            box, queue_limit=box.queue_limit or waiting, queue_s=min(max(box.queue_s, longest_s), 86400)
        )

    def cold_start(self) -> SFTRun:
        """The part of this run that makes its first weights, in a folder named by what decides them."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(SFTRun)}
        written = self.rollout.grammar if words_of(self.tools) and self.rollout.grammar != DEFAULT_GRAMMAR else ""
        shared["sft"] = dataclasses.replace(self.sft, grammar=written)
        shared["checkpoint"] = CheckpointConfig(every=max(self.sft.steps // 5, 1), keep=1)
        made = SFTRun(**shared)
        defaults = defaults_of(SFTRun)
        decisive = {key: value for key, value in flatten(made).items() if not may_change(key)}
        # Without those at their default, so that a key that is added later leaves the folder's name as it is.
        decisive = {key: value for key, value in decisive.items() if value != defaults[key]}
        decisive["rollout.grammar"] = self.rollout.grammar
        digest = hashlib.blake2b(repr(sorted(decisive.items())).encode(), digest_size=4).hexdigest()
        tools = re.sub(r"[^\w.+]+", "_", "+".join(words_of(self.tools)) or NONE)[:60]
        folder = Path(self.run).parent / f"cold-start-{tools}-seed{self.seed}-{digest}"
        return dataclasses.replace(made, run=str(folder))


# What another try of the same run may change; patterns of keys. Every other key decides the run's numbers, or what they
# are compared with, and has to be as it was when the folder was made.
MAY_CHANGE = (
    # Where it lies, how far it goes, how often it looks and saves. A look changes no weights; what it measures stays.
    *("run", "rl.steps", "rl.max_dropped", "evaluation.every", "checkpoint.*"),
    # How it lies on the devices: the same formulas, so the same numbers up to the order of float sums. A gradient does
    # not depend on how its batch is cut (contract 6), nor a draw on the slots and pages around it (contract 5).
    *("mesh.*", "sft.rows_per_micro", "rl.rows_per_micro", "rl.row_length"),
    *("model.remat", "model.head_chunk", "model.attention_kernel"),
    *("engine.slots", "engine.chunk_rows", "engine.decode_steps", "engine.read_late", "engine.page_size"),
    *("engine.pages", "engine.*_buckets"),
    "model.max_positions",  # nothing is computed with it
    # Where programs run and how that machinery is looked after: its faults are no signal (contract 7). What a program
    # sees and may use (image, modules, limits) decides what it prints, and stays.
    *("sandbox.backend", "sandbox.slots", "sandbox.urls", "sandbox.token", "sandbox.queue_*", "sandbox.retries"),
    *("sandbox.recycle_*", "sandbox.probe_s", "sandbox.session*"),
)
# Keys that older folders lack, where they meant something else before they existed than their default says now.
ABSENT = {"evaluation.answer_tokens": 0}  # no evaluation asked for an answer
# Keys that older folders hold and this version has not, with the values at which they changed nothing.
REMOVED: dict[str, tuple[object, ...]] = {
    "rollout.tool_output_chars": (),  # outputs are cut by tokens now, and no number of characters does the same
}


def may_change(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def positive(section: object, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) < 1:
            raise UserError(f"{name}.{key}={getattr(section, key)} must be at least 1")


def in_range(key: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise UserError(f"{key}={value} must be {limit}")


def check_sft(sft: SFTConfig) -> None:
    for key in ("steps", "epochs", "batch_size"):
        in_range(f"sft.{key}", getattr(sft, key), 0)
    if bool(sft.steps) == bool(sft.epochs):
        state = "both set" if sft.steps else "both 0"
        raise UserError(
            f"sft.steps={sft.steps} and sft.epochs={sft.epochs} are {state}; set one of them, and 0 for the other"
        )
    if sft.epochs and sft.data == "arithmetic":
        raise UserError(f"sft.epochs={sft.epochs}: sft.data=arithmetic has no end; use sft.steps, or other data")
    positive(sft, "sft", "batch_tokens", "row_length", "rows_per_micro")
    if sft.overlong not in ("error", "drop"):
        raise UserError(f"sft.overlong={sft.overlong} is not one of: error, drop")
    check_optimizer(sft.optimizer, "sft.optimizer")
    in_range("sft.warmup_fraction", sft.warmup_fraction, 0, 0.99)
    if sft.warmup_fraction and (sft.optimizer.warmup_steps or sft.optimizer.decay_steps):
        raise UserError(
            f"sft.warmup_fraction={sft.warmup_fraction} decides sft.optimizer.warmup_steps and decay_steps; set both to"
            " 0, or sft.warmup_fraction=0"
        )


def check_optimizer(optimizer: OptimizerConfig, name: str) -> None:
    for key in ("learning_rate", "warmup_steps", "decay_steps", "weight_decay", "max_grad_norm"):
        in_range(f"{name}.{key}", getattr(optimizer, key), 0)
    for key in ("final_fraction", "b1", "b2"):
        in_range(f"{name}.{key}", getattr(optimizer, key), 0, 1)


def load(words: list[str]) -> SFTRun | RLRun:
    """The run that a command line describes: `config=NAME key=value ...`; later words win.

    Raises:
        UserError: no such config, an unknown key (naming the nearest), a value of the wrong type.
    """
    for word in words:
        if "=" not in word:
            raise UserError(f"cannot read {_readable(word)!r}: expected key=value, for example config=grpo; see --help")
    pairs = [tuple(word.split("=", 1)) for word in words]
    names = [value for key, value in pairs if key == "config"]
    if not names:
        raise UserError(f"no config given; add config=NAME, one of: {', '.join(config_names())}")
    overrides = {key: value for key, value in pairs if key != "config"}
    values = read_yaml(names[-1])
    schema = schema_of(values, names[-1])
    kinds = {key: name for key, name, *_ in describe(schema)}
    for key, value in overrides.items():
        try:
            word = OmegaConf.from_dotlist([f"{key}={value}"])
            # A list is a list where one may stand; anything else is what was written.
            meant = {"str": str, "str or list": str | ListConfig}.get(kinds.get(key), object)
            if not isinstance(OmegaConf.select(word, key), meant):
                OmegaConf.update(word, key, value)  # a folder may be called 2024, and tools=no is not a truth value
            values = OmegaConf.to_container(OmegaConf.merge(values, word))
        except Exception as error:  # OmegaConf's kinds, and those of its YAML parser
            if holds_secret(schema, key):
                raise UserError(f"cannot read {key}={HIDDEN}: it is no YAML value; put it in quotes") from None
            raise UserError(f"cannot read {key}={value}: {_one_line(error)}") from error
    if not values.get("run"):
        values["run"] = str(Path("runs") / folder_name(names[-1], overrides, schema))
    return build(schema, with_checkpoint(values))


def with_checkpoint(values: dict) -> dict:
    """A run's values with what they leave to the checkpoint of `init_from`: the tokenizer and the model's shape.

    The shape is read there when no key of it is set; one that is set is compared when the weights are loaded.

    Raises:
        UserError: the checkpoint's `config.json` describes a model that is not supported, or cannot be fetched.
    """
    name, model = values.get("init_from"), values.get("model") or {}
    if not name or not isinstance(model, dict):
        return values
    folder = Path(name)
    its_run = read_yaml(str(folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
    its_run = its_run if {"model", "tokenizer"} <= its_run.keys() else None
    if values.get("tokenizer") == "":
        values = values | {"tokenizer": its_run["tokenizer"] if its_run else name}
    if set(ARCHITECTURE) & model.keys():
        return values
    if its_run:
        there = its_run["model"]
    elif (find_folder(name, weights=False) / "config.json").is_file():
        there = dataclasses.asdict(config_from_hf(find_folder(name, weights=False)))
    else:
        return values  # those who load the weights say that there is nothing
    return values | {"model": {key: there[key] for key in (*ARCHITECTURE, "max_positions") if key in there} | model}


def read_yaml(name: str, above: tuple[str, ...] = ()) -> dict:
    """One config file as nested dicts, on top of the one that its `base` names."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        needed = f", the base of {above[-1]}," if above else ""
        raise UserError(f"no config {name!r}{needed} ({path}); there are: {', '.join(config_names())}")
    if name in above:
        raise UserError(f"config {name!r} is its own base, by way of {' -> '.join(above)}; remove one `base`")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(values, dict):
            raise ValueError("expected keys and values")
        base = values.pop("base", None)
        if not base:
            return values
        return OmegaConf.to_container(OmegaConf.merge(read_yaml(str(base), (*above, name)), values))
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def schema_of(values: dict, name: str) -> type[SFTRun]:
    schemas = {"sft": SFTRun, "grpo": RLRun}
    task = values.pop("task", None)
    if task not in schemas:
        raise UserError(f"config {name!r} has task={task!r}; it must be one of: {', '.join(schemas)}")
    return schemas[task]


def folder_name(config: str, overrides: dict[str, str], schema: type[SFTRun]) -> str:
    """A run's folder from its command, so that the same command finds its run and another one does not.

    Secrets have no part in it, not even in its digest.
    """
    shown = {}
    for key, value in overrides.items():
        if holds_secret(schema, key):  # a section's are its other keys
            flat = flatten_dict(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"])))
            shown |= {name: show(part) for name, part in flat.items() if not holds_secret(schema, name)}
        else:
            shown[key] = value
    words = [config, *(f"{key}={value}" for key, value in sorted(shown.items()) if key != "run")]
    clean = [re.sub(r"[^\w.=+-]+", "_", word) for word in [Path(config).stem, *words[1:]]]
    name = "-".join(clean)
    if clean != words or len(name) > 120:  # what was lost may be all that tells two commands apart
        name = f"{name[:100]}-{hashlib.blake2b(repr(words).encode(), digest_size=4).hexdigest()}"
    return name


def build(schema: type, values: dict, prefix: str = "", root: type | None = None) -> typing.Any:
    """A dataclass from nested dicts, checking every key and every type.

    Whole numbers are accepted for float; nothing else is converted silently. `root` is the whole run's class, where
    the nearest keys are looked for.
    """
    root = root or schema
    types = typing.get_type_hints(schema)
    known = [f.name for f in dataclasses.fields(schema)]
    for key, value in values.items():
        if key not in known:
            unknown = next(iter(flatten_dict({key: value}, prefix)), f"{prefix}{key}")
            listed = ", ".join(prefix + name for name in known)
            raise UserError(f"unknown key {_readable(unknown)}; {_nearest(unknown, root) or f'known here: {listed}'}")
    return schema(**{key: _convert(types[key], value, f"{prefix}{key}", root) for key, value in values.items()})


def _nearest(key: str, root: type) -> str | None:
    """A sentence with the keys of a run that an unknown one may have meant."""
    keys = [known for known, *_ in describe(root)]
    if key in (known for known, *_ in describe(RLRun)):
        return f"it belongs to configs of task grpo; this one has {', '.join(f.name for f in dataclasses.fields(root))}"
    if complete := [known for known in keys if known.endswith(f".{key}")]:
        return f"did you mean {' or '.join(complete)}?"
    last = key.split(".")[-1]
    same_name = [known for known in keys if known.split(".")[-1] == last]
    match = difflib.get_close_matches(key, same_name, 1, cutoff=0.0) or difflib.get_close_matches(key, keys, 1, 0.7)
    return f"did you mean {match[0]}?" if match else None


def _convert(wanted: typing.Any, value: object, key: str, root: type) -> object:
    shown = HIDDEN if holds_secret(root, key) else show(value)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            names = ", ".join(f"{key}.{name}" for name in typing.get_type_hints(wanted))
            raise UserError(f"{key}={shown} sets a whole section; set one of its keys: {names}")
        return build(wanted, value, f"{key}.", root)
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):  # a text, or a list of them
        wanted = str if isinstance(value, str) else tuple[str, ...]
    if typing.get_origin(wanted) is tuple:
        items = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(_convert(typing.get_args(wanted)[0], item, key, root) for item in items)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={shown} must be a finite number")
    if wanted is str and value is None:
        return ""
    if type(value) is not wanted:
        if isinstance(value, dict) and not holds_secret(root, key):
            raise UserError(f"{key} is a single {wanted.__name__} and has no key {next(iter(value), '')!r} below it")
        is_what = "is empty" if value is None else f"is of type {type(value).__name__}"
        raise UserError(f"{key}={shown} {is_what}; it must be {wanted.__name__}")
    return value


def _readable(word: str) -> str:
    """A word of the command line without what may be a secret in it."""
    for key in secret_keys(RLRun):
        before, name, after = word.partition(key)
        word = before + name + (HIDDEN if after else "")
    return word


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
