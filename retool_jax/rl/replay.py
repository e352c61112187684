"""Rollouts in files: a step's trajectories with everything that the update needs, and a reader in place of the engine.

`rl.save_rollouts=true` writes them, `replay=FOLDER` trains from them; the format is in `docs/data.md`.
"""

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.engine.scheduler import Statistics
from retool_jax.errors import UserError, one_line
from retool_jax.files import replacing
from retool_jax.models.decoder import Params
from retool_jax.rl.collector import Rollouts
from retool_jax.rl.config import RLConfig
from retool_jax.rollout.records import CALL, SEGMENT, TOKENS, fault_of
from retool_jax.rollout.trajectory import End, Segment, ToolUse, Trajectory
from retool_jax.shapes import FLAG, NUMBER, TEXT, WHOLE, OrNull
from retool_jax.tokens.tokenizer import Tokenizer

FOLDER = "rollouts"  # in a run's folder
NEEDED = ("group", "ids", "sampled", "logprobs", "reward")  # required in each line; docs/data.md has the optional ones
SHAPE = {
    **{"id?": TEXT, "versions?": [WHOLE], "segments?": [SEGMENT], "tool_uses?": [CALL], "end?": TEXT, "fault?": TEXT},
    **{"temperature?": OrNull(NUMBER), "top_p?": NUMBER, "top_k?": WHOLE, "forced?": FLAG, "exact?": FLAG},
    **{"room?": WHOLE, "final_text?": TEXT, "reward?": OrNull(NUMBER), "reward_terms?": {...: NUMBER}},
    **{"started_s?": NUMBER, "finished_s?": NUMBER},
    "problem?": {"id?": TEXT, "messages?": [{"role": TEXT, "content": TEXT}], "tools?": OrNull([TEXT])},
    "verdict?": OrNull({"correct": FLAG, "answer": OrNull(TEXT), "reason": TEXT}),
}


def rollouts_path(run: Path, step: int) -> Path:
    """Where a run keeps the trajectories of a step."""
    return run / FOLDER / f"step-{step:06d}.jsonl"


# --- writing ----------------------------------------------------------------------------------------------------------


def write_rollouts(
    path: Path, trajectories: Sequence[Trajectory], group_size: int, tokenizer: Tokenizer | None = None
) -> None:
    """Write one JSON object per line for each trajectory, in order, and replace the file atomically.

    Log-probabilities are written as float32, the type of a batch, and are read back bit for bit; all other values are
    read back unchanged. A lone surrogate is written as its JSON escape.

    Args:
        path: the file.
        trajectories: those of a step, group by group, including the dropped ones.
        group_size: the number of trajectories in a group.
        tokenizer: the policy's, to add the text of each segment for human readers; it is not read back.
    """
    with replacing(path, errors="backslashreplace") as file:
        for place, trajectory in enumerate(trajectories):
            record = record_of(trajectory, place // group_size, tokenizer)
            # A user's own reward function may return a NumPy number.
            file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":"), default=float) + "\n")


def record_of(trajectory: Trajectory, group: int, tokenizer: Tokenizer | None = None) -> dict:
    """A line of a file: all fields of a trajectory, with the long lists of `TOKENS` last."""
    t = trajectory
    segments = [vars(segment) for segment in t.segments]
    if tokenizer:
        segments = [s | {"text": tokenizer.decode(t.ids[s["start"] : s["stop"]])} for s in segments]
    held = vars(t) | {
        "problem": vars(t.problem),
        "segments": segments,
        "tool_uses": [vars(use) for use in t.tool_uses],
        "verdict": vars(t.verdict) if t.verdict else None,
        "sampled": [int(x) for x in t.sampled],
        "logprobs": [float(f"{x:.9g}") for x in t.logprobs],  # nine digits are enough to distinguish any two float32
    }
    names = [*(name for name in held if name not in TOKENS), *(name for name in TOKENS if name in held)]
    return {"group": group} | {name: held[name] for name in names}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rollouts(path: Path) -> list[Trajectory]:
    """The trajectories of a file, in order.

    Raises:
        UserError: there is no such file, or a line of it is not a trajectory.
    """
    return [trajectory for _, trajectory in _lines(path)]


def _lines(path: Path) -> list[tuple[int, Trajectory]]:
    """Each line's group and trajectory."""
    found: list[tuple[int, Trajectory]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                found.append(read_record(json.loads(line), number))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give the file of a step's rollouts") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(
            f"{path} line {len(found) + 1} is no trajectory ({what}); docs/data.md says what one needs, and"
            " rl.save_rollouts=true writes them"
        ) from error
    if not found:
        raise UserError(f"{path} is empty; give the file of a step's rollouts")
    return found


def read_record(record: dict, number: int) -> tuple[int, Trajectory]:
    """A line's group and trajectory. Only group, ids, sampled, logprobs and reward are required.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not a trajectory.
    """
    group, ids, sampled, logprobs, reward = (record[name] for name in NEEDED)
    if not ids or not len(ids) == len(sampled) == len(logprobs):
        raise ValueError(f"{len(ids)} ids, {len(sampled)} sampled and {len(logprobs)} logprobs: give as many of each")
    for name, values in (("group", [group]), ("ids", ids)):
        if odd := [x for x in values if type(x) is not int or x < 0]:
            raise ValueError(f"{name} {odd[0]!r}: it must be a whole number of at least 0")
    if odd := [x for x in sampled if x not in (0, 1)]:
        raise ValueError(f"sampled {odd[0]!r}: it must be 0 or 1")
    if sampled[0]:
        raise ValueError("its first id was sampled: give the prompt that it was drawn behind, too")
    drawn = np.array(logprobs, np.float32)
    if np.isnan(drawn).any():
        raise ValueError("logprobs has NaN, which no token is drawn with")
    if fault := fault_of(record, NEEDED, SHAPE):
        raise ValueError(fault)
    problem = {"id": f"group {group}", "messages": [{"role": "user", "content": ""}], "ground_truth": ""}
    problem |= record.get("problem", {})
    tools = problem.get("tools")
    read = {
        "id": record.get("id", f"{problem['id']}/{number}"),
        "problem": Problem(
            problem["id"], tuple(problem["messages"]), problem["ground_truth"], None if tools is None else tuple(tools)
        ),
        "sampled": [bool(x) for x in sampled],
        "logprobs": drawn.tolist(),
        "segments": [Segment(s["role"], s["start"], s["stop"]) for s in record.get("segments", _segments(sampled))],
        "tool_uses": [ToolUse(**use) for use in record.get("tool_uses", ())],
        "end": End(record.get("end", End.ANSWERED)),
        "reward": None,
        "verdict": None,
    }
    others = [field.name for field in fields(Trajectory) if field.name in record and field.name not in read]
    trajectory = Trajectory(**read, **{name: record[name] for name in others})
    if not trajectory.dropped:
        if reward is None:
            raise ValueError(f"its reward is null, and its end is {trajectory.end}")
        trajectory.reward = float(reward)
        if not math.isfinite(trajectory.reward):
            raise ValueError(f"its reward is {reward}, which is not finite")
        said = record.get("verdict") or {"correct": trajectory.reward > 0, "answer": None, "reason": "recorded"}
        trajectory.verdict = Verdict(**said)
    return group, trajectory


def _segments(sampled: Sequence[int]) -> Iterator[dict]:
    """The segments that follow from which ids were sampled: a prompt, then turns of the policy and of tools."""
    start = 0
    for drawn, run in groupby(sampled):
        stop = start + sum(1 for _ in run)
        yield {"role": "policy" if drawn else "tool" if start else "prompt", "start": start, "stop": stop}
        start = stop


# --- in place of an engine --------------------------------------------------------------------------------------------


class Replay:
    """The saved rollouts of a run, step by step, with the same methods as the collector.

    Args:
        folder: the folder of the run that saved them.
        rl: the config of the run that learns from them.
        vocab_size: the vocabulary of that run's model.
        step: the last step that was already learned from.

    Raises:
        UserError: the folder has no rollouts, or lacks those of a step up to `rl.steps`.
    """

    def __init__(self, folder: Path, rl: RLConfig, vocab_size: int, step: int = 0) -> None:
        self._folder, self._rl, self._vocab_size, self._step = folder, rl, vocab_size, step
        names = [path.stem.removeprefix("step-") for path in (folder / FOLDER).glob("step-*.jsonl")]
        there = sorted(int(name) for name in names if name.isdecimal())
        if not there:
            raise UserError(
                f"replay={folder} has no {FOLDER}/{rollouts_path(folder, 1).name}; give the folder of a run that had"
                " rl.save_rollouts=true"
            )
        missing = next((n for n in range(step + 1, rl.steps + 1) if n not in there), None)
        if missing is not None:
            raise UserError(
                f"replay={folder} has no rollouts of step {missing}, only of {len(there)} steps, {there[0]} to"
                f" {there[-1]}, and rl.steps={rl.steps}; lower rl.steps, or let that run go on with"
                " rl.save_rollouts=true"
            )

    async def take(self) -> Rollouts:
        """The next step's trajectories, with their recorded rewards.

        Raises:
            UserError: they cannot be read, or this run cannot learn from them.
        """
        self._step += 1
        began = time.perf_counter()
        trajectories = await asyncio.to_thread(self._read, rollouts_path(self._folder, self._step))
        # Nothing was decoded, and no turn took any time.
        statistics = Statistics(total_s=time.perf_counter() - began, turn_s=deque([0.0]))
        return Rollouts(trajectories, statistics, {})

    def update_weights(self, params: Params) -> None:
        """Does nothing: a replay does not use the weights."""

    async def drain(self) -> None:
        """Does nothing: no rollouts are in progress."""

    def state(self) -> dict:
        """Empty: a checkpoint's step is enough to continue."""
        return {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Does nothing: no file stays open."""

    def _read(self, path: Path) -> list[Trajectory]:
        rl, lines = self._rl, _lines(path)
        sizes = [(group, sum(1 for _ in run)) for group, run in groupby(group for group, _ in lines)]
        if odd := [pair for pair in sizes if pair[1] != rl.group_size]:
            raise UserError(
                f"{path} has {odd[0][1]} trajectories side by side of group {odd[0][0]}, and"
                f" rl.group_size={rl.group_size}; set it to what they were drawn with, or restore the file"
            )
        if len(sizes) > rl.prompts_per_step:
            raise UserError(
                f"{path} has {len(sizes)} groups, and a step learns from rl.prompts_per_step={rl.prompts_per_step};"
                " raise it to what they were drawn with"
            )
        trajectories = [trajectory for _, trajectory in lines]
        for t in trajectories:
            if t.temperature not in (None, rl.temperature):
                raise UserError(
                    f"{path} holds a trajectory that was drawn at temperature {t.temperature:g} ({t.id}), and"
                    f" rl.temperature={rl.temperature:g}; set rl.temperature={t.temperature:g}, or draw anew where that"
                    " is 0"
                )
            if t.top_p < 1 or t.top_k:
                raise UserError(
                    f"{path} holds a trajectory that was drawn with top_p={t.top_p:g} top_k={t.top_k} ({t.id}), and an"
                    " update knows the whole distribution; draw it with top_p=1 top_k=0"
                )
            if t.reward_terms and rl.reward.name not in t.reward_terms:
                raise UserError(
                    f"{path} holds a trajectory that has the reward {', '.join(t.reward_terms)} ({t.id}), and"
                    f" rl.reward.name={rl.reward.name}; a replay learns from rewards as they were recorded: set that to"
                    " what they were drawn with, or draw anew"
                )
        longest = max(trajectories, key=lambda t: len(t.ids))
        if len(longest.ids) > rl.row_length:
            raise UserError(
                f"{path} holds a trajectory of {len(longest.ids)} tokens ({longest.id}); the limit is"
                f" rl.row_length={rl.row_length}: raise it to {len(longest.ids)} or more"
            )
        highest = max(max(t.ids) for t in trajectories)
        if highest >= self._vocab_size:
            raise UserError(
                f"{path} has the id {highest}, and model.vocab_size={self._vocab_size}; replay it with the vocabulary"
                " of the model that drew it"
            )
        return trajectories
