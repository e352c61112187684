"""Turns and tool outputs of both grammars for human readers, without their marks."""

import re
from dataclasses import dataclass

from retool_jax.tokens.grammar import CODE_TOOL, Marked, marked, read_call, read_code
from retool_jax.tokens.tokenizer import FAMILIES

_FRAMES = re.compile(
    "|".join([r"<\|im_start\|>(?:assistant\n?)?", *(re.escape(mark) for family in FAMILIES for mark in family.stops)])
)
# The marks before and after an output; all outputs of a segment have the same kind.
_OUTPUTS = (
    *((family.output_open, family.output_close) for family in FAMILIES),
    ("<interpreter>\n", "\n</interpreter>"),
)


@dataclass(frozen=True)
class TurnPart:
    """A piece of a policy's turn. `kind` is `said` (text) or `call`; `fault` says why a call cannot be read."""

    kind: str
    text: str
    fault: str = ""


def show_turn(text: str) -> list[TurnPart]:
    """The pieces of a decoded turn of either grammar: text, and each call as a program or as name and arguments.

    A mark without its partner is text. Marks of turns and blank text are left out.
    """
    pieces, last = [], 0
    for part in marked(text, "tool_call", "code"):
        if not part.fault:
            pieces += [_show_words(text[last : part.start]), _show_call(part)]
            last = part.stop
    return [piece for piece in (*pieces, _show_words(text[last:])) if piece.kind == "call" or piece.text.strip()]


def _show_words(text: str) -> TurnPart:
    return TurnPart("said", _FRAMES.sub("", text).strip("\n"))


def _show_call(part: Marked) -> TurnPart:
    inside = part.inside.strip()
    call = read_code(inside) if part.tag == "code" else read_call(inside)
    if call.error or not isinstance(call.name, str) or not isinstance(call.arguments, dict):
        return TurnPart("call", inside, call.error or "not a well-formed call")
    return TurnPart("call", call.code if call.name == CODE_TOOL else f"{call.name} {call.code}")


def show_outputs(text: str) -> list[str]:
    """The outputs in the decoded segment that answers a turn; the whole segment if it holds none.

    An output ends at the last closing mark before the next output begins, so a mark inside an output cuts nothing off.
    """
    for opening, closing in _OUTPUTS:
        _, *pieces = text.split(opening)
        if found := [piece.rpartition(closing)[0] for piece in pieces if closing in piece]:
            return found
    return [_FRAMES.sub("", text)]
