r"""Which value of an answer stands for which of the truth's: names, equations and lists, as text.

`x = 5` says 5, `a = 1, b = 2` binds two values to their names, `x = 1 or x = -2` gives several of one unknown, and
`2x - y + 3 = 0` is an equation that gives no value.
"""

import re
from dataclasses import dataclass

from retool_jax.answers.normalise import NAME, normalise

_OPEN, _CLOSE = "([{", ")]}"
_NO_EQUATION = re.compile(r"[<>!:]|\\(?:not|ne|neq|le|leq|ge|geq|approx|equiv|pmod|bmod)(?![a-zA-Z])")
# What is no value between two equals signs: words, arrows, bars and rows.
_SAYS_MORE = re.compile(
    r"(?<![a-zA-Z\\])(?:[a-zA-Z]{4,}|if|or|ou|et|and|but|so|then|not)(?![a-zA-Z(])|^[^|]*\|[^|]*$|&|\\\\|\.\s|\s[a-z]\s+[a-z]$"
    r"|\\(?:[a-zA-Z]*arrow|implies|iff|to|mapsto|n?[mv]id|vert|lor|vee|land|wedge|text|quad|because|therefore)(?![a-zA-Z])"
)
_NEXT = re.compile(rf"(=[^=]*?[0-9)}}\]])\s+(?={NAME}\s*=)")  # p=3 q=5
# Before a part with an equals sign, so that the comma of x = 1,000 and of x = 1, 2 belongs to the value.
_BETWEEN = r"[,;](?=(?:[^,;()]|\([^()]*\))*(?:=|\\in(?![a-zA-Z])))"
_APPLIED = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)\([^()]*\)")


def split(text: str, separator: str) -> list[str]:
    """The parts of a text between separators (a pattern) that stand outside of all brackets, without outer spaces."""
    parts, depth, begin = [], 0, 0
    for mark in re.finditer(rf"\\\\|(?P<bracket>[()\[\]{{}}])|(?P<separator>{separator})", text):
        if bracket := mark["bracket"]:
            depth = max(0, depth + (1 if bracket in _OPEN else -1))
        elif mark["separator"] and depth == 0:
            parts.append(text[begin : mark.start()])
            begin = mark.end()
    return [part.strip() for part in [*parts, text[begin:]]]


def brackets_of(text: str) -> str:
    r"""The two brackets that a whole text stands in, as `(]`; nothing when it does not. A set's are `{}` for `\{\}`."""
    plain = text.strip().replace(r"\{", "{").replace(r"\}", "}")
    if len(plain) < 2 or plain[0] not in _OPEN or plain[-1] not in _CLOSE:
        return ""
    depth = 0
    for place, character in enumerate(plain):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and place < len(plain) - 1:
            return ""
    return plain[0] + plain[-1]


@dataclass(frozen=True)
class Statement:
    """One value, and what stands to the left of its equals sign, or nothing."""

    name: str
    value: str


def align(answer: str, truth: str) -> tuple[str, str]:
    """Answer and truth, without names where these say the same, and with values of the same name in the same place.

    Where the names say different things both come back with them, to be compared as equations.
    """
    said, asked = statements(answer), statements(truth)
    names, wanted = {s.name for s in said}, {s.name for s in asked}
    several, many = len(said) > 1 and len(names) == len(said), len(asked) > 1 and len(wanted) == len(asked)
    if several and many and names == wanted:
        return _tuple(sorted(said, key=lambda s: s.name)), _tuple(sorted(asked, key=lambda s: s.name))
    if several and wanted == {""} and "" not in names:
        return _tuple(said), truth if brackets_of(truth) else f"({truth})"
    if many and names == {""} and "" not in wanted:
        return answer if brackets_of(answer) else f"({answer})", _tuple(asked)
    if len(names) == len(wanted) == 1 and _same_unknown(*names, *wanted, answer + truth):
        return ", ".join(s.value for s in said), ", ".join(s.value for s in asked)
    return answer, truth


def statements(text: str) -> list[Statement]:
    """What a normalised text says, part by part. A part without a name is of the one before: `x = 1, 2`."""
    if _NO_EQUATION.search(text):
        return [Statement("", text)]
    found: list[Statement] = []
    for part in split(_NEXT.sub(r"\1, ", text), _BETWEEN):
        sides = split(part, r"=|\\in(?![a-zA-Z])")
        if len({side for side in sides[1:] if re.fullmatch("-?[0-9]+", side)}) > 1:  # x = 5 = 6
            return [Statement("", text)]
        again = rf"(?<![a-zA-Z\\]){re.escape(sides[0])}(?![a-zA-Z(])" if sides[0] else "(?!)"
        if any(_SAYS_MORE.search(side) or re.search(again, side) for side in sides[1:-1]):  # x = 3 \implies y = 5
            return [Statement("", text)]
        name, value = ("" if len(sides) == 1 else re.sub(r"\s", "", sides[0])), sides[-1]
        names, values = (split(side[1:-1], ",") if brackets_of(side) else [] for side in (name, value))
        if len(names) == len(values) > 1:  # (a, b) = (1, 2)
            found += map(Statement, names, map(normalise, values))
        else:
            found.append(Statement(name, normalise(value)))
    return found


def _same_unknown(name: str, wanted: str, text: str) -> bool:
    """Whether two left sides stand for the same unknown. A single unknown need not be named."""
    if name == wanted:
        return True
    if not wanted:  # m + n = 45; but x + 2 = 5 is an equation
        return not re.search(r"[0-9]", re.sub(r"\([^()]*\)|_\{[^{}]*\}|_\w", "", name))
    if not name:
        return bool(re.fullmatch(NAME, wanted))
    # f(x) = 2x is y = 2x, when y is no more than a name
    return any(
        _APPLIED.fullmatch(one) and re.fullmatch("[a-zA-Z]", other) and text.count(other) == 1
        for one, other in ((name, wanted), (wanted, name))
    )


def _tuple(parts: list[Statement]) -> str:
    values = (rf"\{{{s.value}\}}" if len(split(s.value, "[,;]")) > 1 else s.value for s in parts)
    return f"({', '.join(values)})"
