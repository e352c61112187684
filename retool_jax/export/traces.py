"""Trajectories as sessions that the Hub's trace viewer shows: its Session Trace Simple Format.

A session is a file of its own: a line that says what it is, then a line for each message. The folder's README.md has
the tags by which the Hub takes a data set for traces.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from retool_jax.export.hub import card
from retool_jax.export.records import Record, conversation, to_json

HARNESS = "retool_jax"
TOLD = ("split", "step", "ground_truth", "answer", "correct", "reward", "end", "turns", "response_tokens")


def lines_of(record: Record, run: str) -> list[str]:
    """The lines of a trajectory's file."""
    values = record.values
    outcome = "right" if values.get("correct") else "wrong"
    title = " ".join(str(values.get("problem") or values["id"]).split())
    header = {"type": "session", "harness": HARNESS, "id": record.name, "name": f"[{outcome}] {title}"[:120]}
    header |= {key: values[key] for key in TOLD if values.get(key) is not None}
    return [to_json(header), *(to_json({"type": "message", "message": _message(m, run)}) for m in conversation(values))]


def _message(message: dict, run: str) -> dict:
    """A message under the Hub's names."""
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
    """Write a file for each trajectory below a folder for each of their files, and the card; how many there are."""
    count = 0
    for count, record in enumerate(records, start=1):
        above = folder / record.source
        above.mkdir(exist_ok=True)
        # Names in a data set may be anything; the number keeps files apart that are called alike.
        name = re.sub(r"[^\w-]+", "_", str(record.values["id"]), flags=re.ASCII)[:80]
        (above / f"{count:06d}-{name}.jsonl").write_text("\n".join(lines_of(record, run)) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card("traces", run, count), encoding="utf-8")
    return count
