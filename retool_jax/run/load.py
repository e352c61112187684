"""A run from a YAML file and `key=value` words: reading, checking, help. A key that no section has is an error.

Nothing heavy is imported and nothing is fetched here, so that help and mistakes in the words are printed at once.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import textwrap
import typing
from pathlib import Path

from omegaconf import ListConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from retool_jax.errors import UserError, one_line
from retool_jax.fields import (
    HIDDEN,
    complaint,
    describe,
    flatten,
    flatten_dict,
    hints_of,
    holds_secret,
    nested,
    secret_keys,
    show,
    split_words,
    without_secrets,
)
from retool_jax.models.config import ARCHITECTURE
from retool_jax.run.schema import TASKS, RLRun, Run

CONFIGS = Path(__file__).parents[1] / "configs"


def load(words: list[str]) -> Run:
    """The run that a command line describes: `config=NAME key=value ...`; later words win.

    What the checkpoint of `init_from` decides is not looked up here; `build.resolve` does that.

    Raises:
        UserError: no such config, an unknown key (naming the nearest), a value of the wrong type or out of its range.
    """
    return make(*read(words))


def read(words: list[str]) -> tuple[type[Run], dict]:
    """The run class that a command line describes, and the values that its words and its config set, nested.

    Raises:
        UserError: no such config, or a word that cannot be read.
    """
    pairs = split_words(words, secrets=secret_keys(RLRun))
    # mesh=NAME is short for mesh.name=NAME, unless the value is a whole section in braces.
    pairs = [("mesh.name" if key == "mesh" and value[:1] != "{" else key, value) for key, value in pairs]
    names = [value for key, value in pairs if key == "config"]
    if not names:
        raise UserError(f"no config given; add config=NAME, one of: {', '.join(config_names())}")
    overrides = {key: value for key, value in pairs if key != "config"}
    for key, value in overrides.items():
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UserError(f"{key} has bytes that are not UTF-8; choose another value")
    files = read_files(names[-1])
    schema = schema_of(merged(files), names[-1])
    kinds = {leaf.key: leaf.kind for leaf in describe(schema)}
    given: dict = {}
    for key, value in overrides.items():
        if key in ("task", "base"):
            raise UserError(
                f"{key}={value}: only a config's file can set its {key}; choose another config=NAME, or write a YAML"
                " file of your own"
            )
        if kinds.get(key) == "str" and value.strip()[:1] not in ("'", '"') and not holds_secret(schema, key):
            # Taken literally: a folder may be called 2024, `a #2` or @home, which YAML would read as something else.
            given = merged([given, nested({key: value.strip()})])
            continue
        try:
            word = OmegaConf.from_dotlist([f"{key}={value}"])
            # If YAML reads another type than the field may have, the value is taken literally.
            allowed = {"str": str, "str or list": str | ListConfig}.get(kinds.get(key, ""), object)
            if not isinstance(OmegaConf.select(word, key), allowed):
                OmegaConf.update(word, key, value)  # tools=no is not a truth value
            given = merged([given, OmegaConf.to_container(word)])
        except Exception as error:  # OmegaConf's types, and those of its YAML parser
            if holds_secret(schema, key):
                raise UserError(f"cannot read {key}={HIDDEN}: it is no YAML value; put it in quotes") from None
            raise UserError(f"cannot read {key}={value}: {one_line(error, 1000)}") from error
    values = merged_with_miniature([*files, given])
    del values["task"]
    if "run" in hints_of(schema) and not values.get("run"):
        values["run"] = str(Path("runs") / folder_name(names[-1], overrides, schema))
    return schema, values


def merged_with_miniature(layers: list[dict]) -> dict:
    """The values of configs and words, lowest layer first, merged with one exception for the miniature.

    The miniature has no `init_from`. When a layer above it sets one and sets no key of the model's shape, the
    miniature's shape and tokenizer are dropped, so that both are taken from the checkpoint.
    """
    first = next((index for index, layer in enumerate(layers) if layer.get("init_from")), len(layers))
    below, above = merged(layers[:first]), merged(layers[first:])
    own = set(ARCHITECTURE) & (above.get("model") or {}).keys()
    if above.get("init_from") and below.get("tokenizer") == "miniature" and not own:
        below["tokenizer"] = ""
        below["model"] = {key: value for key, value in below["model"].items() if key not in ARCHITECTURE}
    return merged([below, above])


def merged(layers: list[dict]) -> dict:
    """Nested values, with later layers over earlier ones; sections are merged, a list is replaced as a whole."""
    result: dict = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict):
                there = result.get(key)
                value = merged([there if isinstance(there, dict) else {}, value])
            result[key] = value
    return result


def read_yaml(name: str) -> dict:
    """One config file as nested dicts, merged over the one that its `base` names."""
    return merged(read_files(name))


def read_files(name: str, above: tuple[str, ...] = ()) -> list[dict]:
    """One config file and the chain of its bases, lowest first; `above` are the configs that led here."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        needed = f", the base of {above[-1]}," if above else ""
        raise UserError(f"no config {name!r}{needed} ({path}); there are: {', '.join(config_names())}")
    if name in above:
        raise UserError(f"config {name!r} is its own base, through {' -> '.join(above)}; remove one `base`")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(values, dict):
            raise ValueError("expected keys and values")
    except Exception as error:  # OmegaConf's types, and those of its YAML parser
        raise UserError(f"cannot read {path}: {one_line(error, 1000)}") from error
    base = values.pop("base", None)
    return [*(read_files(str(base), (*above, name)) if base else ()), values]


def config_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def schema_of(values: dict, name: str) -> type[Run]:
    """The run class of a config, by its task."""
    task = values.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise UserError(f"config {name!r} has task={task!r}; it must be one of: {', '.join(TASKS)}")
    return TASKS[task]


def folder_name(config: str, overrides: dict[str, str], schema: type[Run]) -> str:
    """The name of a run's folder, from its command: the same command finds its run, another one does not.

    Secrets are left out, also from the digest.
    """
    shown = {}
    for key, value in overrides.items():
        if holds_secret(schema, key):  # of a section, the keys that are not secret
            flat = flatten_dict(OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"])))
            shown |= {name: show(part) for name, part in flat.items() if not holds_secret(schema, name)}
        else:
            shown[key] = value
    # The folder, and the result that this one is compared with, do not make it another run.
    words = [config, *(f"{key}={value}" for key, value in sorted(shown.items()) if key not in ("run", "compare"))]
    clean = [re.sub(r"[^\w.=+-]+", "_", word) for word in [Path(config).stem, *words[1:]]]
    name = "-".join(clean)
    if clean != words or len(name) > 120:  # two commands may differ only in the characters that were lost
        name = f"{name[:100]}-{hashlib.blake2b(repr(words).encode(), digest_size=4).hexdigest()}"
    return name


def make(schema: type, values: dict) -> typing.Any:
    """A run from nested dicts, checking every key and every value.

    An integer is accepted for a float, a single value for a list of one, and null for an empty string or list; nothing
    else is converted.
    """
    try:
        # From JSON, pydantic turns dicts into sections and lists into tuples even in strict mode.
        return TypeAdapter(schema).validate_json(json.dumps(_converted(schema, values), default=str))
    except ValidationError as error:
        for found in error.errors(include_url=False):
            if found["type"] == "unexpected_keyword_argument":
                raise UserError(_unknown_key(found["loc"], found["input"], schema)) from None
        raise UserError(complaint(error, schema)) from None


def _converted(schema: type, values: dict) -> dict:
    """Values from YAML with the conversions that `make` allows."""
    converted = {}
    for key, value in values.items():
        wanted = hints_of(schema).get(key)
        if isinstance(value, dict):
            value = _converted(wanted, value) if dataclasses.is_dataclass(wanted) else value
        elif typing.get_origin(wanted) is tuple and not isinstance(value, list):
            value = [] if value is None else [value]
        elif wanted is str and value is None:
            value = ""
        elif type(value) is int and float in (wanted, *typing.get_args(wanted)):
            value = float(value)
        converted[key] = value
    return converted


def _unknown_key(place: tuple, value: object, schema: type) -> str:
    """The error message for a key that no section has."""
    *sections, last = map(str, place)
    key = ".".join([*sections, last])
    key = next(iter(flatten_dict({key: value})), key)
    owner = schema
    for name in sections:
        owner = hints_of(owner)[name]
    listed = ", ".join(".".join([*sections, name]) for name in hints_of(owner))
    return f"unknown key {without_secrets(key, secret_keys(RLRun))}; {_nearest(key, schema) or f'known here: {listed}'}"


def _nearest(key: str, root: type) -> str | None:
    """A hint for an unknown key: the task that has it, or similar keys of this run."""
    keys = [leaf.key for leaf in describe(root)]
    for task, schema in TASKS.items():
        if key in (leaf.key for leaf in describe(schema)):
            return f"it belongs to configs of task {task}; this one has {', '.join(hints_of(root))}"
    if complete := [known for known in keys if known.endswith(f".{key}")]:
        return f"did you mean {' or '.join(complete)}?"
    last = key.split(".")[-1]
    same_name = [known for known in keys if known.split(".")[-1] == last]
    match = difflib.get_close_matches(key, same_name, 1, cutoff=0.0) or difflib.get_close_matches(key, keys, 1, 0.7)
    return f"did you mean {match[0]}?" if match else None


def help_text(words: list[str], command: str = "train", config: str = "grpo") -> str:
    """The text of `--help`: usage, configs, and the keys of the config that `words` name, or of `config`."""
    name = next((word.split("=", 1)[1] for word in words if word.startswith("config=")), config)
    schema = schema_of(values := read_yaml(name), name)
    del values["task"]
    resolved = flatten(make(schema, values))
    lines = []
    for leaf in describe(schema):
        value = HIDDEN if leaf.secret and resolved[leaf.key] else show(resolved[leaf.key])
        line = f"  {f'{leaf.key}={value}':<44} {leaf.comment}".rstrip()
        lines.append(_folded(line, 47))
    return "\n".join(
        [
            f"usage: python -m retool_jax.{command} config=NAME [key=value ...]",
            "",
            _folded(f"configs: {', '.join(config_names())}; or the path of a YAML file", 9),
            "",
            "Later words win over earlier ones, and all of them over the config's file. An unknown key or a value of",
            *_ENDINGS[command],
            "",
            f"keys of config={name} and their values there:",
            *lines,
        ]
    )


_ENDINGS = {  # the last part of each command's help
    "train": (
        "the wrong type is an error. The run's folder holds config.yaml, metrics.jsonl, TensorBoard files,",
        "trajectories and checkpoints; the same command again resumes it.",
    ),
    "evaluate": (
        "the wrong type is an error. The folder holds config.yaml, samples.jsonl with every trajectory, and at the",
        "end result.json; the same command again resumes it, or prints the result that is there.",
    ),
    "serve": (
        "the wrong type is an error. port=8000 is short for serve.port=8000, and so is host; nothing is written. A",
        "bearer token that clients must send is read from $RETOOL_SERVE_TOKEN.",
    ),
    "plan": (
        "the wrong type is an error. mesh=NAME names the chips, such as v5p-64; nothing is trained. Words of its own:",
        "json=FILE, tokens=N (of a trajectory), teacher=CONFIG (the teacher's model), search=true (docs/tpu.md).",
    ),
}


def _folded(line: str, indent: int) -> str:
    """Lines of at most 110 characters, indented from the second one on."""
    return textwrap.fill(line, 110, subsequent_indent=" " * indent, break_on_hyphens=False)
