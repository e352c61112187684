"""The speed metrics of a step."""

import pytest

from retool_jax.data.problems import Problem
from retool_jax.engine.conversation import Statistics
from retool_jax.rl.summary import performance
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory


def test_the_wait_for_a_place_is_that_of_calls_that_ran():
    """Invalid calls did not wait in a queue, and for lost ones the time is unknown."""

    def having(end: End, **waits: float) -> Trajectory:
        uses = [ToolUse(0, "print(6)", status, "6", queue_s=wait) for status, wait in waits.items()]
        return Trajectory("p/0", Problem("p", (), "6"), tool_uses=uses, end=end)

    speed = Statistics(total_s=1.0)
    ran = having(End.ANSWERED, success=0.5, timeout=0.25, invalid_call=0.0, rejected=0.0)
    lost = having(End.SANDBOX_LOST, infra_error=0.0, success=9.0)
    assert performance(speed, [ran, lost])["perf/queue_s_mean"] == pytest.approx(0.375)
    assert performance(speed, [lost])["perf/queue_s_mean"] is None
