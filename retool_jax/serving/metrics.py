"""What a server counts, in Prometheus' text format."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from retool_jax.engine.conversation import Statistics
from retool_jax.sandbox.host.metrics import Histogram

PREFIX = "retool_serve"


@dataclass
class Metrics:
    """Counts since the server began."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status; 499 where the client went away."""
    ends: Counter[str] = field(default_factory=Counter)
    """Answers by what ended them: stop, length, tool_calls, or fault and gone."""
    tools: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Calls that the server ran, by tool and status."""
    tokens: Counter[str] = field(default_factory=Counter)
    """By kind: prompt, policy, tool."""
    first_s: Histogram = field(default_factory=Histogram)
    """From a request to its first token."""
    answer_s: Histogram = field(default_factory=Histogram)
    """From a request to its end."""
    tool_s: Histogram = field(default_factory=Histogram)
    """Work of a call that the server ran."""
    engine: Statistics = field(default_factory=Statistics)

    def text(self, gauges: Mapping[str, float]) -> str:
        """The text format 0.0.4; `gauges` are present values, by name."""
        lines: list[str] = []

        def family(name: str, kind: str, samples: Mapping[str, float]) -> None:
            lines.append(f"# TYPE {PREFIX}_{name} {kind}")
            lines.extend(f"{PREFIX}_{name}{labels} {value:.10g}" for labels, value in samples.items())

        def by(*labels: str, counts: Counter) -> dict[str, float]:
            rows = {key if isinstance(key, tuple) else (key,): value for key, value in sorted(counts.items())}
            return {f"{{{','.join(map(_label, labels, key))}}}": value for key, value in rows.items()}

        family("requests_total", "counter", by("path", "status", counts=self.requests))
        family("answers_total", "counter", by("end", counts=self.ends))
        family("tool_calls_total", "counter", by("tool", "status", counts=self.tools))
        family("tokens_total", "counter", by("kind", counts=self.tokens))
        for name in ("first_s", "answer_s", "tool_s"):
            family(
                {"first_s": "first_token"}.get(name, name[:-2]) + "_seconds", "histogram", getattr(self, name).samples()
            )
        family("row_steps_total", "counter", {"": self.engine.row_steps})
        family("decoded_tokens_total", "counter", {"": self.engine.decoded_tokens})
        family("decode_seconds_total", "counter", {"": self.engine.decode_s})
        for name, value in (gauges | {"fill": self.engine.fill}).items():
            family(name, "gauge", {"": value})
        return "\n".join(lines) + "\n"


def _label(name: str, value: object) -> str:
    """A label; a tool is called as a config calls it, so its name is no policy's text."""
    return f'{name}="{value}"'
