"""The samples of an evaluation in a file that grows: what was finished before a kill is not drawn again.

Each line of `samples.jsonl` is a record of one trajectory (`Trajectory.record`) with its problem's place in the set as
`group` and its number among the samples of that problem as `sample`. Lines are added in batches and are on the disk
when `add` returns. A kill can tear no line but the last, which is taken away at the next start. A sample that the
machinery lost has a line to read, and is drawn again; the last line of a sample is the one that counts.

Of several hosts each but the first adds lines to a file of its own, `samples.1.jsonl` and so on. The first one takes
them over when all have drawn their share, or, after a kill, at the next start, on however many hosts.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, Self

import jax

from retool_jax import hosts
from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.evaluation.config import SAMPLES
from retool_jax.rollout.records import RECORD, fault_of
from retool_jax.rollout.trajectory import INFRASTRUCTURE, End, Segment, ToolUse, Trajectory
from retool_jax.shapes import TEXT, WHOLE, OrNull

# What a record has to hold.
NEEDED = (
    *("group", "sample", "id", "ids", "sampled", "segments", "tool_calls", "forced", "end", "fault"),
    *("correct", "answer", "verdict", "exact_match", "reward", "reward_terms"),
)
SAMPLE = RECORD | {"group": WHOLE, "end": frozenset(End), "answer": OrNull(TEXT)}
USED = tuple(field.name for field in fields(ToolUse))
OTHERS = "samples.*.jsonl"  # of the other hosts, by their numbers


class StoredSample(NamedTuple):
    """A sample that is in the file."""

    at: int  # byte of its line
    correct: bool
    dropped: bool


class Store:
    """The samples in a folder: `with Store(folder) as store`. All hosts make it, and close it, together.

    Attributes:
        done: by (place of the problem in its set, number of the sample): what is in the file, and what was added here.

    Raises:
        UserError: a line before the last cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.done: dict[tuple[int, int], StoredSample] = {}
        self._size = 0
        if hosts.is_first():
            self._path = folder / SAMPLES
            self._file = self._path.open("ab+")
            try:
                for at, line, record in _records(self._path):
                    self._note(record, at)
                    self._size = at + len(line)
                self._file.truncate(self._size)  # what is behind the last whole line was being written
                self._take_over()
            except BaseException:
                self._file.close()
                raise
        self.done = hosts.broadcast(self.done)  # waits until the first one has taken over what was there
        if not hosts.is_first():
            self._path = folder / OTHERS.replace("*", str(jax.process_index()))
            folder.mkdir(parents=True, exist_ok=True)  # where it is not seen yet
            self._file = self._path.open("ab+")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, records: Sequence[dict]) -> None:
        """Write records; they are on the disk when this returns.

        What no encoding can hold (a lone surrogate in a problem's text) is written as JSON's escape of it.
        """
        lines = [
            (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace") for record in records
        ]
        self._write(zip(lines, records, strict=True))

    def collect(self) -> None:
        """Wait until every host has added what it draws; then the file, which the first one has, holds all of it."""
        if not hosts.is_first():
            self._file.close()
        hosts.gather(None)
        if hosts.is_first():
            self._take_over()

    def _take_over(self) -> None:
        """Add what the files of other hosts hold and is missing, and remove them."""
        for path in sorted(self._path.parent.glob(OTHERS)):
            lines = ((line, record) for _, line, record in _records(path))
            self._write(pair for pair in lines if not self.finished(pair[1]["group"], pair[1]["sample"]))
            path.unlink()

    def _write(self, lines: Iterable[tuple[bytes, dict]]) -> None:
        for line, record in lines:
            self._file.write(line)
            self._note(record, self._size)
            self._size += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def finished(self, problem: int, sample: int) -> bool:
        """Whether a sample need not be drawn (again)."""
        found = self.done.get((problem, sample))
        return found is not None and not found.dropped

    def trajectories(self, problems: Sequence[Problem]) -> Iterator[tuple[tuple[int, int], Trajectory]]:
        """Each sample's key and its trajectory, in the order of keys."""
        with self._path.open("rb") as file:
            for key in sorted(self.done):
                file.seek(self.done[key].at)
                yield key, trajectory_of(json.loads(file.readline()), problems[key[0]])

    def _note(self, record: dict, at: int) -> None:
        dropped = record["end"] in INFRASTRUCTURE
        self.done[record["group"], record["sample"]] = StoredSample(at, record["correct"], dropped)


def _records(path: Path) -> Iterator[tuple[int, bytes, dict]]:
    """The whole lines of a file: where each begins, and what it holds."""
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if file.peek(1):
                    raise UserError(f"{path} line {number} is not JSON; remove that line, to draw it again") from error
                return
            if fault := _fault_of_sample(record):
                raise UserError(
                    f"{path} line {number} is no sample of an evaluation ({fault}); remove that line, to draw it again"
                )
            yield at, line, record
            at += len(line)


def _fault_of_sample(record: object) -> str:
    """What is wrong with what a line holds; nothing: an empty text."""
    if fault := fault_of(record, NEEDED, SAMPLE):
        return fault
    if record["group"] < 0 or record["sample"] < 0:
        return f"group {record['group']} and sample {record['sample']} must be at least 0"
    scored = record["end"] not in INFRASTRUCTURE
    return "reward is null, which a sample that was scored has not" if scored and record["reward"] is None else ""


def trajectory_of(record: dict, problem: Problem) -> Trajectory:
    """The trajectory of a record, without log-probabilities and versions, which no number asks for."""
    dropped = record["end"] in INFRASTRUCTURE
    return Trajectory(
        id=record["id"],
        problem=problem,
        ids=record["ids"],
        sampled=record["sampled"],
        segments=[Segment(s["role"], s["start"], s["stop"]) for s in record["segments"]],
        tool_uses=[ToolUse(**{name: use[name] for name in USED if name in use}) for use in record["tool_calls"]],
        forced=record["forced"],
        end=End(record["end"]),
        fault=record["fault"],
        verdict=None if dropped else Verdict(record["correct"], record["answer"], record["verdict"]),
        exact=record["exact_match"],
        reward=record["reward"],
        reward_terms=record["reward_terms"],
    )
