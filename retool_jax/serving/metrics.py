"""A server's counters and histograms, in Prometheus' text format."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from retool_jax.engine.conversation import Statistics
from retool_jax.sandbox.host.metrics import Histogram, by, exposition


@dataclass
class Metrics:
    """Counts since the server started."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path and status; 499: the client went away
    ends: Counter[str] = field(default_factory=Counter)  # answers by their end: stop, length, tool_calls, fault, gone
    tools: Counter[tuple[str, str]] = field(default_factory=Counter)  # calls that the server ran, by tool and status
    tokens: Counter[str] = field(default_factory=Counter)  # by kind: prompt, policy, tool
    first_s: Histogram = field(default_factory=Histogram)  # from a request to its first token
    answer_s: Histogram = field(default_factory=Histogram)  # from a request to its end
    tool_s: Histogram = field(default_factory=Histogram)  # work of a call that the server ran
    engine: Statistics = field(default_factory=Statistics)

    def text(self, gauges: Mapping[str, float]) -> str:
        """All counts, and the current values `gauges` by name."""
        families = [
            ("requests_total", "counter", by(self.requests, "path", "status")),
            ("answers_total", "counter", by(self.ends, "end")),
            ("tool_calls_total", "counter", by(self.tools, "tool", "status")),
            ("tokens_total", "counter", by(self.tokens, "kind")),
            ("first_token_seconds", "histogram", self.first_s.samples()),
            ("answer_seconds", "histogram", self.answer_s.samples()),
            ("tool_seconds", "histogram", self.tool_s.samples()),
            ("row_steps_total", "counter", {"": self.engine.row_steps}),
            ("decoded_tokens_total", "counter", {"": self.engine.decoded_tokens}),
            ("decode_seconds_total", "counter", {"": self.engine.decode_s}),
        ]
        return exposition("retool_serve", families, {**gauges, "fill": self.engine.fill})
