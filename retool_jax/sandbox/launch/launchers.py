"""The launchers by name, and what each of them is."""

from typing import Protocol

from retool_jax.sandbox.launch import bubblewrap, gvisor, process
from retool_jax.sandbox.launch.worker import Worker
from retool_jax.sandbox.types import SandboxConfig


class Launcher(Protocol):
    """A module that starts workers."""

    PROMISES: frozenset[str]  # what it keeps programs from: files, network, memory, environment, processes
    COUNTS_CORES: bool  # whether a worker sets itself up for the cores that it finds

    def missing(self, config: SandboxConfig) -> str:
        """Why it cannot work here, and what to do about it; empty if nothing is known to be in its way."""

    async def launch(self, config: SandboxConfig, memory_mb: int) -> Worker:
        """Start a worker for programs of up to `memory_mb`. Raises UserError or OSError."""

    def describe(self, isolation: dict[str, bool]) -> str:
        """One line for people, of what the worker said it was granted."""

    async def sweep_stale(self) -> int:
        """Remove what dead owners left; returns how many workers and folders that were."""


LAUNCHERS: dict[str, Launcher] = {"gvisor": gvisor, "bubblewrap": bubblewrap, "process": process}
