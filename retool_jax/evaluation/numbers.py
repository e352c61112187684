"""The numbers of a set of trajectories: rates over trajectories and over their calls, by name in one dict."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from retool_jax.answers.check import TIMEOUT
from retool_jax.errors import UserError, one_line
from retool_jax.evaluation.behaviour import behaviour
from retool_jax.rollout.trajectory import INFRASTRUCTURE, End, ToolUse, Trajectory
from retool_jax.tokens.tokenizer import Tokenizer


def require_kept(trajectories: Sequence[Trajectory], max_dropped: float) -> list[Trajectory]:
    """The trajectories that the machinery has not dropped.

    Raises:
        UserError: the dropped share is above `max_dropped`.
    """
    kept = [t for t in trajectories if not t.dropped]
    if 1 - len(kept) / len(trajectories) > max_dropped:
        ends = Counter(t.end for t in trajectories)
        faults = {t.end: f"{ends[t.end]} {t.end} ({t.fault})" for t in trajectories if t.dropped}
        raise UserError(
            f"{len(trajectories) - len(kept)} of {len(trajectories)} trajectories were dropped, a share above"
            f" rl.max_dropped={max_dropped:g}: {', '.join(faults.values())}. This is not the policy's fault, and the"
            " run's last checkpoint is good: fix the cause and start the same command again, or raise rl.max_dropped"
        )
    return kept


def summarise(
    trajectories: Sequence[Trajectory],
    max_dropped: float,
    purposes: str = "rules",
    tokenizer: Tokenizer | None = None,
) -> dict[str, float | None]:
    """Rates over trajectories and over their calls; None if there are none. Dropped trajectories count only in `end/`.

    Args:
        trajectories: scored ones.
        max_dropped: the share that the machinery may have dropped, below 1.
        purposes, tokenizer: as for `behaviour`.

    Raises:
        UserError: more were dropped, or there is no such classifier of purposes.
    """
    kept = require_kept(trajectories, max_dropped)
    ends = Counter(str(t.end) for t in trajectories)
    uses = [use for t in kept for use in t.tool_uses]
    success = _share(uses, "success")
    code_lengths = [len(use.code) for use in uses if use.code]
    return {
        "accuracy": _mean([t.verdict.correct for t in kept]),
        "reward_mean": _mean([t.reward for t in kept]),
        "tool_rate": _mean([bool(t.tool_uses) for t in kept]),
        "tool_success": success,
        "calls_per_sample": len(uses) / len(kept),
        "calls/repaired": sum(bool(use.repaired) for use in uses),
        "forced_answers": sum(t.forced for t in kept),
        "response_tokens": _mean([t.response_tokens for t in kept]),
        "turns_mean": _mean([t.turns for t in kept]),
        **_spread("response_tokens", [t.response_tokens for t in kept]),
        **_spread("turns", [t.turns for t in kept]),
        **_spread("calls", [len(t.tool_uses) for t in kept]),
        "checker_timeouts": sum(t.verdict.reason == TIMEOUT for t in kept),
        "dropped": 1 - len(kept) / len(trajectories),
        **{f"end/{end}": ends[end] for end in End},
        # The names that other ReTool recipes use in dashboards.
        "retool/tool_calls_per_sample": len(uses) / len(kept),
        "retool/tool_success_rate": success,
        "retool/avg_code_length_chars": _mean(code_lengths),
        "reward/exact_match": _mean([t.exact for t in kept]),
        "reward/format_bonus": _mean([t.verdict.answer is not None for t in kept]),
        "reward/guarded": _mean(["guard" in t.reward_terms for t in kept]),
        "reward/overlong": _mean([t.reward_terms.get("overlong", 0.0) for t in kept]),
        "sandbox/timeout_rate": _share(uses, "timeout"),
        "sandbox/oom_rate": _share(uses, "oom"),
        **behaviour(kept, purposes, tokenizer),
    }


def dropped_reasons(trajectories: Sequence[Trajectory]) -> str:
    """The first four different reasons for which trajectories were dropped, in brackets; empty if there are none."""
    found = list(dict.fromkeys(one_line(t.fault) for t in trajectories if t.dropped and t.fault))
    return f" ({'; '.join(found[:4])})" if found else ""


def _share(uses: Sequence[ToolUse], status: str) -> float | None:
    """The share of calls with this status; None if there are no calls."""
    return _mean([use.status == status for use in uses])


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(name: str, values: Sequence[int]) -> dict[str, float]:
    """The 10th and the 90th percentile."""
    low, high = np.percentile(values, (10, 90))
    return {f"{name}_p10": float(low), f"{name}_p90": float(high)}


def describe_failures(numbers: Mapping[str, float | None]) -> str:
    """The failures of the machinery in the numbers of a `summarise`, as text; empty if there are none."""
    counts = {str(end): numbers[f"end/{end}"] for end in INFRASTRUCTURE}
    words = [f"{count} trajectories {end.replace('_', ' ')}" for end, count in counts.items() if count]
    late = numbers["checker_timeouts"]
    return ", ".join(words + ([f"{late} answers not compared in time, which count as wrong"] if late else []))
