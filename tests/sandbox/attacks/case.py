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
"""Categories whose cases do not harm a machine even if they succeed."""
ENDED = ("success", "user_error")  # either is fine, as long as nothing was reached
KILLED = ("timeout", "oom", "user_error")
MEMORY_MB = 256
"""Memory of a program unless its case has more; little, because it takes time to fill it."""
BUSY = 4.0
"""Factor by which everything may take longer beside other work on the same cores."""
BUSY_S = 15.0
"""Further seconds that an answer may be late there."""

# The beginning of programs that try many ways out. Numbers of system calls are those of x86-64.
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
    """One attack. Words like `@CANARY@` in its texts are replaced by values of `Host.words`."""

    category: str
    name: str
    code: str
    status: tuple[str, ...] = ("success",)
    """Statuses that the result may have."""
    stdout: str | None = None
    """The whole stdout."""
    contains: tuple[str, ...] = ()
    """Texts that stdout and stderr together contain."""
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
    """Programs of the following calls with their expected stdout; @STDOUT@ is what the attack printed."""
    during: Callable[["Host", Callable[[], bool]], str] | None = None
    """Called in a thread of the host while the program runs, with a function that says whether it still runs; returns
    a complaint or ""."""
    check: Callable[[ToolResult], str] | None = None
    """A further check of the result; returns a complaint or ""."""
    safe: bool = False
    """Whether it does not harm the machine even if it succeeds; always true in the `HARMLESS` categories."""

    @property
    def limit_s(self) -> float:
        """The program's time limit; long enough for a loaded machine if the program should end by itself."""
        return self.wall_s if "timeout" in self.status else BUSY * self.wall_s

    @property
    def harmless(self) -> bool:
        return self.safe or self.category in HARMLESS

    @property
    def sociable(self) -> bool:
        """Whether it can run beside others: it is harmless, and nothing on the host is measured meanwhile."""
        return self.harmless and self.during is None


def probe(category: str, name: str, code: str, **more) -> Case:
    """A program that tries many ways out: none may work, and it must run to its end."""

    def check(result: ToolResult) -> str:
        if not result.stdout.endswith("done\n"):
            return f"the program did not run to its end: {result.stdout[-200:]!r} {result.stderr[-300:]!r}"
        return ""

    more.setdefault("check", check)
    return Case(category, name, f"{PRELUDE}\n{code.strip()}\nprint('done', flush=True)", **more)


def loops(category: str, name: str, code: str, **more) -> Case:
    """A program that must be stopped at its time limit."""
    return Case(category, name, code, **({"status": ("timeout",), "wall_s": 0.4, "within_s": 2.0} | more))


def fill(case: Case, words: Mapping[str, str]) -> Case:
    """The case with the host's names and numbers in the place of its words."""

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
