"""How a policy uses code: the curves of the ReTool paper (arXiv 2504.11536) as numbers of a set of trajectories.

The first of its seven curves, the length of responses, is `response_tokens` in `numbers.py`. docs/behaviour.md says
what each curve shows and what it does not.
"""

from collections import Counter
from collections.abc import Sequence

from retool_jax.evaluation.purposes import FAILED, MOST_NAMES, NAMES, OTHER, UNPARSABLE, classifier_named, purpose_of
from retool_jax.rollout.trajectory import ToolUse, Trajectory
from retool_jax.tokens.grammar import CODE_TOOL
from retool_jax.tokens.tokenizer import Tokenizer


def programs_of(trajectory: Trajectory) -> list[ToolUse]:
    """Its interpreter calls that could be read and were answered, in order and with any status."""
    # Calls that name no tool or cannot be read have no code. Old records do not have the name of the tool.
    return [use for use in trajectory.tool_uses if use.code.strip() and use.tool in (CODE_TOOL, "")]


def code_lines(code: str) -> int:
    """The number of lines of a program that are neither blank nor only a comment."""
    return sum(bool(line) and not line.startswith("#") for line in map(str.strip, code.split("\n")))


def behaviour(
    trajectories: Sequence[Trajectory], purposes: str = "rules", tokenizer: Tokenizer | None = None
) -> dict[str, float | None]:
    """How code is used, over scored trajectories; None for a share or a mean over nothing.

    Args:
        trajectories: at least one, none of them dropped.
        purposes: the classifier of programs (`evaluation.purposes`).
        tokenizer: the policy's. A user's classifier gets the text before a program; without a tokenizer that is empty.

    Raises:
        UserError: the classifier cannot be loaded.
    """
    count = len(trajectories)
    with_code = [(t, found) for t in trajectories if (found := programs_of(t))]
    programs = [(t, use) for t, found in with_code for use in found]
    last = [(t.verdict.correct, found[-1].status == "success") for t, found in with_code]
    return {
        "behaviour/code_ratio": len(with_code) / count,
        "behaviour/code_lines": sum(code_lines(use.code) for _, use in programs) / count,
        "behaviour/correct_codes": sum(use.status == "success" for _, use in programs),
        "behaviour/last_code_pass_right": _mean([passed for right, passed in last if right]),
        "behaviour/last_code_pass_wrong": _mean([passed for right, passed in last if not right]),
        "behaviour/timing": _mean(_relative_starts([(t, found[0]) for t, found in with_code])),
        "behaviour/timing_mean_all": _mean(_relative_starts(programs)),
        **_purpose_shares(programs, purposes, tokenizer),
    }


def _relative_starts(programs: Sequence[tuple[Trajectory, ToolUse]]) -> list[float]:
    """Where programs begin, as shares of their responses' tokens; without programs whose start was not recorded."""
    known = [(t, t.segments[0].stop, use.start) for t, use in programs if use.start < len(t.ids)]
    return [(start - prompt) / t.response_tokens for t, prompt, start in known if start >= prompt]


def _purpose_shares(
    programs: Sequence[tuple[Trajectory, ToolUse]], purposes: str, tokenizer: Tokenizer | None
) -> dict[str, float | None]:
    """The share of programs with each purpose, and the number of different purposes.

    With the rules, all their names are listed. A user's classifier may return any number of names: the most frequent
    are kept, and the rest is counted as `other`.
    """
    classify, rules = classifier_named(purposes), purposes == "rules"
    # Samples of one prompt often contain the same program; it is classified once.
    times_written = Counter((use.code, "" if rules else _context_of(t, use, tokenizer)) for t, use in programs)
    all_counts, counts = Counter(), Counter()
    for (code, context), times in times_written.items():
        all_counts[purpose_of(classify, code, context)] += times
    kept = sorted(all_counts, key=lambda name: (-all_counts[name], name))[: MOST_NAMES - 1]
    for name, times in all_counts.items():
        counts[name if name in kept else OTHER] += times
    names = NAMES if rules else sorted(counts)
    return {
        "behaviour/purposes": len(counts.keys() - {UNPARSABLE, FAILED}),
        **{f"behaviour/purpose/{name}": counts[name] / len(programs) if programs else None for name in names},
    }


def _context_of(trajectory: Trajectory, use: ToolUse, tokenizer: Tokenizer | None) -> str:
    """The text of the prompt and of the response up to a call; empty if it is not known."""
    return tokenizer.decode(trajectory.ids[: use.start]) if tokenizer and use.start >= 0 else ""


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
