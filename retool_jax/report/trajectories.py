"""Trajectories for readers: find their files, choose which ones to show, and split them into text, code and output."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from retool_jax.evaluation.config import SAMPLES
from retool_jax.report.runs import Run
from retool_jax.rollout.records import fault_of, last_lines
from retool_jax.shapes import read_records as read_shaped
from retool_jax.tokens.shown import TurnPart, show_outputs, show_turn
from retool_jax.tokens.tokenizer import Tokenizer

# The fields that a record needs to be shown.
NEEDED = (
    *("id", "problem", "ground_truth", "correct", "reward", "end", "response_tokens"),
    *("ids", "sampled", "logprobs", "segments", "tool_calls"),
)


@dataclass(frozen=True)
class Part:
    """A piece of a trajectory: `kind` is reasoning, code (a call of any tool) or output."""

    kind: str
    text: str
    note: str = ""
    failed: bool = False


def readable_parts(trajectory: dict) -> list[Part]:
    """Split a trajectory into reasoning, calls (programs, or names and arguments), and the tools' outputs.

    An output for which there was no room is in no segment. It comes last, with a note.
    """
    parts, calls = [], iter(trajectory["tool_calls"])
    for segment in trajectory["segments"]:
        if segment["role"] == "policy":
            parts += map(_policy_part, show_turn(segment["text"]))
        elif segment["role"] == "tool":
            parts += [_output(text, next(calls, {})) for text in show_outputs(segment["text"])]
    return parts + [_output(call.get("output", ""), call, " · the policy was not told") for call in calls]


def _policy_part(piece: TurnPart) -> Part:
    if piece.kind == "said":
        return Part("reasoning", piece.text)
    return Part("code", piece.text, note="not a well-formed call" if piece.fault else "", failed=bool(piece.fault))


def _output(text: str, call: dict, remark: str = "") -> Part:
    status = call.get("status", "")
    took = f" · {1000 * call['wall_s']:.0f} ms" if call.get("wall_s") is not None else ""
    return Part("output", text, note=status.replace("_", " ") + took + remark, failed=status not in ("", "success"))


def outcome(trajectory: dict) -> str:
    """`right`, `wrong`, or `dropped` for a trajectory that the machinery ended, which has no reward."""
    if trajectory["reward"] is None:
        return "dropped"
    return "right" if trajectory["correct"] else "wrong"


@dataclass(frozen=True)
class Source:
    """A file of trajectories: the number of its run, its number of trajectories, and whether they are greedy.

    `step` is only for saved rollouts (`rl.save_rollouts`), whose lines do not contain it. `lines` are the numbers of
    the lines that count, if not all do.
    """

    run: int
    path: Path
    count: int
    greedy: bool = False
    step: int | None = None
    lines: frozenset[int] | None = None


def sources_of(runs: Sequence[Run]) -> list[Source]:
    """The files of all evaluations and saved rollouts: first sampled trajectories, by step, then greedy ones."""
    found = []
    for number, run in enumerate(runs):
        evaluations = sorted((e for e in run.records if e["kind"] == "eval"), key=lambda e: e["step"])
        names = [str(e["trajectories"]) for e in evaluations if e.get("trajectories")] or [SAMPLES]
        for path in (run.folder / name for name in dict.fromkeys(names)):
            found += [(number, path, False, None), (number, path.with_name(f"{path.stem}-greedy.jsonl"), True, None)]
        for path in sorted(run.folder.glob("rollouts/step-*.jsonl")):
            if (step := path.stem.removeprefix("step-")).isdecimal():
                found.append((number, path, False, int(step)))
    kept = [_source(*arguments) for arguments in found if arguments[1].is_file()]
    return sorted(kept, key=lambda source: source.greedy)


def _source(run: int, path: Path, greedy: bool, step: int | None) -> Source:
    if path.name == SAMPLES:
        lines = last_lines(path)
        return Source(run, path, len(lines), lines=lines)
    with path.open("rb") as file:
        return Source(run, path, sum(1 for _ in file), greedy, step)


def read_records(source: Source, tokenizer: Tokenizer | str) -> Iterator[dict]:
    """The records of a file. For saved rollouts, which have no texts, the tokenizer makes them.

    Raises:
        UserError: a line before the last is not JSON, or a line is not a trajectory.
    """
    if source.step is not None:
        from retool_jax.rl.replay import read_rollouts  # imports jax, which nothing else here needs

        for trajectory in read_rollouts(source.path):
            yield trajectory.record(tokenizer, split="training", step=source.step)
        return
    for number, record in read_shaped(source.path, "trajectory", lambda record: fault_of(record, NEEDED)):
        if source.lines is None or number in source.lines:
            yield record


def choose_trajectories(records: Iterable[dict], limit: int) -> list[dict]:
    """Up to `limit` trajectories, the first ones of each outcome.

    A tenth of the places is for dropped ones; right and wrong ones have half of the rest each. Places that one outcome
    does not fill go to the others.
    """
    kept: dict[str, list] = {"right": [], "wrong": [], "dropped": []}
    for number, trajectory in enumerate(records):
        same = kept[outcome(trajectory)]
        if len(same) < limit:
            same.append((number, trajectory))
    right, wrong, dropped = kept.values()
    dropped = dropped[: max(limit // 10, limit - len(right) - len(wrong))]
    places = limit - len(dropped)
    wrongs = min(len(wrong), max(places - places // 2, places - len(right)))
    chosen = sorted(chain(dropped, wrong[:wrongs], islice(right, places - wrongs)), key=lambda item: item[0])
    return [trajectory for _, trajectory in chosen]


def share_out(sources: Sequence[Source], limit: int) -> list[int]:
    """How many trajectories each file may show, `limit` in total.

    All files have equally many places; places that one does not need go to the rest. Files of greedy trajectories get
    what the others leave.
    """
    places = [0] * len(sources)
    for greedy in (False, True):
        waiting = sorted((s.count, i) for i, s in enumerate(sources) if s.greedy == greedy)
        for done, (count, index) in enumerate(waiting):
            places[index] = min(count, limit // (len(waiting) - done))
            limit -= places[index]
    return places
