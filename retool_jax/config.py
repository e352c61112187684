"""A run as frozen dataclasses, read from a YAML file and `key=value` words. A key that nobody reads is an error."""

import dataclasses
import difflib
import hashlib
import inspect
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retool_jax.data.problems import DataConfig
from retool_jax.engine.engine import EngineConfig
from retool_jax.errors import UserError
from retool_jax.mesh import MeshConfig
from retool_jax.models.config import ModelConfig
from retool_jax.rl.loss import ClipConfig
from retool_jax.rl.rollout import RolloutConfig
from retool_jax.sandbox import SandboxConfig
from retool_jax.update import OptimizerConfig

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class SFTConfig:
    """The cold start: imitation of demonstrations."""

    steps: int = 1000
    batch_tokens: int = 2048  # tokens of demonstrations per step, on average
    row_length: int = 192  # T of a packed row
    rows_per_micro: int = 4  # B of a micro-batch
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class RLConfig:
    """GRPO: groups of samples, rewards on the final answer, clipped updates."""

    steps: int = 80
    prompts_per_step: int = 24
    group_size: int = 8  # samples per prompt
    minibatches: int = 2  # optimiser steps per rollout; divides prompts_per_step
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
    tools: str = "python"  # python, or none for the text-only control
    tokenizer: str = "miniature"  # or a folder with tokenizer.json
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.tools not in ("python", "none"):
            raise UserError(f"tools={self.tools} is not one of: python, none")
        positive(self.sft, "sft", "steps", "batch_tokens", "row_length", "rows_per_micro")
        positive(self.checkpoint, "checkpoint", "every", "keep")
        check_rows(self.mesh, "sft.rows_per_micro", self.sft.rows_per_micro)


@dataclass(frozen=True)
class RLRun(SFTRun):
    """Everything that `config=grpo` may set; the cold start's part decides which checkpoint it begins from."""

    init_from: str = ""  # run folder of a cold start; empty: find or make the one that belongs to this config
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        rl = self.rl
        positive(rl, "rl", "steps", "prompts_per_step", "group_size", "minibatches", "row_length", "rows_per_micro")
        positive(self.evaluation, "evaluation", "problems")
        positive(self.rollout, "rollout", "max_prompt_tokens", "max_turns", "tool_output_chars")
        check_rows(self.mesh, "rl.rows_per_micro", rl.rows_per_micro)
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
        if self.evaluation.final_split not in ("dev", "test"):
            raise UserError(f"evaluation.final_split={self.evaluation.final_split} is not one of: dev, test")

    def cold_start(self) -> SFTRun:
        """The part of this run that makes its first weights, in a folder named by its content."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(SFTRun)}
        digest = hashlib.blake2b(repr([(k, shared[k]) for k in sorted(shared) if k != "run"]).encode(), digest_size=4)
        folder = Path(self.run).parent / f"cold-start-{self.tools}-seed{self.seed}-{digest.hexdigest()}"
        return SFTRun(**shared | {"run": str(folder)})


# Keys that another try of the same run may change: they do not touch what is computed, only how far or how often.
MAY_CHANGE = ("run", "rl.steps", "checkpoint.every", "checkpoint.keep")


def positive(section: object, name: str, *keys: str) -> None:
    for key in keys:
        if getattr(section, key) < 1:
            raise UserError(f"{name}.{key}={getattr(section, key)} must be at least 1")


def check_rows(mesh: MeshConfig, name: str, rows: int) -> None:
    parts = max(mesh.data, 1) * max(mesh.fsdp, 1)
    if rows % parts:
        raise UserError(
            f"{name}={rows} does not divide over mesh.data x mesh.fsdp = {parts} devices; use a multiple of {parts}"
        )


def load(words: list[str]) -> SFTRun | RLRun:
    """The run that a command line describes: `config=NAME key=value ...`; later words win.

    Raises:
        UserError: no such config, an unknown key (naming the nearest), a value of the wrong type.
    """
    for word in words:
        if "=" not in word:
            raise UserError(f"cannot read {word!r}: expected key=value, for example config=grpo; see --help")
    pairs = [tuple(word.split("=", 1)) for word in words]
    names = [value for key, value in pairs if key == "config"]
    if not names:
        raise UserError(f"no config given; add config=NAME, one of: {', '.join(config_names())}")
    overrides = [f"{key}={value}" for key, value in pairs if key != "config"]
    values = read_yaml(names[-1])
    schema = schema_of(values, names[-1])
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(values, OmegaConf.from_dotlist(overrides)))
    except OmegaConfBaseException as error:
        raise UserError(f"cannot read {' '.join(overrides)}: {error}") from error
    if not merged.get("run"):
        merged["run"] = str(Path("runs") / folder_name(names[-1], overrides))
    return build(schema, merged)


def read_yaml(name: str) -> dict:
    """One config file as nested dicts, on top of the one that its `base` names."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"no config {name!r} ({path}); there are: {', '.join(config_names())}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser's own kinds
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    base = values.pop("base", None)
    return OmegaConf.to_container(OmegaConf.merge(read_yaml(base), values)) if base else values


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def schema_of(values: dict, name: str) -> type[SFTRun]:
    schemas = {"sft": SFTRun, "grpo": RLRun}
    task = values.pop("task", None)
    if task not in schemas:
        raise UserError(f"config {name!r} has task={task!r}; it must be one of: {', '.join(schemas)}")
    return schemas[task]


def folder_name(config: str, overrides: list[str]) -> str:
    """A run's folder from its command, so that the same command finds its run and another one does not."""
    words = [re.sub(r"[^\w.=+-]+", "_", word) for word in sorted(overrides) if not word.startswith("run=")]
    name = "-".join([Path(config).stem, *words])
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return name


def build(schema: type, values: dict, prefix: str = "") -> typing.Any:
    """A dataclass from nested dicts, checking every key and every type.

    Whole numbers are accepted for float; nothing else is converted silently.
    """
    types = typing.get_type_hints(schema)
    known = [f.name for f in dataclasses.fields(schema)]
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {prefix}{key}; {_nearest(f'{prefix}{key}', schema, known, prefix)}")
    return schema(**{key: _convert(types[key], value, f"{prefix}{key}") for key, value in values.items()})


def _nearest(key: str, schema: type, known: list[str], prefix: str) -> str:
    candidates = [prefix + name for name in known] + ([] if prefix else [key for key, *_ in describe(schema)])
    match = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    same_name = [c for c in candidates if c.split(".")[-1] == key.split(".")[-1]]
    if found := same_name[:1] or match:
        return f"did you mean {found[0]}?"
    return f"known here: {', '.join(prefix + name for name in known)}"


def _convert(wanted: typing.Any, value: object, key: str) -> object:
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            raise UserError(f"{key}={value} must be a section with keys: {', '.join(typing.get_type_hints(wanted))}")
        return build(wanted, value, f"{key}.")
    if typing.get_origin(wanted) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(typing.get_args(wanted)[0], item, key) for item in items)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is str and value is None:
        return ""
    if type(value) is not wanted:
        raise UserError(f"{key}={value} is of type {type(value).__name__}; it must be {wanted.__name__}")
    return value


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, object, str]]:
    """Every leaf key as (key, type, default, comment from the source)."""
    rows = []
    types = typing.get_type_hints(schema)
    comments = _comments(schema)
    for item in dataclasses.fields(schema):
        key, wanted = prefix + item.name, types[item.name]
        if dataclasses.is_dataclass(wanted):
            rows += describe(wanted, f"{key}.")
        else:
            name = getattr(wanted, "__name__", str(wanted)) if typing.get_origin(wanted) is None else "list"
            rows.append((key, name, item.default, comments.get(item.name, "")))
    return rows


def _comments(schema: type) -> dict[str, str]:
    """What the source says about each field: the comment on its line, or the string below it."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        lines = inspect.getsource(cls).splitlines()
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if match := re.match(r"    (\w+): [^#]*?(?:  # (.*))?$", line):
                below = below.strip()
                found[match[1]] = match[2] or (below.strip('"') if below.startswith('"""') else "")
    return found


def help_text(words: list[str]) -> str:
    """What `--help` prints: how to call, which configs exist, and the keys of the one named (or of grpo)."""
    name = next((word.split("=", 1)[1] for word in words if word.startswith("config=")), "grpo")
    schema = schema_of(values := read_yaml(name), name)
    resolved = flatten(build(schema, values))
    rows = [(f"{key}={_show(resolved[key])}", comment) for key, _, _, comment in describe(schema)]
    lines = [f"  {left:<44} {comment}".rstrip() for left, comment in rows]
    return "\n".join(
        [
            "usage: python -m retool_jax.train config=NAME [key=value ...]",
            "",
            f"configs: {', '.join(config_names())}; or the path of a YAML file",
            "",
            "Later words win over earlier ones, and all of them over the config's file. An unknown key or a value of",
            "the wrong type is an error. The run's folder holds config.yaml, metrics.jsonl, TensorBoard files,",
            "trajectories and checkpoints; the same command again resumes it.",
            "",
            f"keys of config={name} and their values there:",
            *lines,
        ]
    )


def flatten(run: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys and values of a dataclass tree."""
    flat = {}
    for item in dataclasses.fields(run):
        value = getattr(run, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[f"{prefix}{item.name}"] = value
    return flat


def _show(value: object) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)


def claim_folder(run: SFTRun) -> Path:
    """Make the run's folder and save the resolved config there, or check that it holds this very run.

    Raises:
        UserError: the folder holds a run of another config; nothing is changed.
    """
    folder = Path(run.run)
    path = folder / "config.yaml"
    text = OmegaConf.to_yaml(OmegaConf.create(to_plain(run)))
    if path.is_file():
        before = OmegaConf.to_container(OmegaConf.load(path))
        old, new = _flatten_dict(before), _flatten_dict(to_plain(run))
        differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in MAY_CHANGE]
        if differing:
            key = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UserError(
                f"{folder} holds another run: {key} is {old.get(key)} there and {new.get(key)} here{more};"
                " choose another run=FOLDER, or remove that one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another run=FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return folder


def to_plain(run: object) -> dict:
    """Nested dicts and lists of a dataclass tree, with its task."""
    plain = dataclasses.asdict(
        run, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )
    return {"task": "grpo" if isinstance(run, RLRun) else "sft", **plain}


def _flatten_dict(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
