"""Measure how long tool calls block the event loop: 50 trajectories call tools while a heartbeat task runs.

    python benchmarks/heartbeat.py [backend=bubblewrap] [trajectories=50] [turns=10] [slots=2] [beat_ms=1]

Prints JSON. The heartbeat sleeps for `beat_ms` in a loop; `late_ms` is how much too late it wakes up. Either the loop
was running another callback, or the kernel gave the core to other processes (here, to the programs). `callback_ms` and
`callback_cpu_ms`, the real and CPU time of single callbacks, tell the two apart. `idle_late_ms` is measured while the
loop has nothing else to do. Garbage collection is off, because its pauses depend on all other objects of a process.
"""

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import arguments

from retool_jax.sandbox import SandboxConfig, open_sandbox, tool_text

PROGRAMS = (
    "print(2 + 2)",
    "import numpy as np\nnp.arange(6).reshape(2, 3)",
    "1 / 0",
    "print('x' * 300_000)",
    "import sympy as s\nx = s.symbols('x')\nprint(s.solve(x**2 - 2, x))",
)
TARGET_MS = 20


async def heartbeat(beat_s: float, late_ms: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(beat_s)
        late_ms.append((time.perf_counter() - began - beat_s) * 1000)


@contextmanager
def timed_callbacks(real_ms: list[float], cpu_ms: list[float]) -> Iterator[None]:
    """Record the time of each callback that the event loop runs."""
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began, cpu_began = time.perf_counter(), time.thread_time()
        run(handle)
        cpu_ms.append((time.thread_time() - cpu_began) * 1000)
        real_ms.append((time.perf_counter() - began) * 1000)

    asyncio.Handle._run = timed
    try:
        yield
    finally:
        asyncio.Handle._run = run


def summary(late_ms: list[float]) -> dict:
    ordered = sorted(late_ms)
    at = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    found = {name: round(ordered[int(share * (len(ordered) - 1))], 3) for name, share in at.items()}
    return {"count": len(ordered), **found, "max": round(ordered[-1], 3)}


async def measure(options: dict) -> dict:
    config = SandboxConfig(backend=(options["backend"],), slots=options["slots"])
    idle: list[float] = []
    busy: list[float] = []
    real: list[float] = []
    cpu: list[float] = []
    async with open_sandbox(config) as box:
        for code in PROGRAMS:  # the fork servers start with their first program
            await asyncio.gather(*(box.run(code) for _ in range(2 * options["slots"])))

        async def trajectory(number: int) -> int:
            characters = 0
            for turn in range(options["turns"]):
                result = await box.run(PROGRAMS[(number + turn) % len(PROGRAMS)])
                assert result.status != "infra_error", result.message
                characters += len(tool_text(result, 2000))
            return characters

        gc.disable()
        beat_s = options["beat_ms"] / 1000
        heart = asyncio.create_task(heartbeat(beat_s, idle))
        await asyncio.sleep(3)
        heart.cancel()
        heart = asyncio.create_task(heartbeat(beat_s, busy))
        began = time.perf_counter()
        with timed_callbacks(real, cpu):
            await asyncio.gather(*map(trajectory, range(options["trajectories"])))
        wall_s = time.perf_counter() - began
        heart.cancel()
        gc.enable()
    calls = options["trajectories"] * options["turns"]
    return {
        "benchmark": "heartbeat",
        **options,
        "calls_per_s": round(calls / wall_s, 1),
        "late_ms": summary(busy),
        "callback_ms": summary(real),
        "callback_cpu_ms": summary(cpu),
        "idle_late_ms": summary(idle),
        "target_ms": TARGET_MS,
        "reached": max(busy) <= TARGET_MS,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def main(words: list[str]) -> None:
    known = {"backend": "bubblewrap", "trajectories": 50, "turns": 10, "slots": 2, "beat_ms": 1}
    options = arguments.parse(words, known)
    print(json.dumps(asyncio.run(measure(options))))


if __name__ == "__main__":
    main(sys.argv[1:])
