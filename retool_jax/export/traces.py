"""Trajectories as sessions for the Hub's trace viewer, in its Session Trace Simple Format.

Each session is one file: a header line, then a line for each message. The folder's README.md has the tags by which the
Hub recognises a data set of traces.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from retool_jax.export.hub import card
from retool_jax.export.records import Record, conversation, to_json

HARNESS = "retool_jax"
IN_HEADER = ("split", "step", "ground_truth", "answer", "correct", "reward", "end", "turns", "response_tokens")


def lines_of(record: Record, run: str) -> list[str]:
    """The lines of a trajectory's file."""
    values = record.values
    outcome = "right" if values.get("correct") else "wrong"
    title = " ".join(str(values.get("problem") or values["id"]).split())
    header = {"type": "session", "harness": HARNESS, "id": record.name, "name": f"[{outcome}] {title}"[:120]}
    header |= {key: values[key] for key in IN_HEADER if values.get(key) is not None}
    return [to_json(header), *(to_json({"type": "message", "message": _message(m, run)}) for m in conversation(values))]


def _message(message: dict, run: str) -> dict:
    """A message with the Hub's names of fields."""
    found = {"role": message["role"], "content": message["content"]}
    if message["role"] == "assistant":
        found["model"] = run
    if message.get("reasoning"):
        found["reasoningContent"] = message["reasoning"]
    if message.get("calls"):
        found["toolCalls"] = [
            {"id": call["id"], "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in message["calls"]
        ]
    if "call_id" in message:
        found["toolCallId"] = message["call_id"]
    return found


def write(records: Iterable[Record], folder: Path, run: str) -> int:
    """Write a file for each trajectory, in one folder for each source, and the card. Returns their number."""
    count = 0
    for count, record in enumerate(records, start=1):
        parent = folder / record.source
        parent.mkdir(exist_ok=True)
        # Ids in a data set may be any text; the number makes the names of the files different.
        name = re.sub(r"[^\w-]+", "_", str(record.values["id"]), flags=re.ASCII)[:80]
        (parent / f"{count:06d}-{name}.jsonl").write_text("\n".join(lines_of(record, run)) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card("traces", run, count), encoding="utf-8")
    return count
