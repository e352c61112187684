"""Shapes of the records in files, and checks of records against them when a file is read.

A shape is one of

    NUMBER, TEXT, ...      a `Kind` of single values; True is no number
    OrNull(shape)          null or a value of that shape
    frozenset({"a", "b"})  one of these texts
    [shape]                a list of values of that shape
    {"name": shape}        an object; a field "name?" may be absent, "name*" stands for all fields that begin with name,
                           and `...` for all other fields, which are not checked without it

A list of numbers is checked at the speed of C, since files have lists with a number for each token.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from retool_jax.errors import UserError
from retool_jax.files import read_lines

LARGEST = 1 << 63  # bound of whole numbers: arrays and tables hold them in 64 bits


class Kind(NamedTuple):
    """A kind of single values: its name in messages, the allowed types, and whether a number must be finite."""

    name: str
    types: frozenset[type]
    finite: bool = False


class OrNull(NamedTuple):
    """Null, or a value of a shape."""

    shape: "Shape"


Shape = Kind | OrNull | frozenset | list | dict

NUMBER = Kind("a number", frozenset({int, float}))
FINITE = Kind("a finite number", NUMBER.types, True)
WHOLE = Kind("a whole number", frozenset({int}))
FLAG = Kind("true or false", frozenset({bool}))
BIT = Kind("0 or 1", frozenset({int, bool}))
TEXT = Kind("a text", frozenset({str}))
SINGLE = Kind("a single value", frozenset({int, float, bool, str, NoneType}))


def complaint(value: object, shape: Shape, name: str = "it") -> str:
    """The first error of a value: its field, what it is and what it must be; an empty text if there is none."""
    match shape:
        case Kind():
            kind = type(value)
            if kind in shape.types and (kind is str or kind is bool or value is None):
                return ""  # the most frequent case first
            wrong = kind not in shape.types or (shape.finite and not math.isfinite(value))
            if wrong or (kind is int and not -LARGEST <= value < LARGEST):
                return f"{name} is {_shown(value)} and must be {shape.name}{'' if wrong else ' of at most 64 bits'}"
        case OrNull():
            found = "" if value is None else complaint(value, shape.shape, name)
            return found.replace(" must be ", " must be null or ", 1) if found.startswith(f"{name} is ") else found
        case frozenset():
            if not isinstance(value, str) or value not in shape:
                return f"{name} is {_shown(value)} and must be one of: {', '.join(sorted(shape))}"
        case list():
            if not isinstance(value, list):
                return f"{name} is {_shown(value)} and must be a list"
            if not isinstance(shape[0], Kind) or not _all_are(value, shape[0]):
                return next(filter(None, (complaint(x, shape[0], f"{name}[{i}]") for i, x in enumerate(value))), "")
        case dict():
            return _complaint_of_object(value, shape, name)
    return ""


def _all_are(values: list, kind: Kind) -> bool:
    """Whether a quick check shows that all values of a list are of a kind; False if it cannot tell."""
    found = set(map(type, values))
    if not found <= kind.types or kind.finite:
        return False
    return int not in found or -LARGEST <= min(values) <= max(values) < LARGEST


def _complaint_of_object(value: object, shape: dict, name: str) -> str:
    if not isinstance(value, dict):
        return f"{name} is {_shown(value)} and must be an object"
    above = "" if name == "it" else f"{name}."
    for field, inner in shape.items():
        if field is ... or field.endswith("*"):
            start = "" if field is ... else field[:-1]
            fields = (key for key in value if key.startswith(start) and key not in shape and f"{key}?" not in shape)
            found = next(filter(None, (complaint(value[key], inner, f"{above}{key}") for key in fields)), "")
        elif (plain := field.removesuffix("?")) in value:
            found = complaint(value[plain], inner, f"{above}{plain}")
        else:
            found = f"{name} has no {plain}" if plain == field else ""
        if found:
            return found
    return ""


def _shown(value: object) -> str:
    """A value as JSON on one short line; a list or an object only by its type."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and not -LARGEST <= value < LARGEST:
        return "a number of more than 64 bits"
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """A JSON value with `change` of each text, number, boolean and null in it, and of each key."""
    if isinstance(value, dict):
        return {change(key): map_leaves(change, item) for key, item in value.items()}
    return [map_leaves(change, item) for item in value] if isinstance(value, list | tuple) else change(value)


def missing(record: object, needed: Collection[str]) -> str:
    """Which fields a record lacks, or that it is no object; an empty text if nothing is wrong."""
    if not isinstance(record, dict):
        return complaint(record, {})
    lacking = [name for name in needed if name not in record]
    return f"it has no {', '.join(lacking)}" if lacking else ""


def read_records(path: Path, what: str, fault_of: Callable[[object], str]) -> Iterator[tuple[int, dict]]:
    """(line number, record) of a JSONL file. An incomplete last line, left by a kill, is skipped.

    Args:
        path: the file.
        what: the name of a record in the error.
        fault_of: gives the error of a line's value, or an empty text.

    Raises:
        UserError: a line is no such record; names file, line and field.
    """
    for number, record in read_lines(path):
        if fault := fault_of(record):
            raise UserError(f"{path} line {number} is no {what} ({fault}); mend or remove that line")
        yield number, record
