"""Command lines of `key=value` words, described by a dataclass: its fields are the keys, with defaults and help."""

import dataclasses
import difflib
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

from retool_jax.errors import UserError
from retool_jax.sandbox.types import KINDS, shown

Options = TypeVar("Options")
COLUMN = 26  # where the help of a key begins


def option(default: Any, text: str) -> Any:
    """A field of such a dataclass (str, int or float), with its text for `--help`."""
    return dataclasses.field(default=default, metadata={"help": text})


def read_words(words: Sequence[str], kind: type[Options]) -> Options:
    """The options of a command line; the last word for a key wins.

    Raises:
        UserError: an unknown key (with the nearest known one), a word without "=", or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for text in words:
        key, equals, value = text.partition("=")
        if key not in known or not equals:
            near = difflib.get_close_matches(key.strip("-").replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]}=...?" if near else f"it takes {', '.join(known)} (see --help)"
            raise UserError(f"cannot read {text!r}; {hint}")
        try:
            values[key] = known[key].type(value)
        except ValueError:
            raise UserError(f"{key} is {shown(value)}; it must be {KINDS[known[key].type]}") from None
    return kind(**values)


def help_text(usage: str, about: str, kind: type) -> str:
    """The text of `--help`: usage, purpose, and the keys with their defaults."""
    lines = []
    for f in dataclasses.fields(kind):
        left, room = f"    {f.name}={f.default} ", " " * COLUMN
        if len(left) > COLUMN:  # the help then begins on the next line
            lines.append(left.rstrip())
            left = ""
        lines.append(textwrap.fill(f"{left:<{COLUMN}}{f.metadata['help']}", 110, subsequent_indent=room))
    return "\n".join([f"usage: {usage} [key=value ...]", "", about, "", "keys and their defaults:", *lines])
