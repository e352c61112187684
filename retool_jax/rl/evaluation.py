"""Accuracy on held-out problems, and every trajectory to read."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retool_jax.data.arithmetic import SPLITS
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.errors import UserError
from retool_jax.rl.rollout import RolloutConfig, Sample, rollout, score
from retool_jax.rl.trajectory import End, Trajectory
from retool_jax.sandbox import Sandbox
from retool_jax.tokens.tokenizer import Tokenizer


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Rates over trajectories and over their calls (None without any); lost ones count under their end only.

    Raises:
        UserError: every trajectory lost its sandbox, so there is nothing to measure or to learn from.
    """
    kept = [t for t in trajectories if t.end != End.SANDBOX_LOST]
    if not kept:
        reason = trajectories[0].tool_uses[-1].output
        raise UserError(
            f"all {len(trajectories)} trajectories lost their sandbox ({reason}); see that python runs here, or choose"
            " another sandbox.backend, and start the same command again"
        )
    uses = [use for t in kept for use in t.tool_uses]
    ends = Counter(str(t.end) for t in trajectories)
    return {
        "accuracy": float(np.mean([t.verdict.correct for t in kept])),
        "reward_mean": float(np.mean([t.reward for t in kept])),
        "tool_rate": float(np.mean([bool(t.tool_uses) for t in kept])),
        "tool_success": float(np.mean([use.status == "success" for use in uses])) if uses else None,
        "calls_per_sample": len(uses) / len(kept),
        "forced_answers": sum(t.forced for t in kept),
        "response_tokens": float(np.mean([t.response_tokens for t in kept])),
        **{f"end/{end}": ends[end] for end in End},
    }


async def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    box: Sandbox | None,
    problems: Problems,
    step: int,
    count: int,
    limits: RolloutConfig,
    folder: Path,
) -> dict:
    """Draw one trajectory at temperature 1 and one greedily for each of the first `count` problems.

    The random streams depend on the split and the problem but not on the step, so two evaluations differ by the
    weights alone. Writes all trajectories under `folder/trajectories`; returns the numbers for the metrics file.
    """
    # Requests of training count up from 0 and stay below the first of these.
    split = problems.split
    first = (1 << 31) + (SPLITS.index(split) << 24)
    chosen = problems.head(count)
    count = len(chosen)
    samples = [Sample(chosen[i], first + i, temperature) for temperature in (1.0, 0.0) for i in range(count)]
    trajectories, statistics = await rollout(engine, tokenizer, box, samples, limits)
    score(tokenizer, trajectories)
    sampled, greedy = trajectories[:count], trajectories[count:]
    path = folder / "trajectories" / f"{split}-{step:06d}.jsonl"
    write_trajectories(path, tokenizer, sampled, split, step)
    write_trajectories(path.with_name(f"{path.stem}-greedy.jsonl"), tokenizer, greedy, split, step)
    numbers = summarise(sampled)
    accuracy = numbers["accuracy"]
    return {
        "split": split,
        **numbers,
        "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / count)),
        "greedy_accuracy": summarise(greedy)["accuracy"],
        "trajectories": str(path.relative_to(folder)),
        "perf/eval_s": statistics.total_s,
    }


def write_trajectories(
    path: Path, tokenizer: Tokenizer, trajectories: Sequence[Trajectory], split: str, step: int
) -> None:
    """One JSON record per line, in UTF-8, replacing the file in one step.

    What no encoding can hold (a lone surrogate in a problem's text) is written as JSON's escape of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for trajectory in trajectories:
            file.write(json.dumps(trajectory.record(tokenizer, split=split, step=step), ensure_ascii=False) + "\n")
    temporary.replace(path)
