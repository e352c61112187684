"""The counts, and that Prometheus can read them."""

import re

from retool_jax.sandbox.host.metrics import Metrics, prometheus
from retool_jax.sandbox.types import ToolResult


def test_counts_and_their_text_form():
    metrics = Metrics()
    metrics.record(ToolResult("success", attempts=1, wall_s=0.02, queue_s=0.001))
    metrics.record(ToolResult("success", attempts=3, wall_s=100.0, queue_s=3.0, stdout_truncated=True))
    metrics.record(ToolResult("rejected"))
    metrics.restarts["age"] += 1
    text = prometheus(metrics, {"slots": 2})
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['retool_sandbox_calls_total{status="success"}'] == "2"
    assert values['retool_sandbox_calls_total{status="rejected"}'] == "1"
    assert (values["retool_sandbox_retries_total"], values["retool_sandbox_truncated_total"]) == ("2", "1")
    assert values['retool_sandbox_worker_restarts_total{reason="age"}'] == "1"
    assert values['retool_sandbox_wall_seconds_bucket{le="0.025"}'] == "1"
    assert values['retool_sandbox_wall_seconds_bucket{le="60"}'] == "1"
    assert values['retool_sandbox_wall_seconds_bucket{le="+Inf"}'] == values["retool_sandbox_wall_seconds_count"] == "2"
    assert values["retool_sandbox_wall_seconds_sum"] == "100.02"
    assert values["retool_sandbox_queue_seconds_count"] == "3"
    assert values["retool_sandbox_slots"] == "2"
    sample = r'[a-z_]+(\{[a-z]+="[^"]*"\})? [-+0-9.e]+'
    assert all(line.startswith("# TYPE ") or re.fullmatch(sample, line) for line in text.splitlines())
    assert text.endswith("\n")
