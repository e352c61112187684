"""The launchers by name, and their interface."""

from typing import Protocol

from retool_jax.sandbox.launch import bubblewrap, gvisor, process
from retool_jax.sandbox.launch.worker import Worker
from retool_jax.sandbox.types import SandboxConfig


class Launcher(Protocol):
    """A module that starts workers."""

    PROMISES: frozenset[str]  # what it protects: files, network, memory, environment, processes
    COUNTS_CORES: bool  # whether a worker configures itself for the cores that it finds at its start

    def missing(self, config: SandboxConfig) -> str:
        """Why it cannot work here, and what to do; empty if nothing is known to prevent it."""

    async def launch(self, config: SandboxConfig, memory_mb: int) -> Worker:
        """Start a worker for programs of up to `memory_mb`. Raises UserError or OSError."""

    def describe(self, isolation: dict[str, bool]) -> str:
        """One line for people about what the worker was granted."""

    async def sweep_stale(self) -> int:
        """Remove what dead owners left; returns the number of workers and folders."""


LAUNCHERS: dict[str, Launcher] = {"gvisor": gvisor, "bubblewrap": bubblewrap, "process": process}
