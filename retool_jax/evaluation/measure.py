"""Accuracy on held-out problems: when it is due, what it is, and every trajectory to read."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retool_jax.data.arithmetic import SPLITS
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.evaluation.config import EvaluationConfig
from retool_jax.evaluation.numbers import summarise
from retool_jax.files import replacing
from retool_jax.metrics import METRICS_FILE, read_metrics
from retool_jax.rollout.config import RewardConfig, RolloutConfig
from retool_jax.rollout.rollout import Sample, rollout, score
from retool_jax.rollout.trajectory import Trajectory
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox


def _val_names(split: str, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Numbers of an evaluation with one sample a problem, by the names that verl has for them.

    verl counts the turns of everybody: the question, what the policy says, what tools answer.
    """
    kept = [t for t in trajectories if not t.dropped]
    turns = [len(t.segments) for t in kept]
    return {
        f"val-core/{split}/acc/mean@1": float(np.mean([t.verdict.correct for t in kept])),
        "val-aux/num_turns/mean": float(np.mean(turns)),
        "val-aux/num_turns/min": min(turns),
        "val-aux/num_turns/max": max(turns),
    }


def splits_at(evaluation: EvaluationConfig, step: int, last: int) -> list[str]:
    """The final split before the first and after the last step, the dev split every so often."""
    splits = [evaluation.final_split] if step in (0, last) else []
    if evaluation.every and step % evaluation.every == 0:
        splits.append("dev")
    return list(dict.fromkeys(splits))


def looked(folder: Path, step: int, split: str) -> dict | None:
    """The numbers of a look at a split after a step, from the log; None while there are none."""
    for record in read_metrics(folder) if (folder / METRICS_FILE).is_file() else ():
        if (record["kind"], record["step"], record.get("split")) == ("eval", step, split):
            return {key: value for key, value in record.items() if key not in ("kind", "step")}
    return None


async def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    tools: Toolbox | None,
    problems: Problems,
    step: int,
    count: int,
    limits: RolloutConfig,
    folder: Path,
    max_dropped: float,
    reward: RewardConfig | None = None,
    purposes: str = "rules",
) -> dict:
    """Draw one trajectory at temperature 1 and one greedily for each of the first `count` problems.

    The random streams depend on the split and the problem but not on the step, so two evaluations differ by the
    weights alone. Writes all trajectories under `folder/trajectories`; returns the numbers for the metrics file.
    `reward` says what trajectories are worth there; accuracy does not depend on it. `purposes` is that of `summarise`.

    Raises:
        UserError: more than the share `max_dropped` of the trajectories was dropped.
    """
    # Requests of training count up from 0 and stay below the first of these.
    split = problems.split
    first = (1 << 31) + (SPLITS.index(split) << 24)
    chosen = problems.head(count)
    count = len(chosen)
    samples = [Sample(chosen[i], first + i, temperature) for temperature in (1.0, 0.0) for i in range(count)]
    trajectories, statistics = await rollout(engine, tokenizer, tools, samples, limits)
    await asyncio.to_thread(score, tokenizer, trajectories, reward)
    sampled, greedy = trajectories[:count], trajectories[count:]
    path = folder / "trajectories" / f"{split}-{step:06d}.jsonl"
    write_trajectories(path, tokenizer, sampled, split, step)
    write_trajectories(path.with_name(f"{path.stem}-greedy.jsonl"), tokenizer, greedy, split, step)
    numbers = summarise(sampled, max_dropped, purposes, tokenizer)
    accuracy, kept = numbers["accuracy"], sum(not t.dropped for t in sampled)
    return {
        "split": split,
        **numbers,
        "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / kept)),
        "greedy_accuracy": summarise(greedy, max_dropped)["accuracy"],
        **_val_names(split, sampled),
        "trajectories": str(path.relative_to(folder)),
        "perf/eval_s": statistics.total_s,
    }


def write_trajectories(
    path: Path, tokenizer: Tokenizer, trajectories: Sequence[Trajectory], split: str, step: int
) -> None:
    """One JSON record per line, in UTF-8, replacing the file in one step; each is a group of its own.

    What no encoding can hold (a lone surrogate in a problem's text) is written as JSON's escape of it.
    """
    with replacing(path, errors="backslashreplace") as file:
        for group, trajectory in enumerate(trajectories):
            record = trajectory.record(tokenizer, split=split, step=step, group=group)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
