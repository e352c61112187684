"""The counts of a sandbox, and their text for Prometheus."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from retool_jax.sandbox.types import ToolResult

Family = tuple[str, str, Mapping[str, float]]  # name, kind, and samples by the suffix of the name
BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Histogram:
    """Seconds by bucket; the last bucket is everything above the last bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def samples(self) -> dict[str, float]:
        """Prometheus samples by the suffix of the name: cumulative counts by bound, the sum and the count."""
        bounds = [f"{bound:g}" for bound in BOUNDS_S] + ["+Inf"]
        sums = accumulate(self.counts)
        below = {f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, sums, strict=True)}
        return below | {"_sum": self.total_s, "_count": sum(self.counts)}


@dataclass
class Metrics:
    """Counts since the sandbox was opened."""

    calls: Counter[str] = field(default_factory=Counter)  # results by status
    truncated: int = 0  # results with a truncated stream
    retries: int = 0  # attempts beyond the first
    faults: Counter[str] = field(default_factory=Counter)  # of the machinery, by kind, also if a retry succeeded
    restarts: Counter[str] = field(default_factory=Counter)  # workers that were given up, by reason
    queue_s: Histogram = field(default_factory=Histogram)
    wall_s: Histogram = field(default_factory=Histogram)
    start_s: Histogram = field(default_factory=Histogram)  # from a worker's launch until it serves

    def record(self, result: ToolResult) -> None:
        """Count a result that a caller gets."""
        self.calls[result.status] += 1
        self.truncated += result.stdout_truncated or result.stderr_truncated
        self.retries += max(result.attempts - 1, 0)
        self.queue_s.add(result.queue_s)
        if result.attempts:
            self.wall_s.add(result.wall_s)


def by(counts: Counter, *labels: str) -> dict[str, float]:
    """Samples of counts whose keys are values of one label, or tuples with a value for each label.

    Keys are words of this program and its configuration, so they need no escaping.
    """
    samples = {}
    for key, count in sorted(counts.items()):
        values = key if isinstance(key, tuple) else (key,)
        pairs = ",".join(f'{label}="{value}"' for label, value in zip(labels, values, strict=True))
        samples[f"{{{pairs}}}"] = count
    return samples


def exposition(prefix: str, families: Iterable[Family], gauges: Mapping[str, float]) -> str:
    """Families and gauges in Prometheus' text format 0.0.4; each name begins with the prefix."""
    lines: list[str] = []
    for name, kind, samples in (*families, *((name, "gauge", {"": value}) for name, value in gauges.items())):
        lines.append(f"# TYPE {prefix}_{name} {kind}")
        lines.extend(f"{prefix}_{name}{suffix} {value:.10g}" for suffix, value in samples.items())
    return "\n".join(lines) + "\n"


def prometheus(metrics: Metrics, gauges: Mapping[str, float]) -> str:
    """A sandbox's metrics and gauges as Prometheus text."""
    families = [
        ("calls_total", "counter", by(metrics.calls, "status")),
        ("faults_total", "counter", by(metrics.faults, "kind")),
        ("worker_restarts_total", "counter", by(metrics.restarts, "reason")),
        ("retries_total", "counter", {"": metrics.retries}),
        ("truncated_total", "counter", {"": metrics.truncated}),
        ("queue_seconds", "histogram", metrics.queue_s.samples()),
        ("wall_seconds", "histogram", metrics.wall_s.samples()),
        ("start_seconds", "histogram", metrics.start_s.samples()),
    ]
    return exposition("retool_sandbox", families, gauges)
