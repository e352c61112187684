"""Trajectories as run folders hold them: which files, which of their lines, and a line as messages and calls.

Ids are never decoded here: every text is a record's own. Each text is as UTF-8 can hold it (`writable`), and a number
that is not finite is null, so no format meets what it cannot hold.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from retool_jax.errors import UserError
from retool_jax.evaluation.config import SAMPLES
from retool_jax.rollout.records import TOKENS, fault_of
from retool_jax.sandbox.text import writable
from retool_jax.shapes import read_records as read_shaped
from retool_jax.tokens.grammar import CODE_TOOL
from retool_jax.tokens.shown import show_outputs, show_turn

GREEDY = "-greedy"  # how the names of files end whose trajectories were drawn greedily
NEEDED = ("id", "ids", "sampled", "logprobs", "segments", "tool_calls")
_CHAT = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(<\|im_end\|>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Selection:
    """Which trajectories to take; None takes every one."""

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
    """One line of a file: `source` is the file's name without its ending, which holds split and step."""

    source: str
    values: dict

    @property
    def name(self) -> str:
        """Its own name among all of a run's, since an id comes again at each look at a problem."""
        return f"{self.source}/{self.values['id']}"


def files_of(folder: Path) -> list[Path]:
    """The files with trajectories of a run's or an evaluation's folder.

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
    """The selected trajectories of a folder, one by one. A last line that a kill tore is left out.

    An evaluation draws again what the machinery lost: of the lines of one sample the last one counts.

    Raises:
        UserError: a line is no trajectory, or none is selected; it names what there is.
    """
    found, there = 0, set()
    for path in files_of(folder):
        redrawn = path.name == SAMPLES
        last = {values["id"]: number for number, values in _lines(path)} if redrawn else {}
        for number, values in _lines(path):
            if redrawn and last[values["id"]] != number:
                continue
            there.add(f"split={values.get('split')} step={values.get('step')}")
            if selection.takes(values, path.stem):
                found += 1
                yield Record(path.stem, values)
    if not found:
        listed = "; ".join(sorted(there)[:20]) or "no line in any file"
        raise UserError(f"no trajectory of {folder} is of split, step and greedy as asked; there are: {listed}")


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The lines of a file, by their numbers."""
    for number, values in read_shaped(path, "trajectory", lambda record: fault_of(record, NEEDED)):
        yield number, {key: value if key in TOKENS else clean(value) for key, value in values.items()}


def clean(value: object) -> object:
    """A JSON value whose texts UTF-8 can hold, and whose numbers strict JSON can."""
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {writable(key): clean(inner) for key, inner in value.items()}
    return [clean(inner) for inner in value] if isinstance(value, list) else value


# --- a record as messages ---------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call that was made: `output` is what the policy was told, None where it never was."""

    id: str
    name: str
    arguments: dict
    use: dict  # the record's own
    output: str | None = None


@dataclass
class Message:
    """What `role` said: system, user or assistant.

    An assistant's `text` is without its thoughts, where those were closed, and without its calls, and ids from `start`
    to `stop` are its own.
    """

    role: str
    text: str
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    start: int = 0
    stop: int = 0


def messages_of(record: dict) -> list[Message]:
    """A trajectory as a conversation. Outputs are with the calls that they answer."""
    found: list[Message] = []
    segments = record["segments"]
    asks = [index for index, segment in enumerate(segments) if segment["role"] == "tool"][-1:]
    turn = 0
    for index, segment in enumerate(segments):
        if segment["role"] == "policy":
            uses = [use for use in record["tool_calls"] if use["turn"] == turn]
            found.append(_turn(segment, uses, f"call_{turn + 1}"))
            turn += 1
        elif segment["role"] == "tool" and not (record.get("forced") and index in asks):
            calls = found[-1].calls
            outputs = show_outputs(segment["text"])
            if len(outputs) != len(calls):
                outputs = [use["output"] for use in (call.use for call in calls)]
            for call, output in zip(calls, outputs, strict=True):
                call.output = output
        else:  # the prompt, and the request for an answer where turns or tokens had run out
            found += [Message(role, text) for role, text in chat(segment["text"])]
    return found


def conversation(record: dict) -> Iterator[dict]:
    """A trajectory's messages in the order in which they were said, outputs as messages of the role `tool`.

    Each has `role` and `content`; an assistant's also `reasoning` and `calls` (`id`, `name` and, as JSON, `arguments`),
    a tool's also the `call_id` that it answers.
    """
    for message in messages_of(record):
        calls = [{"id": call.id, "name": call.name, "arguments": to_json(call.arguments)} for call in message.calls]
        spoken = {"reasoning": message.reasoning, "calls": calls} if message.role == "assistant" else {}
        yield {"role": message.role, "content": message.text, **spoken}
        for call in message.calls:
            if call.output is not None:
                yield {"role": "tool", "content": call.output, "call_id": call.id}


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _turn(segment: dict, uses: list[dict], name: str) -> Message:
    """A policy's turn. Where its text shows other calls than those that were made, it is left as it was sampled."""
    pieces = show_turn(segment["text"])
    shown = [piece.text for piece in pieces if piece.kind == "call"]
    said = "\n".join(piece.text for piece in pieces if piece.kind == "said")
    if len(shown) != len(uses):
        shown, said = [use["code"] for use in uses], segment["text"]
    before, closed, after = said.partition("</think>")
    reasoning, text = (before.replace("<think>", "", 1).strip("\n"), after.lstrip("\n")) if closed else ("", said)
    calls = [
        Call(f"{name}_{number}", use.get("tool") or CODE_TOOL, _arguments(use, inside), use)
        for number, (use, inside) in enumerate(zip(uses, shown, strict=True), start=1)
    ]
    return Message("assistant", text, reasoning, calls, segment["start"], segment["stop"])


def _arguments(use: dict, shown: str) -> dict:
    """A call's arguments as an object; what cannot be read as one stands below `text`."""
    if use.get("tool", CODE_TOOL) == CODE_TOOL:
        return {"code": use["code"]}
    try:
        arguments = json.loads(use["code"])
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"text": use["code"] or shown}


def chat(text: str) -> list[tuple[str, str]]:
    """(role, text) of each finished turn of ChatML; the whole text as a user's where it is of another template."""
    turns = [(role, inside) for role, inside, end in _CHAT.findall(text) if end]
    return [(role if role in ("system", "assistant") else "user", said) for role, said in turns] or [("user", text)]
