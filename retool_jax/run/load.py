"""A run from a YAML file and `key=value` words: reading, checking, help. A key that nobody reads is an error.

Nothing heavy is imported and nothing is fetched here, so that help and a mistake in the words are told at once.
"""

import dataclasses
import difflib
import functools
import hashlib
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import pydantic.dataclasses
from omegaconf import ListConfig, OmegaConf
from pydantic import ValidationError

from retool_jax.errors import UserError
from retool_jax.fields import (
    CHECKED,
    HIDDEN,
    complaint,
    describe,
    flatten,
    flatten_dict,
    holds_secret,
    secret_keys,
    show,
)
from retool_jax.run.schema import TASKS, RLRun, Run

CONFIGS = Path(__file__).parents[1] / "configs"


def load(words: list[str]) -> Run:
    """The run that a command line describes: `config=NAME key=value ...`; later words win.

    What it leaves to the checkpoint of `init_from` is not looked up: `build.resolve` does that.

    Raises:
        UserError: no such config, an unknown key (naming the nearest), a value of the wrong type or out of its range.
    """
    return make(*read(words))


def split_words(words: Sequence[str], keys: Sequence[str] = ()) -> list[tuple[str, str]]:
    """A command line of `key=value` words as pairs, in their order; `keys` are those that a command without a config
    takes.

    Raises:
        UserError: a word without "=", or, where keys are given, with another one (naming the nearest) or no value.
    """
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (keys and key not in keys):
            near = difflib.get_close_matches(key.lstrip("-"), keys, 1)
            known = f"it takes {', '.join(keys)}" if keys else "expected key=value, for example config=grpo"
            hint = f"did you mean {near[0]}=...?" if near else f"{known} (see --help)"
            raise UserError(f"cannot read {_readable(word)!r}; {hint}")
        if keys and not value:
            raise UserError(f"{key}= is empty; give it a value or leave it out, see --help")
        pairs.append((key, value))
    return pairs


def read(words: list[str]) -> tuple[type[Run], dict]:
    """The class of the run that a command line describes, and the values that it and its config set, nested.

    Raises:
        UserError: no such config, or a word that cannot be read.
    """
    pairs = split_words(words)
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
            meant = {"str": str, "str or list": str | ListConfig}.get(kinds.get(key, ""), object)
            if not isinstance(OmegaConf.select(word, key), meant):
                OmegaConf.update(word, key, value)  # a folder may be called 2024, and tools=no is not a truth value
            values = OmegaConf.to_container(OmegaConf.merge(values, word))
        except Exception as error:  # OmegaConf's kinds, and those of its YAML parser
            if holds_secret(schema, key):
                raise UserError(f"cannot read {key}={HIDDEN}: it is no YAML value; put it in quotes") from None
            raise UserError(f"cannot read {key}={value}: {_one_line(error)}") from error
    if not values.get("run"):
        values["run"] = str(Path("runs") / folder_name(names[-1], overrides, schema))
    return schema, values


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


def schema_of(values: dict, name: str) -> type[Run]:
    """The class of the run that a config is for, by its task, which is taken out of the values."""
    task = values.pop("task", None)
    if task not in TASKS:
        raise UserError(f"config {name!r} has task={task!r}; it must be one of: {', '.join(TASKS)}")
    return TASKS[task]


def folder_name(config: str, overrides: dict[str, str], schema: type[Run]) -> str:
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


def make(schema: type, values: dict, prefix: str = "", root: type | None = None) -> typing.Any:
    """A section from nested dicts, checking every key and every value.

    Whole numbers are accepted for float, a single value for a list of one and nothing for an empty text; nothing else
    is converted. `root` is the whole run's class, where the nearest keys are looked for.
    """
    root = root or schema
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            unknown = next(iter(flatten_dict({key: value}, prefix)), f"{prefix}{key}")
            listed = ", ".join(prefix + name for name in hints)
            raise UserError(f"unknown key {_readable(unknown)}; {_nearest(unknown, root) or f'known here: {listed}'}")
    given = {key: _meant(hints[key], value, f"{prefix}{key}", root) for key, value in values.items()}
    try:
        made = _checked(schema)(**given)
        return made if type(made) is schema else schema(**given)
    except ValidationError as error:
        raise UserError(complaint(error, schema, prefix)) from None


@functools.cache
def _checked(schema: type) -> type:
    """The section as a class that checks the types of its values: itself, but for those of the sandbox, which may be
    used without the rest and check their ranges on their own."""
    if pydantic.dataclasses.is_pydantic_dataclass(schema):
        return schema
    return pydantic.dataclasses.dataclass(schema, frozen=True, config=CHECKED)


def _meant(wanted: typing.Any, value: object, key: str, root: type) -> object:
    """A value as YAML brings it, as its field may mean it; whether it may hold that is seen later."""
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            names = ", ".join(f"{key}.{name}" for name in typing.get_type_hints(wanted))
            shown = HIDDEN if holds_secret(root, key) else show(value)
            raise UserError(f"{key}={shown} sets a whole section; set one of its keys: {names}")
        return make(wanted, value, f"{key}.", root)
    if isinstance(wanted, types.UnionType) and isinstance(value, list):  # a text, or a list of them
        return tuple(value)
    if typing.get_origin(wanted) is tuple:
        items = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(_meant(typing.get_args(wanted)[0], item, key, root) for item in items)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return "" if wanted is str and value is None else value


def _nearest(key: str, root: type) -> str | None:
    """A sentence with the keys of a run that an unknown one may have meant."""
    keys = [known for known, *_ in describe(root)]
    for task, schema in TASKS.items():
        if key in (known for known, *_ in describe(schema)):
            return f"it belongs to configs of task {task}; this one has {', '.join(typing.get_type_hints(root))}"
    if complete := [known for known in keys if known.endswith(f".{key}")]:
        return f"did you mean {' or '.join(complete)}?"
    last = key.split(".")[-1]
    same_name = [known for known in keys if known.split(".")[-1] == last]
    match = difflib.get_close_matches(key, same_name, 1, cutoff=0.0) or difflib.get_close_matches(key, keys, 1, 0.7)
    return f"did you mean {match[0]}?" if match else None


def _readable(word: str) -> str:
    """A word of the command line without what may be a secret in it."""
    for key in secret_keys(RLRun):
        before, name, after = word.partition(key)
        word = before + name + (HIDDEN if after else "")
    return word


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def help_text(words: list[str]) -> str:
    """What `--help` prints: how to call, which configs exist, and the keys of the one named (or of grpo)."""
    name = next((word.split("=", 1)[1] for word in words if word.startswith("config=")), "grpo")
    schema = schema_of(values := read_yaml(name), name)
    resolved = flatten(make(schema, values))
    resolved |= {key: HIDDEN for key in secret_keys(schema) if resolved[key]}
    rows = [(f"{key}={show(resolved[key])}", comment) for key, _, _, comment in describe(schema)]
    lines = [
        textwrap.fill(f"  {left:<44} {comment}".rstrip(), 110, subsequent_indent=" " * 47, break_on_hyphens=False)
        for left, comment in rows
    ]
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
