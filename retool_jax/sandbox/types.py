"""What goes into the sandbox and what comes out of it: limits, configuration, result."""

import os
import reprlib
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

TOKEN_VARIABLE = "RETOOL_SANDBOX_TOKEN"  # the server's bearer token, for it and for its clients
MAX_CODE_BYTES = 2 << 20
MAX_STDIN_BYTES = 8 << 20


class _Shown(reprlib.Repr):
    """Writes a value of any type and size on one short line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python does not print numbers of more than 4300 digits
            return f"a number of {value.bit_length()} bits"


shown = _Shown().repr
KINDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


def is_a(value: object, kind: type) -> bool:
    """Whether a value has a type, as requests and configurations understand it: an int is a float too, a bool is not a
    number."""
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _check(section: str, owner: object, **ranges: tuple[float, float] | None) -> None:
    """Raise UserError unless each named field has its annotated type and lies in its range, if it has one."""
    for name, bounds in ranges.items():
        value, kind = getattr(owner, name), type(owner).__dataclass_fields__[name].type
        if not is_a(value, kind):
            raise UserError(f"{section}.{name} is {shown(value)}; it must be {KINDS[kind]}")
        if bounds and not bounds[0] <= value <= bounds[1]:
            raise UserError(f"{section}.{name} is {shown(value)}; it must lie between {bounds[0]} and {bounds[1]}")


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_s: float = 10.0  # seconds of real time from the start of the program; the wait for a slot does not count
    memory_mb: int = 1024  # MiB of address space per process, on top of what a bare interpreter takes
    output_bytes: int = 65536  # bytes kept of each output stream, half from its head and half from its tail
    raw_output_bytes: int = 8 << 20  # bytes written, over both streams, at which the program is stopped
    processes: int = 64  # processes and threads that may live at once (where the back-end can count them)
    file_mb: int = 64  # MiB per file, and for all files together where the working directory is its own file system

    def __post_init__(self) -> None:
        _check(
            "limits",
            self,
            wall_s=(0.05, 600),
            memory_mb=(16, 1 << 20),
            output_bytes=(256, 8 << 20),
            raw_output_bytes=(256, 1 << 30),
            processes=(1, 4096),
            file_mb=(1, 1 << 20),
        )
        _check("limits", self, raw_output_bytes=(self.output_bytes, 1 << 30))


@dataclass(frozen=True)
class SandboxConfig:
    """Which isolation to use, and how many programs run at once."""

    backend: tuple[str, ...] = ("auto",)
    """Back-ends in order of preference; the first one that passes its self-test is used. There are gvisor, bubblewrap,
    process (unsafe) and remote; auto means gvisor, else bubblewrap, and never anything weaker."""
    slots: int = 0  # programs that run at once; 0: half of the cores. More slots than cores make time limits unfair
    limits: Limits = field(default_factory=Limits)  # limits of a call that names none
    queue_limit: int = 0  # calls that may wait for a slot before further ones are refused; 0 means 64 per slot
    queue_s: float = 600.0  # seconds that a call may wait for a slot
    retries: int = 2  # how often a call is repeated when the machinery, not the program, failed
    show_last_expression: bool = True  # print the value of a program's last expression, as a notebook does
    allowed_modules: tuple[str, ...] = ()  # top-level modules that a program's own imports may name; empty: all
    image: str = ""
    """Folder of the runtime that programs see (`python -m retool_jax.sandbox.image` builds one); empty means the one
    built last, or, where there is none, this Python and its packages, read-only."""
    recycle_calls: int = 2000  # calls after which a worker is replaced
    recycle_s: float = 3600.0  # age at which a worker is replaced
    recycle_memory_mb: int = 600  # MiB that an idle worker may hold before it is replaced; checked every 50 calls
    probe_s: float = 30.0  # idle time after which a worker is tested with a small program; 0: never
    sessions: int = 16  # interpreters that `session()` may keep alive at once; each has a worker of its own
    session_ttl_s: float = 900.0  # idle time after which a session is closed
    urls: tuple[str, ...] = ()  # servers of the `remote` back-end, e.g. http://127.0.0.1:8080
    token: str = field(default="", repr=False, metadata={"secret": True})
    """Bearer token for those servers; empty: the environment variable RETOOL_SANDBOX_TOKEN, which appears in no command
    line."""

    def __post_init__(self) -> None:
        for name in ("backend", "allowed_modules", "urls"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"sandbox.{name} is the text {value!r}; write a list, e.g. [{value}]")
            if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
                raise UserError(f"sandbox.{name} is {shown(value)}; it must be a list of strings")
            object.__setattr__(self, name, tuple(value))  # YAML brings a list
        if not self.backend:
            raise UserError("sandbox.backend is empty; name at least one, e.g. [auto]")
        if self.urls and "remote" not in self.backend:
            raise UserError(
                f"sandbox.urls is {shown(self.urls)}, which only the back-end remote uses; set"
                " sandbox.backend=[remote], or leave it out"
            )
        if not isinstance(self.limits, Limits):
            raise UserError(f"sandbox.limits is {shown(self.limits)}; it must be a Limits")
        _check(
            "sandbox",
            self,
            slots=(0, 1024),
            queue_limit=(0, 1 << 20),
            queue_s=(0.1, 86400),
            retries=(0, 10),
            show_last_expression=None,
            image=None,
            recycle_calls=(1, 1 << 30),
            recycle_s=(1, 1 << 30),
            recycle_memory_mb=(1, 1 << 30),
            probe_s=(0, 86400),
            sessions=(0, 4096),
            session_ttl_s=(0.1, 1 << 30),
            token=None,
        )

    @property
    def slot_count(self) -> int:
        """Programs that run at the same time, with the default of `slots` filled in."""
        return self.slots or max((os.cpu_count() or 1) // 2, 1)

    @property
    def max_waiting(self) -> int:
        """Calls that may wait at once."""
        return self.queue_limit or 64 * self.slot_count


@dataclass(frozen=True)
class ToolResult:
    """How one program ended. All statuses but `infra_error` and `cancelled` are the program's own doing."""

    status: Status
    stdout: str = ""  # kept text of the stream: UTF-8, undecodable bytes replaced, the middle removed if it is too long
    stderr: str = ""
    stdout_bytes: int = 0  # bytes written to the stream, cut or not
    stderr_bytes: int = 0
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    return_code: int | None = None  # exit code; minus the signal's number if one ended the program; None: never ran
    signal: int | None = None  # the signal that ended the program, the sandbox's own SIGKILL included
    wall_s: float = 0.0  # seconds from the program's start to its end
    queue_s: float = 0.0  # seconds from the request to the start of the attempt that counted
    cpu_s: float = 0.0  # CPU seconds of the program and of the children it waited for
    peak_rss_mb: float = 0.0  # largest resident set of the program's main process, MiB
    backend: str = ""
    attempts: int = 0  # how often it was tried; above 1 only after faults of the machinery
    files: dict[str, bytes] = field(default_factory=dict)  # content of the files in `fetch` that were there, by path
    message: str = ""  # why the status is what it is, in words; empty for `success`
