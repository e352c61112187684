"""Trajectories as a reader wants them: which ones to show, taken apart into reasoning, code and output."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from retool_jax.errors import UserError
from retool_jax.report.runs import Run
from retool_jax.tokens.shown import Shown, show_outputs, show_turn

# The page shows at most so many trajectories of an evaluation, and about so many characters in all, so that it opens
# quickly whatever the size of the run; the run folder has every trajectory in full.
TRAJECTORIES_PER_EVALUATION = 60
TRAJECTORY_CHARACTERS = 900_000
SURPRISE_TOKENS = 300


@dataclass(frozen=True)
class Part:
    """A piece of a trajectory as a reader wants it: `kind` is reasoning, code (a call of any tool) or output."""

    kind: str
    text: str
    note: str = ""
    failed: bool = False


def readable_parts(trajectory: dict) -> list[Part]:
    """Take a trajectory apart into reasoning, its calls (programs, or names and arguments), and what tools answered."""
    parts, calls = [], iter(trajectory["tool_calls"])
    for segment in trajectory["segments"]:
        if segment["role"] == "policy":
            parts += map(_said_or_called, show_turn(segment["text"]))
        elif segment["role"] == "tool":
            parts += [_output(text, next(calls, {})) for text in show_outputs(segment["text"])]
    return parts


def _said_or_called(piece: Shown) -> Part:
    if piece.kind == "said":
        return Part("reasoning", piece.text)
    return Part("code", piece.text, note="not a well-formed call" if piece.fault else "", failed=bool(piece.fault))


def _output(text: str, call: dict) -> Part:
    status = call.get("status", "")
    took = f" · {1000 * call['wall_s']:.0f} ms" if call.get("wall_s") is not None else ""
    return Part("output", text, note=status.replace("_", " ") + took, failed=status not in ("", "success"))


def shown_evaluations(run: Run) -> list[dict]:
    """The first and the last evaluation of the split that was followed longest, where their trajectories exist."""
    found = []
    for split in ("test", "dev"):
        kept = [e for e in run.evaluations(split) if (run.folder / (e.get("trajectories") or "-")).is_file()]
        found.append(kept[:1] + kept[1:][-1:])
    return max(found, key=lambda pair: pair[-1]["step"] - pair[0]["step"] if pair else -1)


def outcome(trajectory: dict) -> str:
    """`right`, `wrong`, or `dropped`: what the machinery ended has no reward, and says nothing about the policy."""
    if trajectory["reward"] is None:
        return "dropped"
    return "right" if trajectory["correct"] else "wrong"


def choose_trajectories(path: Path, limit: int) -> list[dict]:
    """Up to `limit` trajectories of a file, the first of each outcome.

    Dropped ones take a tenth of the places, and right and wrong ones share the rest half and half; places that one
    outcome does not fill go to the others.
    """
    kept: dict[str, list] = {"right": [], "wrong": [], "dropped": []}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                trajectory = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}); remove that line") from error
            same = kept[outcome(trajectory)]
            if len(same) < limit:
                same.append((number, trajectory))
    right, wrong, dropped = kept.values()
    dropped = dropped[: max(limit // 10, limit - len(right) - len(wrong))]
    places = limit - len(dropped)
    wrongs = min(len(wrong), max(places - places // 2, places - len(right)))
    chosen = sorted(chain(dropped, wrong[:wrongs], islice(right, places - wrongs)), key=lambda item: item[0])
    return [trajectory for _, trajectory in chosen]


def trajectory_views(runs: Sequence[Run]) -> list[dict]:
    """What the template shows of each chosen trajectory, long texts cut in the middle."""
    sources = [(run, evaluation) for run in runs for evaluation in shown_evaluations(run)]
    limit = min(TRAJECTORIES_PER_EVALUATION, 6 * TRAJECTORIES_PER_EVALUATION // max(1, len(sources)))
    chosen = []
    for run, evaluation in sources:
        path = run.folder / evaluation["trajectories"]
        chosen += [(run, evaluation, trajectory) for trajectory in choose_trajectories(path, limit)]
    return [_view(*source, characters=TRAJECTORY_CHARACTERS // len(chosen)) for source in chosen]


def _view(run: Run, evaluation: dict, trajectory: dict, characters: int) -> dict:
    parts = readable_parts(trajectory)
    share = characters // max(1, len(parts))
    logprobs = [p for p, sampled in zip(trajectory["logprobs"], trajectory["sampled"], strict=True) if sampled]
    return {
        **{key: trajectory[key] for key in ("id", "problem", "ground_truth", "answer", "reward", "turns")},
        "outcome": outcome(trajectory),
        "end": trajectory["end"].replace("_", " "),
        "tokens": trajectory["response_tokens"],
        "run": run.label,
        "evaluation": f"{evaluation['split']}, step {evaluation['step']}",
        "calls": len(trajectory["tool_calls"]),
        "parts": [Part(part.kind, cut(part.text, share), part.note, part.failed) for part in parts],
        "raw": [(s["role"], cut(s["text"], characters // len(trajectory["segments"]))) for s in trajectory["segments"]],
        "surprise": surprise_path(logprobs[:SURPRISE_TOKENS]),
        "surprise_width": 6 * min(len(logprobs), SURPRISE_TOKENS),
    }


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end with a note of what is missing between them."""
    limit = max(limit, 200)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def surprise_path(logprobs: Sequence[float]) -> str:
    """An SVG path with a bar for each sampled token, 6 units apart and 16 high for a nat of -log-prob, at most 40."""
    heights = enumerate(round(min(40, max(0, -16 * logprob))) for logprob in logprobs)  # in this order NaN has no bar
    return "".join(f"M{6 * index + 2} 40v-{height}" for index, height in heights if height > 0)
