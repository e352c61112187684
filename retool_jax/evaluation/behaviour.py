"""How a policy uses code: the curves of the ReTool paper (arXiv 2504.11536), as numbers of a set of trajectories.

The first of its seven, the length of responses, is `response_tokens` of `numbers.py`. What each shows and what it does
not is in docs/behaviour.md.
"""

from collections import Counter
from collections.abc import Sequence

from retool_jax.evaluation.purposes import FAILED, MOST_NAMES, NAMES, OTHER, UNPARSABLE, asked, classifier_named
from retool_jax.rollout.trajectory import ToolUse, Trajectory
from retool_jax.tokens.grammar import CODE_TOOL
from retool_jax.tokens.tokenizer import Tokenizer


def programs_of(trajectory: Trajectory) -> list[ToolUse]:
    """Its calls of the interpreter that could be read and were answered, in order, however they ended."""
    # Calls that name no tool or could not be read have no code, and records older than the name of a tool have no name.
    return [use for use in trajectory.tool_uses if use.code.strip() and use.tool in (CODE_TOOL, "")]


def code_lines(code: str) -> int:
    """Lines of a program, without those that are blank and those that hold nothing but a comment."""
    return sum(bool(line) and not line.startswith("#") for line in map(str.strip, code.split("\n")))


def behaviour(
    trajectories: Sequence[Trajectory], purposes: str = "rules", tokenizer: Tokenizer | None = None
) -> dict[str, float | None]:
    """How code is used, over scored trajectories; None for a share or a mean of nothing.

    Args:
        trajectories: at least one, none of them dropped.
        purposes: who says what a program is for (`evaluation.purposes`).
        tokenizer: of the policy, to show a classifier of one's own what stands before a program; without it, nothing.

    Raises:
        UserError: that classifier cannot be loaded.
    """
    count = len(trajectories)
    coded = [(t, programs) for t in trajectories if (programs := programs_of(t))]
    written = [(t, use) for t, programs in coded for use in programs]
    last = [(t.verdict.correct, programs[-1].status == "success") for t, programs in coded]
    return {
        "behaviour/code_ratio": len(coded) / count,
        "behaviour/code_lines": sum(code_lines(use.code) for _, use in written) / count,
        "behaviour/correct_codes": sum(use.status == "success" for _, use in written),
        "behaviour/last_code_pass_right": _mean([passed for right, passed in last if right]),
        "behaviour/last_code_pass_wrong": _mean([passed for right, passed in last if not right]),
        "behaviour/timing": _mean(_places([(t, programs[0]) for t, programs in coded])),
        "behaviour/timing_mean_all": _mean(_places(written)),
        **_purposes(written, purposes, tokenizer),
    }


def _places(written: Sequence[tuple[Trajectory, ToolUse]]) -> list[float]:
    """Where programs begin, as shares of their responses' lengths in tokens; without those that nobody noted."""
    known = [(t, t.segments[0].stop, use.start) for t, use in written if use.start < len(t.ids)]
    return [(start - prompt) / t.response_tokens for t, prompt, start in known if start >= prompt]


def _purposes(
    written: Sequence[tuple[Trajectory, ToolUse]], purposes: str, tokenizer: Tokenizer | None
) -> dict[str, float | None]:
    """The share of programs with each purpose, and how many purposes there are.

    By the rules all their names are there. A classifier of one's own may give names without end: the most frequent are
    kept and others are `other`.
    """
    classify, rules = classifier_named(purposes), purposes == "rules"
    # Samples of a prompt often write the same program, which is looked at once.
    programs = Counter((use.code, "" if rules else _before(t, use, tokenizer)) for t, use in written)
    said, counts = Counter(), Counter()
    for (code, context), times in programs.items():
        said[asked(classify, code, context)] += times
    kept = sorted(said, key=lambda name: (-said[name], name))[: MOST_NAMES - 1]
    for name, times in said.items():
        counts[name if name in kept else OTHER] += times
    names = NAMES if rules else sorted(counts)
    return {
        "behaviour/purposes": len(counts.keys() - {UNPARSABLE, FAILED}),
        **{f"behaviour/purpose/{name}": counts[name] / len(written) if written else None for name in names},
    }


def _before(trajectory: Trajectory, use: ToolUse, tokenizer: Tokenizer | None) -> str:
    """The prompt and all of the response that stands before a call; empty where that cannot be known."""
    return tokenizer.decode(trajectory.ids[: use.start]) if tokenizer and use.start >= 0 else ""


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
