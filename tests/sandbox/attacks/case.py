"""What an attack is: a program, how it is run, and how its outcome is judged from outside the sandbox."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from retool_jax.sandbox import ToolResult

if TYPE_CHECKING:
    from .host import Host

CATEGORIES = (
    *("files", "network", "processes", "signals", "memory", "time", "output", "encoding", "state", "python"),
    *("protocol", "resources", "transfer", "sessions", "faults"),
)
HARMLESS = frozenset({"time", "output", "encoding", "python", "protocol", "transfer"})
"""Categories whose cases do no harm to a machine where nothing holds them."""
ENDED = ("success", "user_error")  # the program's own affair, as long as nothing was reached
KILLED = ("timeout", "oom", "user_error")
MEMORY_MB = 256
"""What a program may have, unless its case says more; what fills it takes as long as there is of it."""
BUSY = 4.0
"""How many times as long everything may take beside other work on the same cores."""
BUSY_S = 15.0
"""What an answer may be late there, on top."""

# What a program that tries many doors begins with. System calls are by number: those of x86-64.
PRELUDE = r"""
import ctypes, errno, os, sys
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
def syscall(number, *words):
    value = LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(w) if isinstance(w, int) else w for w in words])
    if value < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value
def attempt(what, call, *words):
    try:
        value = call(*words)
    except Exception:
        return None
    print("REACHED", what, repr(value)[:300], flush=True)
    return value
def read(path, size=65536):
    with open(path, "rb") as file:
        return file.read(size)
def write(path, data=b"x"):
    with open(path, "wb", buffering=0) as file:
        return file.write(data)
def others():
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
"""


@dataclass(frozen=True)
class Case:
    """One attack. The words `@CANARY@` and so on in texts stand for what `Host.words` holds."""

    category: str
    name: str
    code: str
    status: tuple[str, ...] = ("success",)
    """Statuses of which the result has one."""
    stdout: str | None = None
    """All of stdout."""
    contains: tuple[str, ...] = ()
    """What stdout and stderr, taken together, contain."""
    signal: int | None = None
    """Signal that ended the program."""
    wall_s: float = 6.0
    memory_mb: int = MEMORY_MB
    limits: Mapping[str, int] = field(default_factory=dict)
    """Other limits."""
    within_s: float = 4.0
    """Seconds beyond `wall_s` after which the caller must have the result."""
    stdin: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    fetch: tuple[str, ...] = ()
    then: tuple[tuple[str, str], ...] = ()
    """Programs of the following calls, each with all that it must print; @STDOUT@ is what the attack printed."""
    during: Callable[["Host", Callable[[], bool]], str] | None = None
    """Runs in a thread of the host while the program does, given a function that says whether it still does; returns
    a complaint or nothing."""
    check: Callable[[ToolResult], str] | None = None
    """A further look at the result; returns a complaint or nothing."""
    safe: bool = False
    """Whether it does no harm to the machine where nothing holds it; so it is in the `HARMLESS` categories."""

    @property
    def limit_s(self) -> float:
        """The program's time limit. One that is to end by itself does not depend on the machine's load."""
        return self.wall_s if "timeout" in self.status else BUSY * self.wall_s

    @property
    def harmless(self) -> bool:
        return self.safe or self.category in HARMLESS

    @property
    def sociable(self) -> bool:
        """Whether it can run beside others: it is harmless, and nobody watches the host meanwhile."""
        return self.harmless and self.during is None


def probe(category: str, name: str, code: str, **more) -> Case:
    """A program that tries many doors: none may open, and it must get to its end."""

    def check(result: ToolResult) -> str:
        if not result.stdout.endswith("done\n"):
            return f"the program did not get to its end: {result.stdout[-200:]!r} {result.stderr[-300:]!r}"
        return ""

    more.setdefault("check", check)
    return Case(category, name, f"{PRELUDE}\n{code.strip()}\nprint('done', flush=True)", **more)


def loops(category: str, name: str, code: str, **more) -> Case:
    """A program that must be stopped by the clock."""
    return Case(category, name, code, **({"status": ("timeout",), "wall_s": 0.4, "within_s": 2.0} | more))


def fill(case: Case, words: Mapping[str, str]) -> Case:
    """The case with the host's names and numbers put in."""

    def put(text: str) -> str:
        for name, value in words.items():
            text = text.replace(f"@{name}@", value)
        return text

    return replace(case, code=put(case.code), then=tuple((put(code), out) for code, out in case.then))


def judge(case: Case, result: ToolResult, elapsed_s: float) -> list[str]:
    """What is wrong with the result; an empty list if nothing is."""
    text = result.stdout + result.stderr
    wrong = []
    if result.status not in case.status:
        wrong.append(f"status {result.status} ({result.message}), not one of {', '.join(case.status)}")
    if case.stdout is not None and result.stdout != case.stdout:
        wrong.append(f"stdout {result.stdout[:200]!r}, not {case.stdout[:200]!r}")
    wrong += [f"neither stdout nor stderr has {part!r}" for part in case.contains if part not in text]
    if case.signal is not None and result.signal != case.signal:
        wrong.append(f"signal {result.signal}, not {case.signal}")
    if "REACHED" in text:
        wrong.append(next(line for line in text.splitlines() if "REACHED" in line)[:300])
    numbers = result.wall_s, result.queue_s, result.cpu_s, result.peak_rss_mb
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0:
        wrong.append(f"absurd numbers: {numbers}")
    if elapsed_s > case.limit_s + case.within_s + BUSY_S:
        wrong.append(f"answered after {elapsed_s:.1f} s, limit {case.limit_s:g} s + {case.within_s + BUSY_S:g} s")
    if case.check is not None and (complaint := case.check(result)):
        wrong.append(complaint)
    if wrong and result.stderr:
        wrong.append(f"stderr ends with {result.stderr[-300:]!r}")
    return wrong
