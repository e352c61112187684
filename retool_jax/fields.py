"""Sections of a run as trees of frozen dataclasses: the constraints of their fields, their keys, values and comments,
and the words of a command that set them.

A section is a pydantic dataclass with `config=CHECKED`. The types of its fields state the constraints, and `complaint`
turns pydantic's error into one line.
"""

import dataclasses
import difflib
import functools
import inspect
import os
import re
import types
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from retool_jax.errors import UserError

HIDDEN = "***"  # shown in place of a secret
# No unknown keys, no silent conversions, no NaN or infinity.
CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

MOST = (1 << 31) - 1  # the largest count: arrays on a device hold counts in 32 bits
LARGEST = 1e9  # the largest coefficient or bound: as a bound it means none, and its products stay finite in fp32
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Above0 = Annotated[float, Field(gt=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]


@functools.cache
def hints_of(schema: type) -> dict[str, typing.Any]:
    """The types of a section's fields, with their constraints."""
    return typing.get_type_hints(schema, include_extras=True)


def complaint(error: ValidationError, schema: type, prefix: str = "") -> str:
    """The first error in the values of a section, in one line: the key below `prefix`, its value, its limit."""
    found = error.errors(include_url=False)[0]
    value, kind, wanted, inside = found["input"], found["type"], schema, list(found["loc"])
    names = []
    while inside and dataclasses.is_dataclass(wanted) and inside[0] in hints_of(wanted):
        names.append(inside.pop(0))
        wanted = _without_none(hints_of(wanted)[names[-1]])
    key, secret = prefix + ".".join(names), holds_secret(schema, ".".join(names))
    shown = HIDDEN if secret else show(value)
    if kind == "unexpected_keyword_argument":
        return f"unknown key {prefix}{'.'.join([*names, *map(str, inside)])}"
    if dataclasses.is_dataclass(wanted):
        listed = ", ".join(f"{key}.{name}" for name in hints_of(wanted))
        return f"{key}={shown} sets a whole section; set one of its keys: {listed}"
    if typing.get_origin(wanted) is tuple and inside:
        wanted = typing.get_args(wanted)[0]
    if kind == "literal_error":
        return f"{key}={shown} is not one of: {', '.join(filter(None, typing.get_args(wanted)))}"
    if kind == "finite_number":
        return f"{key}={shown} must be a finite number"
    if limit := _limit(wanted, kind) if kind.startswith(("greater_than", "less_than")) else "":
        return f"{key}={shown} must be {limit}"
    if isinstance(value, dict) and not secret:
        return f"{key} is a single {_type_name(wanted)} and has no key {next(iter(value), '')!r} below it"
    if kind.endswith("_type"):
        is_what = "is empty" if value is None else f"is of type {type(value).__name__}"
        return f"{key}={shown} {is_what}; it must be {_type_name(wanted)}"
    return f"{key}={shown}: {found['msg']}"


def _without_none(hint: object) -> object:
    """The type `int` of `int | None`; any other type as it is."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(kinds) == 1 else hint


def _limit(hint: object, kind: str) -> str:
    """The range of a number in words, from the constraints in its annotation.

    The general upper limits `MOST` and `LARGEST` are mentioned only when the value exceeds them.
    """
    constraints = [each for item in getattr(hint, "__metadata__", ()) for each in item.metadata]
    bounds = {
        name: getattr(each, name) for each in constraints for name in ("ge", "gt", "le", "lt") if hasattr(each, name)
    }
    if bounds.get("le") in (MOST, LARGEST):
        bounds = {name: value for name, value in bounds.items() if (name == "le") == kind.startswith("less_than")}
    if {"ge", "le"} <= bounds.keys():
        return f"between {bounds['ge']} and {bounds['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {value}" for name, value in bounds.items())


def _type_name(hint: object) -> str:
    """The name of a field's type in error messages."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
    if typing.get_origin(hint) is tuple:
        return "list"
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_type_name, typing.get_args(hint)))
    return "str" if typing.get_origin(hint) is typing.Literal else hint.__name__


class Leaf(NamedTuple):
    """A key that a run may set."""

    key: str
    kind: str  # name of its type
    default: object
    comment: str  # from the source
    secret: bool  # its field has `metadata={"secret": True}`: it is never shown or written, also in no folder's name


@functools.cache
def describe(schema: type, prefix: str = "") -> tuple[Leaf, ...]:
    """Every leaf key of a section."""
    leaves: list[Leaf] = []
    comments = _comments(schema)
    for item in dataclasses.fields(schema):
        key, wanted = prefix + item.name, hints_of(schema)[item.name]
        if dataclasses.is_dataclass(wanted):
            leaves += describe(wanted, f"{key}.")
        else:
            comment, secret = comments.get(item.name, ""), bool(item.metadata.get("secret"))
            leaves.append(Leaf(key, _type_name(_without_none(wanted)), item.default, comment, secret))
    return tuple(leaves)


def defaults_of(schema: type) -> dict[str, object]:
    """Every leaf key and its default, in YAML's types."""
    found = {leaf.key: leaf.default for leaf in describe(schema)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def secret_keys(schema: type) -> frozenset[str]:
    return frozenset(leaf.key for leaf in describe(schema) if leaf.secret)


def holds_secret(schema: type, key: str) -> bool:
    """Whether a key is a secret, or a section that contains one."""
    return any(secret == key or secret.startswith(f"{key}.") for secret in secret_keys(schema))


def _comments(schema: type) -> dict[str, str]:
    """The comment of each field in the source: the one on its line, or the string below it."""
    found: dict[str, str] = {}
    source = inspect.getsource(schema)
    for match in re.finditer(r'^    (\w+): [^#\n]*?(?:  # (.*))?\n(?:    """([^"]*)""")?', source, re.MULTILINE):
        found[match[1]] = match[2] or " ".join((match[3] or "").split())
    return found


def flatten(run: object) -> dict[str, object]:
    """Dotted keys and values of a dataclass tree."""
    return flatten_dict(dataclasses.asdict(run))


def flatten_dict(values: dict, prefix: str = "") -> dict[str, object]:
    """Dotted keys and values of nested dicts."""
    flat = {}
    for key, value in values.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nested(flat: dict[str, object]) -> dict:
    """Nested dicts of dotted keys and values; the inverse of `flatten_dict`."""
    found: dict = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        section = found
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return found


def show(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(show, value))}]"
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def split_words(words: Sequence[str], keys: Sequence[str] = (), secrets: Collection[str] = ()) -> list[tuple[str, str]]:
    """The `key=value` words of a command line as pairs, in their order. `~/` at the start of a path is replaced by the
    home folder, since shells do not do this in every word. A path loses the `/` at its end, which shells add to names
    that they complete: a run's name and what is compared with its folder would differ.

    Args:
        keys: the keys of a command without a config.
        secrets: keys whose values are hidden in errors.

    Raises:
        UserError: a word without "=", or, if keys are given, an unknown key (naming the nearest) or an empty value.
    """
    pairs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or (keys and key not in keys):
            near = difflib.get_close_matches(key.lstrip("-"), keys, 1)
            known = f"it takes {', '.join(keys)}" if keys else "expected key=value, for example config=grpo"
            hint = f"did you mean {near[0]}=...?" if near else f"{known} (see --help)"
            raise UserError(f"cannot read {without_secrets(word, secrets)!r}; {hint}")
        if keys and not value:
            raise UserError(f"{key}= is empty; give it a value or leave it out, see --help")
        value = re.sub(r"(?:(?<=,)|^)~(?=/)", lambda _: os.path.expanduser("~"), value)
        pairs.append((key, value if "://" in value else re.sub(r"(?<=[^,/])/+(?=,|$)", "", value)))
    return pairs


def whole_number(key: str, value: str, least: int = 0) -> int:
    """The value of a word as an integer of at least `least` (0 or 1).

    Raises:
        UserError: the value is no such number.
    """
    if not re.fullmatch("[0-9]{1,18}", value) or int(value) < least:
        above = " above 0" if least else ""
        raise UserError(f"{key}={value[:40]} must be a whole number{above}, such as {key}=60")
    return int(value)


def without_secrets(word: str, secrets: Collection[str]) -> str:
    """A word of the command line with everything hidden that may be a secret."""
    for key in secrets:
        before, name, after = word.partition(key)
        word = before + name + (HIDDEN if after else "")
    return word
