"""Sampled ids to what clients see: words, thoughts, and calls of the client's functions, piece by piece.

Ids are read one by one, so the result does not depend on the pieces in which they arrive: a streamed answer equals the
whole one. Text is held back while it may be a part of a character, of a mark or of a stop string.
"""

import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from retool_jax.tokens.grammar import Grammar, ToolCall, read_call
from retool_jax.tokens.tokenizer import Tokenizer

# A call as the template writes it, up to its arguments, which are then streamed as they are sampled. Calls in another
# spelling are read when they have ended.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_HEAD_CHARACTERS = 500  # the longest head
_CHARACTER_IDS = 8  # the most ids of a character; more ids without a character are not UTF-8

Channel = Literal["content", "reasoning"]


class Characters:
    """The text of ids that come one by one; ids of an incomplete character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def take(self, index: int) -> str:
        self._ids.append(index)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < _CHARACTER_IDS:
            return ""
        self._ids = []
        return text

    def rest(self) -> str:
        """The text of the waiting ids, at the end of a turn."""
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids)

    @property
    def waits(self) -> bool:
        return bool(self._ids)


@dataclass(frozen=True)
class TextPiece:
    """Words of the policy."""

    channel: Channel
    text: str

    def joined_to(self, other: "TextPiece | CallPiece") -> "TextPiece | None":
        """Both as one, `other` first, if they are words of one channel."""
        same = isinstance(other, TextPiece) and other.channel == self.channel
        return TextPiece(self.channel, other.text + self.text) if same else None


@dataclass
class FunctionCall:
    """A call of one of the client's functions; `arguments` grows while it is sampled."""

    index: int
    id: str
    name: str
    arguments: str = ""
    ended: bool = False


@dataclass(frozen=True)
class CallPiece:
    """A call has begun, has grown by a piece of its arguments, or has ended."""

    call: FunctionCall
    what: Literal["begins", "grows", "ends"]
    piece: str = ""

    def joined_to(self, other: "TextPiece | CallPiece") -> "CallPiece | None":
        """Both as one, `other` first, if the same call grows in both."""
        same = isinstance(other, CallPiece) and self.what == other.what == "grows" and other.call is self.call
        return CallPiece(self.call, "grows", other.piece + self.piece) if same else None


class Reader:
    """Reads the turns of one answer.

    Args:
        grammar: the grammar of calls, which are not shown as words; None if the policy has nothing to call.
        functions: names of the client's functions.
        stops: stop strings of the request; neither they nor the text after them is shown.

    Attributes:
        calls: calls of the client's functions in all turns.
        stopped: whether a stop string has come.
        thought: number of ids that were sampled while the policy was thinking.
        inside: the text so far of the call that is being read; None outside of calls.
    """

    def __init__(
        self, tokenizer: Tokenizer, grammar: Grammar | None, functions: Collection[str] = (), stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._functions, self._stops = tokenizer, functions, stops
        tag = ("code" if grammar.stop else "tool_call") if grammar else ""
        self._open, self._close = f"<{tag}>", f"</{tag}>"
        self._has_calls = grammar is not None
        self.calls: list[FunctionCall] = []
        self.stopped = False
        self.thought = 0
        self.inside: str | None = None
        self._call: FunctionCall | None = None
        self._held: dict[Channel, str] = {"content": "", "reasoning": ""}  # newlines that are shown if text follows
        self._begun: set[Channel] = set()
        self._thinking = False
        self.begin_turn(new=True)

    def begin_turn(self, new: bool) -> None:
        """Begin a new turn, or go on with the same one after an answer inside of it, where a thought goes on."""
        self._characters = Characters(self._tokenizer)
        self._buffer = ""
        self.inside = self._call = None
        if new:
            self._thinking = self._tokenizer.turn_header.rstrip("\n").endswith("<think>")

    def feed(self, ids: Sequence[int]) -> list[TextPiece | CallPiece]:
        """The pieces that become visible with these ids."""
        events: list[TextPiece | CallPiece] = []
        for index in ids:
            self.thought += self._thinking
            if index in self._tokenizer.stop_ids:
                continue
            events += self._take(self._characters.take(index))
        return events

    def skim(self, ids: Sequence[int]) -> list[TextPiece | CallPiece] | None:
        """A fast `feed` for ids whose whole text is visible at once; None, with nothing read, if it may not be.

        There must be no stop id among them.
        """
        if self._characters.waits or self._buffer or self._stops:
            return None
        text = self._tokenizer.decode(ids)
        if "<" in text or "\ufffd" in text or text.endswith("\n"):  # may be part of a mark or character, or held back
            return None
        self.thought += len(ids) * self._thinking
        return self._show(text)

    def end_turn(self) -> list[TextPiece | CallPiece]:
        """The text that was held back; at the end of a turn it cannot become a mark or a stop string."""
        text, self._buffer = self._buffer + self._characters.rest(), ""
        return [] if self.stopped else self._show(text)

    def hand_over(self, name: str, arguments: dict) -> list[CallPiece]:
        """The events of a call that is known as a whole."""
        call = self._begin(name)
        call.arguments, call.ended = json.dumps(arguments), True
        return [CallPiece(call, "begins"), CallPiece(call, "grows", call.arguments), CallPiece(call, "ends")]

    # --- marks ---

    def _marks(self) -> tuple[str, ...]:
        if self.inside is not None:
            return (self._close, self._open)
        if self._thinking:
            return ("</think>",)
        return ("<think>", self._open) if self._has_calls else ("<think>",)

    def _take(self, text: str) -> list[TextPiece | CallPiece]:
        events: list[TextPiece | CallPiece] = []
        self._buffer += text
        while not self.stopped:
            strings = (*self._stops, *self._marks())
            found = [(self._buffer.find(each), each) for each in strings if each in self._buffer]
            if not found:
                held = max(_overlap(self._buffer, each) for each in strings)
                at = len(self._buffer) - held
                return events + self._show(self._cut(at))
            at, mark = min(found, key=lambda each: each[0])
            events += self._show(self._cut(at))
            self._cut(len(mark))
            if mark in self._stops:
                self.stopped = True
            elif mark in ("<think>", "</think>"):
                self._thinking = mark == "<think>"
            else:
                events += self._end_call() if self.inside is not None else []
                self.inside = "" if mark == self._open else None
        self._buffer = ""
        return events

    def _cut(self, count: int) -> str:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        return text

    def _show(self, text: str) -> list[TextPiece | CallPiece]:
        if not text:
            return []
        if self.inside is not None:
            return self._grow(text)
        channel: Channel = "reasoning" if self._thinking else "content"
        text = self._held[channel] + text
        words = text.rstrip("\n")
        self._held[channel] = text[len(words) :]
        if channel not in self._begun:
            words = words.lstrip("\n")
        if not words:
            if channel not in self._begun:
                self._held[channel] = ""
            return []
        self._begun.add(channel)
        return [TextPiece(channel, words)]

    # --- calls of the client's functions ---

    def _begin(self, name: str) -> FunctionCall:
        self.calls.append(FunctionCall(len(self.calls), f"call_{uuid.uuid4().hex[:24]}", name))
        return self.calls[-1]

    def _grow(self, text: str) -> list[CallPiece]:
        self.inside += text
        if self._call is not None:
            return self._arguments(text)
        head = _HEAD.match(self.inside) if len(self.inside) <= _HEAD_CHARACTERS + len(text) else None
        if head is None or head[1] not in self._functions:
            return []
        self._call, self._depth, self._quoted, self._escaped = self._begin(head[1]), 0, False, False
        return [CallPiece(self._call, "begins"), *self._arguments(self.inside[head.end() :])]

    def _arguments(self, text: str) -> list[CallPiece]:
        """Show the text of an object up to the brace that closes it."""
        call, count = self._call, 0
        for character in text:
            if call.ended:
                break
            count += 1
            if self._quoted:
                self._quoted = character != '"' or self._escaped
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                call.ended = not self._depth
        call.arguments += text[:count]
        grown = [CallPiece(call, "grows", text[:count])] if count else []
        return grown + ([CallPiece(call, "ends")] if call.ended and count else [])

    def _end_call(self) -> list[CallPiece]:
        if self._call is not None:
            call, self._call = self._call, None
            ended, call.ended = call.ended, True
            return [] if ended else [CallPiece(call, "ends")]
        call = read_call(self.inside) if self._functions else None
        return self.hand_over(call.name, call.arguments) if call and self.is_for_client(call) else []

    def is_for_client(self, call: ToolCall) -> bool:
        """Whether a call is of one of the client's functions and could be read."""
        named = not call.error and isinstance(call.name, str) and call.name in self._functions
        return named and isinstance(call.arguments, dict)


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text may be the beginning of an incomplete string."""
    if string[0] not in text:
        return 0
    most = min(len(text), len(string) - 1)
    return next((count for count in range(most, 0, -1) if string.startswith(text[len(text) - count :])), 0)
