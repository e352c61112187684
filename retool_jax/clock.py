"""A run's wall-clock time by part."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

WAITED = "/retool_jax/compile/waited_duration"
_COMPILE_EVENTS = (
    WAITED,
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
AHEAD = "compile-ahead"  # the name of threads that compile in the background


class Clock:
    """Seconds by part of the run. Compilation is a part of its own, inside or outside of the other parts.

    Of compilation in background threads only the time that another thread waits for it counts (`record_compile_wait`).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the block's time, without compilation, to `name`. Parts do not nest."""
        compiled, began = self.seconds.get("compile", 0.0), time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began - (self.seconds.get("compile", 0.0) - compiled))

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration: float, **_: object) -> None:
        if event in _COMPILE_EVENTS and not threading.current_thread().name.startswith(AHEAD):
            self.add("compile", duration)


def record_compile_wait(seconds: float) -> None:
    """Record that this thread has waited this long for a program that another one compiles."""
    jax.monitoring.record_event_duration_secs(WAITED, seconds)
