"""Read the trajectories of a run folder: find the files, select lines, and turn a line into messages and calls.

Ids are never decoded here: every text comes from the record. Texts are made encodable in UTF-8 (`encodable`), and
numbers that are not finite become null, so that every format can hold all values.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retool_jax.errors import UserError
from retool_jax.evaluation.config import SAMPLES
from retool_jax.rollout.records import TOKENS, fault_of, last_lines
from retool_jax.sandbox.text import encodable
from retool_jax.shapes import map_leaves
from retool_jax.shapes import read_records as read_shaped
from retool_jax.tokens.grammar import CODE_TOOL
from retool_jax.tokens.shown import show_outputs, show_turn

GREEDY = "-greedy"  # the end of the names of files with greedy trajectories
NEEDED = ("id", "ids", "sampled", "logprobs", "segments", "tool_calls")
_CHAT = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(<\|im_end\|>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Selection:
    """Which trajectories to take; a field that is None does not restrict them."""

    split: str | None = None
    step: int | None = None
    greedy: bool | None = None

    def takes(self, record: dict, source: str) -> bool:
        pairs = (
            (self.split, record.get("split")),
            (self.step, record.get("step")),
            (self.greedy, source.endswith(GREEDY)),
        )
        return all(wanted in (None, found) for wanted, found in pairs)


@dataclass(frozen=True)
class Record:
    """One line of a file. `source` is the file's name without the suffix; it contains split and step."""

    source: str
    values: dict

    @property
    def name(self) -> str:
        """A name that is unique in a run, unlike the id, which is the same in every evaluation of a problem."""
        return f"{self.source}/{self.values['id']}"


def files_of(folder: Path) -> list[Path]:
    """The files with trajectories in the folder of a run or an evaluation.

    Raises:
        UserError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give that of a run or of an evaluation as run=DIR")
    samples = folder / SAMPLES
    found = sorted((folder / "trajectories").glob("*.jsonl")) + ([samples] if samples.is_file() else [])
    if not found:
        raise UserError(
            f"{folder} holds no trajectories: neither trajectories/*.jsonl of a run nor {SAMPLES} of an"
            " evaluation; a run writes some at each evaluation (evaluation.every)"
        )
    return found


def read_records(folder: Path, selection: Selection) -> Iterator[Record]:
    """The selected trajectories of a folder, one by one. An incomplete last line is left out.

    An evaluation draws a sample again if the machinery lost it, so only the last line of each sample counts.

    Raises:
        UserError: a line is not a trajectory, or none is selected; then the message lists what there is.
    """
    found, available = 0, set()
    for path in files_of(folder):
        kept = last_lines(path) if path.name == SAMPLES else None
        for number, values in _lines(path):
            if kept is not None and number not in kept:
                continue
            available.add(f"split={values.get('split')} step={values.get('step')}")
            if selection.takes(values, path.stem):
                found += 1
                yield Record(path.stem, values)
    if not found:
        listed = "; ".join(sorted(available)[:20]) or "no line in any file"
        raise UserError(f"no trajectory of {folder} is of split, step and greedy as asked; there are: {listed}")


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The number and the cleaned values of each line of a file."""
    for number, values in read_shaped(path, "trajectory", lambda record: fault_of(record, NEEDED)):
        yield number, {key: value if key in TOKENS else map_leaves(_clean, value) for key, value in values.items()}


def _clean(leaf: object) -> object:
    """A text as UTF-8 can encode it, and None for numbers that JSON does not have."""
    if isinstance(leaf, str):
        return encodable(leaf)
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


# --- a record as messages ---------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call that was made. `output` is the answer that the policy read; None if it never did."""

    id: str
    name: str
    arguments: dict
    use: dict  # the record's entry in `tool_calls`
    output: str | None = None


@dataclass
class Message:
    """A message of `role`: system, user or assistant.

    An assistant's `text` is without closed thoughts and without calls. The ids from `start` to `stop` belong to it.
    """

    role: str
    text: str
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    start: int = 0
    stop: int = 0


def messages_of(record: dict) -> list[Message]:
    """A trajectory as a conversation. Each call has its output."""
    found: list[Message] = []
    segments = record["segments"]
    last_tool = [index for index, segment in enumerate(segments) if segment["role"] == "tool"][-1:]
    turn = 0
    for index, segment in enumerate(segments):
        if segment["role"] == "policy":
            uses = [use for use in record["tool_calls"] if use["turn"] == turn]
            found.append(_turn(segment, uses, f"call_{turn + 1}"))
            turn += 1
        elif segment["role"] == "tool" and not (record.get("forced") and index in last_tool):
            calls = found[-1].calls
            outputs = show_outputs(segment["text"])
            if len(outputs) != len(calls):
                outputs = [use["output"] for use in (call.use for call in calls)]
            for call, output in zip(calls, outputs, strict=True):
                call.output = output
        else:  # the prompt, or the request for an answer after turns or tokens ran out
            found += [Message(role, text) for role, text in chat(segment["text"])]
    return found


def conversation(record: dict) -> Iterator[dict]:
    """A trajectory's messages in order, with outputs as messages of the role `tool`.

    Each has `role` and `content`. An assistant's message also has `reasoning` and `calls` (`id`, `name` and, as JSON,
    `arguments`); a tool's message also has the `call_id` that it answers.
    """
    for message in messages_of(record):
        calls = [{"id": call.id, "name": call.name, "arguments": to_json(call.arguments)} for call in message.calls]
        of_policy = {"reasoning": message.reasoning, "calls": calls} if message.role == "assistant" else {}
        yield {"role": message.role, "content": message.text, **of_policy}
        for call in message.calls:
            if call.output is not None:
                yield {"role": "tool", "content": call.output, "call_id": call.id}


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _turn(segment: dict, uses: list[dict], name: str) -> Message:
    """A policy's turn. If its text does not show as many calls as were made, the text is left unchanged."""
    pieces = show_turn(segment["text"])
    shown = [piece.text for piece in pieces if piece.kind == "call"]
    words = "\n".join(piece.text for piece in pieces if piece.kind == "said")
    if len(shown) != len(uses):
        shown, words = [use["code"] for use in uses], segment["text"]
    before, closed, after = words.partition("</think>")
    reasoning, text = (before.replace("<think>", "", 1).strip("\n"), after.lstrip("\n")) if closed else ("", words)
    calls = [
        Call(f"{name}_{number}", use.get("tool") or CODE_TOOL, _arguments(use, call_text), use)
        for number, (use, call_text) in enumerate(zip(uses, shown, strict=True), start=1)
    ]
    return Message("assistant", text, reasoning, calls, segment["start"], segment["stop"])


def _arguments(use: dict, shown: str) -> dict:
    """A call's arguments as an object; text that is not an object is in `text`."""
    if use.get("tool", CODE_TOOL) == CODE_TOOL:
        return {"code": use["code"]}
    try:
        arguments = json.loads(use["code"])
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"text": use["code"] or shown}


def chat(text: str) -> list[tuple[str, str]]:
    """(role, text) of each finished ChatML turn; for other templates the whole text as the user's."""
    turns = [
        (role if role in ("system", "assistant") else "user", content)
        for role, content, end in _CHAT.findall(text)
        if end
    ]
    return turns or [("user", text)]
