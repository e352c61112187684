"""What a verdict is worth: the number that reinforcement learning is given for a trajectory."""

from retool_jax.answers import Verdict


def reward_of(verdict: Verdict) -> float:
    """+1 for a correct answer, -1 for any other (ReTool, arXiv 2504.11536, section 3)."""
    return 1.0 if verdict.correct else -1.0
