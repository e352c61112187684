"""Endurance test of the sandbox: thousands of mixed programs, many at once, while workers are killed at random.

    python benchmarks/sandbox_soak.py [backend=auto] [calls=10000] [concurrency=32] [slots=2] [kill=0.01] [seed=0]

Prints JSON and exits with 1 unless every call returned, none was wrong, less than 0.1 % ended as infrastructure errors,
and no process is left. `kill` is the probability per call that the outermost process of some worker is killed.
`owner_mb` is the resident memory of this process after each tenth of the calls.

`service` is the time of a kind of calls from the moment they get a worker to their answer (of the attempt that
counted). `latency` also includes the wait for a slot, as callers see it. Its spread depends more on the mix of calls
than on the sandbox: the queue is first come, first served. If fifteen calls wait for its slot before it, a print waits
a third of a second longer for each time-out of 0.3 s among them, and until a killed worker is replaced. `sandbox.py`
measures the waiting of calls that are all alike. Linux only.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import arguments
from sandbox import process_tree

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox

DEFAULTS = {"backend": "auto", "calls": 10_000, "concurrency": 32, "slots": 2, "kill": 0.01, "seed": 0}
MEMORY_MB = 512
INFRA_SHARE = 0.001


@dataclass(frozen=True)
class Task:
    """A program and its expected result."""

    code: str
    status: str = "success"
    stdout: str | None = ""
    """The whole output; None if it does not matter."""
    stdin: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    fetched: dict[str, bytes] = field(default_factory=dict)
    wall_s: float = 20.0

    def fault(self, result: ToolResult) -> str:
        """What is wrong with the result, or an empty string."""
        if result.status != self.status:
            return f"{result.status} ({result.message}), not {self.status}: {result.stderr[-200:]!r}"
        if self.stdout is not None and result.stdout != self.stdout:
            return f"stdout {result.stdout[:100]!r}, not {self.stdout[:100]!r}"
        return "" if result.files == self.fetched else f"fetched {sorted(result.files)}"


def fork(n: int) -> Task:
    code = f"import os\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        pass\nprint({n})"
    return Task(code, stdout=f"{n}\n")


def copy(n: int) -> Task:
    data = b"%d" % n
    return Task("open('b', 'wb').write(open('a', 'rb').read() * 2)\nNone", files={"a": data}, fetched={"b": data * 2})


def die(n: int) -> Task:
    return Task(f"import os\nprint({n}, flush=True)\nos.kill(os.getpid(), 9)", "user_error", f"{n}\n")


# The number in each program makes its answer unique, so that an answer to another program is noticed.
KINDS: dict[str, tuple[int, Callable[[int], Task]]] = {
    "print": (40, lambda n: Task(f"print({n} * 2)", stdout=f"{2 * n}\n")),
    "loop": (15, lambda n: Task(f"print(sum(i * {n} for i in range(1000)))", stdout=f"{499500 * n}\n")),
    "numpy": (15, lambda n: Task(f"import numpy\nprint(int(numpy.full(9, {n}).sum()))", stdout=f"{9 * n}\n")),
    "sympy": (8, lambda n: Task(f"import sympy\nprint(sympy.Symbol('x') + {n + 1})", stdout=f"x + {n + 1}\n")),
    "error": (6, lambda n: Task(f"print({n})\nraise ValueError({n})", "user_error", f"{n}\n")),
    "input": (5, lambda n: Task("print(input()[::-1])", stdin=f"{n}\n", stdout=f"{str(n)[::-1]}\n")),
    "files": (3, copy),
    "time": (2, lambda n: Task(f"print({n})\nwhile True:\n    pass", "timeout", f"{n}\n", wall_s=0.3)),
    "fork": (2, fork),
    "signal": (2, die),
    "memory": (1, lambda n: Task(f"print({n})\nx = bytearray(1 << 40)", "oom", f"{n}\n")),
    "flood": (1, lambda n: Task("while True:\n    print('x' * 10000)", "output_limit", None)),
}


def descendants() -> int:
    """The number of this process's descendants that are not zombies."""
    states = [fields[0] for pid, fields in process_tree(os.getpid()).items() if pid != os.getpid()]
    return len(states) - states.count("Z")


def kill_one(rng: random.Random, box: Sandbox) -> None:
    """Kill the outermost process of some worker, busy or not."""
    crew = box.crew
    workers = [member.launched.pid for member in (*crew._lent, *crew._ready)]
    if workers:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 1)


async def soak(options: dict) -> dict:
    """Run all calls; return the numbers."""
    rng = random.Random(options["seed"])
    names = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=options["calls"])
    seconds: dict[str, list[float]] = {}
    service: dict[str, list[float]] = {}
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[float] = []
    counts = Counter(kills=0, retried=0, returned=0, wrong=0)
    config = SandboxConfig(
        backend=(options["backend"],),
        slots=options["slots"],
        limits=Limits(memory_mb=MEMORY_MB),
        queue_limit=options["concurrency"],
    )
    began = time.monotonic()
    async with open_sandbox(config) as box:
        numbers = iter(range(options["calls"]))

        async def client() -> None:
            for n in numbers:
                task = KINDS[names[n]][1](n)
                limits = Limits(wall_s=task.wall_s, memory_mb=MEMORY_MB)
                if rng.random() < options["kill"]:
                    counts["kills"] += 1
                    kill_one(rng, box)
                start = time.monotonic()
                result = await box.run(task.code, task.stdin, task.files, tuple(task.fetched), limits)
                took_s = time.monotonic() - start
                seconds.setdefault(names[n], []).append(took_s)
                service.setdefault(names[n], []).append(took_s - result.queue_s)
                statuses[result.status] += 1
                counts["returned"] += 1
                counts["retried"] += result.attempts > 1
                if result.status != "infra_error" and (fault := task.fault(result)):
                    counts["wrong"] += 1
                    wrong.append(f"{names[n]} {n}: {fault}")
                if counts["returned"] % max(options["calls"] // 10, 1) == 0:
                    memory.append(resident_mb())

        await asyncio.gather(*(client() for _ in range(options["concurrency"])))
        backend = box.backend
        took = time.monotonic() - began
    left = descendants()
    infra = statuses["infra_error"] / options["calls"]
    return {
        "benchmark": "sandbox_soak",
        **options,
        "backend": backend,
        **counts,
        "wrong_ones": wrong[:10],
        "infra_share": infra,
        "statuses": statuses,
        "seconds": round(took, 1),
        "calls_per_s": round(options["calls"] / took, 1),
        "latency": {name: spread(values) for name, values in sorted(seconds.items())},
        "service": {name: spread(values) for name, values in sorted(service.items())},
        "owner_mb": memory,
        "processes_left": left,
        "load": round(os.getloadavg()[0], 2),
        "held": counts["returned"] == options["calls"] and not wrong and infra < INFRA_SHARE and not left,
    }


def spread(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    p50, p99 = values[len(values) // 2], values[min(len(values) * 99 // 100, len(values) - 1)]
    return {"calls": len(values), "p50_s": round(p50, 4), "p99_s": round(p99, 4), "p99_over_p50": round(p99 / p50, 2)}


def main(words: list[str]) -> None:
    options = arguments.parse(words, DEFAULTS)
    numbers = asyncio.run(soak(options))
    print(json.dumps(numbers))
    sys.exit(int(not numbers["held"]))


if __name__ == "__main__":
    main(sys.argv[1:])
