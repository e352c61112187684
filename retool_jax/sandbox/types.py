"""What goes into the sandbox and what comes out of it: limits, configuration, result."""

from dataclasses import dataclass, field
from typing import Literal

from retool_jax.errors import UserError

Status = Literal[
    "success",  # the program ended with exit code 0
    "user_error",  # it raised, exited with another code, or died of a signal
    "timeout",  # it was still running at `Limits.wall_s`
    "oom",  # it ran into `Limits.memory_mb`
    "output_limit",  # it wrote more than `Limits.raw_output_bytes`
    "rejected",  # it was never run: the request itself is out of bounds
    "infra_error",  # the machinery failed; says nothing about the program
    "cancelled",  # the sandbox was closed before the program ended
]

MAX_CODE_BYTES = 2 << 20
MAX_STDIN_BYTES = 8 << 20


def _check_range(owner: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{owner}.{name} is {value}; it must lie between {low} and {high}")


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_s: float = 10.0
    """Seconds of real time, counted from the start of the program (waiting for a slot is free)."""
    memory_mb: int = 1024
    """MiB of address space per process, on top of what a bare interpreter takes."""
    output_bytes: int = 65536
    """Bytes kept of each output stream, half from its head and half from its tail."""
    raw_output_bytes: int = 8 << 20
    """Bytes written, over both streams, at which the program is stopped."""
    processes: int = 64
    """Processes and threads that may live at once (where the back-end can count them)."""
    file_mb: int = 64
    """MiB per file, and in all where the working directory is a file system of its own."""

    def __post_init__(self) -> None:
        _check_range("limits", "wall_s", self.wall_s, 0.05, 600)
        _check_range("limits", "memory_mb", self.memory_mb, 16, 1 << 20)
        _check_range("limits", "output_bytes", self.output_bytes, 256, 8 << 20)
        _check_range("limits", "raw_output_bytes", self.raw_output_bytes, self.output_bytes, 1 << 30)
        _check_range("limits", "processes", self.processes, 1, 4096)
        _check_range("limits", "file_mb", self.file_mb, 1, 1 << 20)


@dataclass(frozen=True)
class SandboxConfig:
    """Which isolation to use, and how many programs run at once."""

    backend: tuple[str, ...] = ("process",)
    """Back-ends in order of preference; the first that passes its self-test is used."""
    slots: int = 2
    """Programs that run at the same time; more than the machine's cores only makes time limits unfair."""
    limits: Limits = field(default_factory=Limits)
    """Limits of a call that brings none of its own."""
    queue_limit: int = 0
    """Calls that may wait for a slot before further ones are refused; 0 means 64 per slot."""
    retries: int = 2
    """How often a call is repeated when the machinery, not the program, failed."""
    show_last_expression: bool = True
    """Print the value of a program's last expression, as a notebook does."""

    def __post_init__(self) -> None:
        if isinstance(self.backend, str):
            raise UserError(f"sandbox.backend is the text {self.backend!r}; write a list, e.g. [{self.backend}]")
        object.__setattr__(self, "backend", tuple(self.backend))  # YAML brings a list
        if not self.backend:
            raise UserError("sandbox.backend is empty; name at least one, e.g. [process]")
        _check_range("sandbox", "slots", self.slots, 1, 1024)
        _check_range("sandbox", "queue_limit", self.queue_limit, 0, 1 << 20)
        _check_range("sandbox", "retries", self.retries, 0, 10)

    @property
    def max_waiting(self) -> int:
        """Calls that may wait at once."""
        return self.queue_limit or 64 * self.slots


@dataclass(frozen=True)
class ToolResult:
    """How one program ended. Only `infra_error` and `cancelled` are not the program's own doing."""

    status: Status
    stdout: str = ""
    """Text kept of the stream: UTF-8, undecodable bytes replaced, the middle cut out if it was too long."""
    stderr: str = ""
    stdout_bytes: int = 0
    """Bytes written to the stream, cut or not."""
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    return_code: int | None = None
    """Exit code; minus the signal's number if one ended the program; None if it never ran."""
    signal: int | None = None
    """The signal that ended the program, the sandbox's own SIGKILL included."""
    wall_s: float = 0.0
    """Seconds from the program's start to its end."""
    queue_s: float = 0.0
    """Seconds from the request to the start of the attempt that counted."""
    cpu_s: float = 0.0
    """CPU seconds of the program and of the children it waited for."""
    peak_rss_mb: float = 0.0
    """Largest resident set of the program's main process, MiB."""
    backend: str = ""
    attempts: int = 0
    """How often it was tried; above 1 only after faults of the machinery."""
    message: str = ""
    """Why the status is what it is, in words; empty for `success`."""
