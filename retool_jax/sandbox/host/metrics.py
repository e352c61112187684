"""What a sandbox counts, and its form for Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from retool_jax.sandbox.types import ToolResult

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PREFIX = "retool_sandbox"


@dataclass
class Histogram:
    """Seconds by bucket; the last bucket is everything above the last bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def samples(self) -> dict[str, float]:
        """As Prometheus has them: counts up to each bound, the sum and the count, by what follows the name."""
        bounds = [f"{bound:g}" for bound in BOUNDS_S] + ["+Inf"]
        sums = accumulate(self.counts)
        below = {f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, sums, strict=True)}
        return below | {"_sum": self.total_s, "_count": sum(self.counts)}


@dataclass
class Metrics:
    """Counts since the sandbox was opened."""

    calls: Counter[str] = field(default_factory=Counter)
    """Results by status."""
    truncated: int = 0
    """Results with a stream that was cut."""
    retries: int = 0
    """Attempts beyond the first."""
    faults: Counter[str] = field(default_factory=Counter)
    """Faults of the machinery by kind, whether a retry made up for them or not."""
    restarts: Counter[str] = field(default_factory=Counter)
    """Workers that were given up, by reason."""
    queue_s: Histogram = field(default_factory=Histogram)
    wall_s: Histogram = field(default_factory=Histogram)
    start_s: Histogram = field(default_factory=Histogram)
    """How long workers took from launch to their first frame."""

    def record(self, result: ToolResult) -> None:
        """Count a result that goes back to a caller."""
        self.calls[result.status] += 1
        self.truncated += result.stdout_truncated or result.stderr_truncated
        self.retries += max(result.attempts - 1, 0)
        self.queue_s.add(result.queue_s)
        if result.attempts:
            self.wall_s.add(result.wall_s)


def prometheus(metrics: Metrics, gauges: Mapping[str, float]) -> str:
    """The text format 0.0.4; `gauges` are the present values, by name."""
    lines: list[str] = []

    def family(name: str, kind: str, samples: Mapping[str, float]) -> None:
        lines.append(f"# TYPE {PREFIX}_{name} {kind}")
        lines.extend(f"{PREFIX}_{name}{suffix} {value:.10g}" for suffix, value in samples.items())

    def by(label: str, counts: Counter[str]) -> dict[str, float]:
        return {f'{{{label}="{key}"}}': count for key, count in sorted(counts.items())}

    family("calls_total", "counter", by("status", metrics.calls))
    family("faults_total", "counter", by("kind", metrics.faults))
    family("worker_restarts_total", "counter", by("reason", metrics.restarts))
    family("retries_total", "counter", {"": metrics.retries})
    family("truncated_total", "counter", {"": metrics.truncated})
    for name in ("queue_s", "wall_s", "start_s"):
        family(name.replace("_s", "_seconds"), "histogram", getattr(metrics, name).samples())
    for name, value in gauges.items():
        family(name, "gauge", {"": value})
    return "\n".join(lines) + "\n"
