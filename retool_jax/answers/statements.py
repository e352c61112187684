r"""Match the values of an answer with those of the truth, on texts with names, equations and lists.

`x = 5` has the value 5, `a = 1, b = 2` has two named values, `x = 1 or x = -2` has two values of one unknown, and
`2x - y + 3 = 0` is an equation without a value.
"""

import re
from dataclasses import dataclass

from retool_jax.answers.normalise import NAME, normalise

_OPEN, _CLOSE = "([{", ")]}"
_NO_EQUATION = re.compile(r"[<>!:]|\\(?:not|ne|neq|le|leq|ge|geq|approx|equiv|pmod|bmod)(?![a-zA-Z])")
# Text between two equals signs that is not a value: words, arrows, bars and rows.
_NOT_A_VALUE = re.compile(
    r"(?<![a-zA-Z\\])(?:[a-zA-Z]{4,}|if|or|ou|et|and|but|so|then|not)(?![a-zA-Z(])|^[^|]*\|[^|]*$|&|\\\\|\.\s|\s[a-z]\s+[a-z]$"
    r"|\\(?:[a-zA-Z]*arrow|implies|iff|to|mapsto|n?[mv]id|vert|lor|vee|land|wedge|text|quad|because|therefore)(?![a-zA-Z])"
)
_NEXT = re.compile(rf"(=[^=]*?[0-9)}}\]])\s+(?={NAME}\s*=)")  # p=3 q=5
# Before a part with an equals sign, so that the comma of x = 1,000 and of x = 1, 2 belongs to the value.
_BETWEEN = r"[,;](?=(?:[^,;()]|\([^()]*\))*(?:=|\\in(?![a-zA-Z])))"
_APPLIED = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)\([^()]*\)")


def split(text: str, separator: str) -> list[str]:
    """The stripped parts of a text between separators (a pattern). Separators inside brackets do not count."""
    parts, depth, begin = [], 0, 0
    for mark in re.finditer(rf"\\\\|(?P<bracket>[()\[\]{{}}])|(?P<separator>{separator})", text):
        if bracket := mark["bracket"]:
            depth = max(0, depth + (1 if bracket in _OPEN else -1))
        elif mark["separator"] and depth == 0:
            parts.append(text[begin : mark.start()])
            begin = mark.end()
    return [part.strip() for part in [*parts, text[begin:]]]


def brackets_of(text: str) -> str:
    r"""The two brackets around a whole text, such as `(]`; empty if there are none. For `\{\}` it is `{}`."""
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
    """One value, and the text to the left of its equals sign; empty if there is none."""

    name: str
    value: str


def align(answer: str, truth: str) -> tuple[str, str]:
    """Answer and truth without names if the names agree, with values of the same name in the same place.

    If the names do not agree, both keep them, to be compared as equations.
    """
    ours, theirs = statements(answer), statements(truth)
    our_names, their_names = {s.name for s in ours}, {s.name for s in theirs}
    ours_all_named_differently = len(our_names) == len(ours) > 1
    theirs_all_named_differently = len(their_names) == len(theirs) > 1
    if ours_all_named_differently and theirs_all_named_differently and our_names == their_names:
        return _tuple(sorted(ours, key=lambda s: s.name)), _tuple(sorted(theirs, key=lambda s: s.name))
    if ours_all_named_differently and their_names == {""} and "" not in our_names:
        return _tuple(ours), truth if brackets_of(truth) else f"({truth})"
    if theirs_all_named_differently and our_names == {""} and "" not in their_names:
        return answer if brackets_of(answer) else f"({answer})", _tuple(theirs)
    if len(our_names) == len(their_names) == 1 and _same_unknown(*our_names, *their_names, answer + truth):
        return ", ".join(s.value for s in ours), ", ".join(s.value for s in theirs)
    return answer, truth


def statements(text: str) -> list[Statement]:
    """The statements of a normalised text. In `x = 1, 2` both values belong to the name x."""
    if _NO_EQUATION.search(text):
        return [Statement("", text)]
    found: list[Statement] = []
    for part in split(_NEXT.sub(r"\1, ", text), _BETWEEN):
        sides = split(part, r"=|\\in(?![a-zA-Z])")
        if len({side for side in sides[1:] if re.fullmatch("-?[0-9]+", side)}) > 1:  # x = 5 = 6
            return [Statement("", text)]
        same_name = rf"(?<![a-zA-Z\\]){re.escape(sides[0])}(?![a-zA-Z(])" if sides[0] else "(?!)"
        if any(_NOT_A_VALUE.search(side) or re.search(same_name, side) for side in sides[1:-1]):  # x = 3 \implies y = 5
            return [Statement("", text)]
        name, value = ("" if len(sides) == 1 else re.sub(r"\s", "", sides[0])), sides[-1]
        names, values = (split(side[1:-1], ",") if brackets_of(side) else [] for side in (name, value))
        if len(names) == len(values) > 1:  # (a, b) = (1, 2)
            found += map(Statement, names, map(normalise, values))
        else:
            found.append(Statement(name, normalise(value)))
    return found


def _same_unknown(name: str, true_name: str, text: str) -> bool:
    """Whether the left sides of answer and truth mean the same unknown. A single unknown may be unnamed."""
    if name == true_name:
        return True
    if not true_name:  # m + n = 45 has a value, but x + 2 = 5 is an equation
        return not re.search(r"[0-9]", re.sub(r"\([^()]*\)|_\{[^{}]*\}|_\w", "", name))
    if not name:
        return bool(re.fullmatch(NAME, true_name))
    # f(x) = 2x is the same as y = 2x if y appears nowhere else
    return any(
        _APPLIED.fullmatch(one) and re.fullmatch("[a-zA-Z]", other) and text.count(other) == 1
        for one, other in ((name, true_name), (true_name, name))
    )


def _tuple(parts: list[Statement]) -> str:
    values = (rf"\{{{s.value}\}}" if len(split(s.value, "[,;]")) > 1 else s.value for s in parts)
    return f"({', '.join(values)})"
