"""Shapes of what files hold: which value stands where, checked once where a file is read.

A shape is one of

    NUMBER, TEXT, ...      a `Kind` of single values; True is no number
    OrNull(shape)          null, or that
    frozenset({"a", "b"})  one of these texts
    [shape]                a list of such
    {"name": shape}        an object; a field "name?" may be absent, "name*" are all that begin so, `...` says what
                           every other field holds, and without it other fields are not looked at

A list of numbers is checked at the speed of C, since a file has one for each token.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import NamedTuple

from retool_jax.errors import UserError
from retool_jax.files import read_lines

LARGEST = 1 << 63  # of whole numbers, which arrays and tables hold in 64 bits


class Kind(NamedTuple):
    """Single values: what they are called, the types that they may have, and whether a number must be finite."""

    name: str
    types: frozenset[type]
    finite: bool = False


class OrNull(NamedTuple):
    """A shape in the place of which null may stand."""

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
    """What is wrong first with a value: its field, what stands there and what should. Nothing: an empty text."""
    match shape:
        case Kind():
            kind = type(value)
            if kind in shape.types and (kind is str or kind is bool or value is None):
                return ""  # most fields
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
    """Whether each value of a list has one of the types and no whole number is too large."""
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
    """A value as JSON has it, on one short line; of a list or an object what it is."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and not -LARGEST <= value < LARGEST:
        return "a number of more than 64 bits"
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def missing(record: object, needed: Collection[str]) -> str:
    """Which fields a record lacks, in words, or that it is no object; nothing: an empty text."""
    if not isinstance(record, dict):
        return complaint(record, {})
    lacking = [name for name in needed if name not in record]
    return f"it has no {', '.join(lacking)}" if lacking else ""


def read_records(path: Path, what: str, fault_of: Callable[[object], str]) -> Iterator[tuple[int, dict]]:
    """The records of a JSONL file, by the numbers of their lines. A last line that a kill tore is left out.

    Args:
        path: the file.
        what: a record is called.
        fault_of: what is wrong with what a line holds; nothing: an empty text.

    Raises:
        UserError: a line is no such record; it names file, line and field.
    """
    for number, record in read_lines(path):
        if fault := fault_of(record):
            raise UserError(f"{path} line {number} is no {what} ({fault}); mend or remove that line")
        yield number, record
