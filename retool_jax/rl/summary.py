"""The speed of each step, and `summary.json` with the numbers of the table at the end of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retool_jax.engine.scheduler import Statistics
from retool_jax.evaluation.config import EvaluationConfig
from retool_jax.evaluation.measure import read_evaluation
from retool_jax.files import replacing
from retool_jax.metrics import SUMMARY as SHAPE
from retool_jax.rollout.reward import NOT_RUN
from retool_jax.rollout.trajectory import Trajectory
from retool_jax.shapes import complaint

SUMMARY = "summary.json"


def performance(statistics: Statistics, trajectories: Sequence[Trajectory]) -> dict[str, float | None]:
    """Wall-clock numbers of a step, under `perf/`: the only ones that differ between two runs of one config.

    `trajectories` are all that the step sampled. If rollouts run ahead and no turn ends within a step, the quantiles
    are None.
    """
    turns = statistics.turn_s
    executed = [use for t in trajectories if not t.dropped for use in t.tool_uses if use.status not in NOT_RUN]
    return {
        "perf/tokens_per_s": statistics.decoded_tokens / statistics.total_s,
        "perf/rollout_s": statistics.total_s,
        "perf/tool_wait_s": statistics.tool_wait_s,
        "perf/tool_hidden": statistics.tool_hidden,
        "perf/fill": statistics.fill,
        "perf/turn_p50_s": float(np.percentile(turns, 50)) if turns else None,
        "perf/turn_p95_s": float(np.percentile(turns, 95)) if turns else None,
        "perf/queue_s_mean": float(np.mean([use.queue_s for use in executed])) if executed else None,
        "perf/prefilled_tokens": statistics.prefilled_tokens,
        "perf/appended_tokens": statistics.appended_tokens,
        "perf/rewritten_tokens": statistics.rewritten_tokens,
        "perf/write_waste": statistics.write_waste,
    }


def summarise_run(
    folder: Path,
    evaluation: EvaluationConfig,
    steps: int,
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
    total_s: float,
) -> dict:
    """The numbers of the closing table of a run of `steps`; time outside all parts is `other`.

    Args:
        seconds: by part, as `Clock` counts them.
        tokens: decoded and trained on, summed over all processes that worked on the run.
    """
    split = evaluation.final_split
    rates = {part: tokens[name] / seconds[part] for part, name in (("rollout", "decode"), ("update", "update"))}
    return {
        "split": split,
        "problems": evaluation.problems,
        "steps": steps,
        "before": read_evaluation(folder, 0, split),
        "after": read_evaluation(folder, steps, split),
        "tokens_per_s": rates,
        "seconds": {**seconds, "other": total_s - sum(seconds.values()), "total": total_s},
    }


def write_summary(folder: Path, summary: dict) -> None:
    """Replace the run's summary in one step."""
    with replacing(folder / SUMMARY) as file:
        file.write(json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path, steps: int) -> dict | None:
    """The summary of a run of `steps`; None if there is none, or if it is of another number of steps."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return summary if not complaint(summary, SHAPE) and summary.get("steps") == steps else None
