"""Sections of a run as trees of frozen dataclasses: what their fields may hold, and their keys, values and comments.

A section is a pydantic dataclass with `config=CHECKED`. Its fields say in their types what they may hold, and
`complaint` says in words which one holds something else.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError

HIDDEN = "***"  # what is shown of a secret
# No unknown keys, nothing converted silently, numbers that are numbers.
CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def complaint(error: ValidationError, schema: type, prefix: str = "") -> str:
    """The first thing that is wrong with the values of a section: the key below `prefix`, its value, its limit."""
    found = error.errors(include_url=False)[0]
    name, value, kind = str(found["loc"][0]), found["input"], found["type"]
    key = f"{prefix}{name}"
    hint = typing.get_type_hints(schema, include_extras=True).get(name)
    if hint is None:
        return f"unknown key {key}"
    secret = holds_secret(schema, name)
    shown = HIDDEN if secret else show(value)
    wanted = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple and len(found["loc"]) > 1 else hint
    if kind == "literal_error":
        return f"{key}={shown} is not one of: {', '.join(filter(None, typing.get_args(wanted)))}"
    if kind == "finite_number":
        return f"{key}={shown} must be a finite number"
    if limit := _limit(wanted) if kind.startswith(("greater_than", "less_than")) else "":
        return f"{key}={shown} must be {limit}"
    if isinstance(value, dict) and not secret:
        return f"{key} is a single {_type_name(wanted)} and has no key {next(iter(value), '')!r} below it"
    if kind.endswith("_type"):
        is_what = "is empty" if value is None else f"is of type {type(value).__name__}"
        return f"{key}={shown} {is_what}; it must be {_type_name(wanted)}"
    return f"{key}={shown}: {found['msg']}"


def _limit(hint: object) -> str:
    """The range of a number in words, from the constraints in its annotation."""
    constraints = [each for item in getattr(hint, "__metadata__", ()) for each in item.metadata]
    bounds = {name: getattr(each, name) for each in constraints for name in ("ge", "gt", "le") if hasattr(each, name)}
    if {"ge", "le"} <= bounds.keys():
        return f"between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most"}
    return " and ".join(f"{words[name]} {value}" for name, value in bounds.items())


def _type_name(hint: object) -> str:
    """What a value is called that a field may hold."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if typing.get_origin(hint) is tuple:
        return "list"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    return "str" if typing.get_origin(hint) is typing.Literal else hint.__name__


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, object, str]]:
    """Every leaf key as (key, type, default, comment from the source)."""
    rows = []
    hints = typing.get_type_hints(schema)
    comments = _comments(schema)
    for item in dataclasses.fields(schema):
        key, wanted = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(wanted):
            rows += describe(wanted, f"{key}.")
        else:
            rows.append((key, _type_name(wanted), item.default, comments.get(item.name, "")))
    return rows


def defaults_of(schema: type) -> dict[str, object]:
    """Every leaf key and its default, as YAML holds it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, _, value, _ in describe(schema)}


@functools.cache
def secret_keys(schema: type) -> frozenset[str]:
    """The leaf keys whose fields say `metadata={"secret": True}`: shown to nobody, and in no file and no name."""
    found = set()
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= {f"{item.name}.{key}" for key in secret_keys(hints[item.name])}
        elif item.metadata.get("secret"):
            found.add(item.name)
    return frozenset(found)


def holds_secret(schema: type, key: str) -> bool:
    """Whether a key is a secret, or a section with one in it."""
    return any(secret == key or secret.startswith(f"{key}.") for secret in secret_keys(schema))


@functools.cache  # reading source is slow
def _comments(schema: type) -> dict[str, str]:
    """What the source says about each field: the comment on its line, or the string below it."""
    found: dict[str, str] = {}
    source = inspect.getsource(schema)
    for match in re.finditer(r'^    (\w+): [^#\n]*?(?:  # (.*))?\n(?:    """([^"]*)""")?', source, re.MULTILINE):
        found[match[1]] = match[2] or " ".join((match[3] or "").split())
    return found


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


def flatten_dict(values: dict, prefix: str = "") -> dict[str, object]:
    """Dotted keys and values of nested dicts."""
    flat = {}
    for key, value in values.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def show(value: object) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(show, value))}]"
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
