"""Measure the sandbox: CPU time, latency and rate of small programs through the HTTP server, and a worker's start.

    python benchmarks/sandbox.py [backends=gvisor,bubblewrap] [calls=300] [clients=8] [slots=2] [restarts=3] [direct=0]

Prints JSON. `cpu_ms` is the CPU time per call of server, workers and programs, without the client; with `direct=1` this
process calls its own pool, and the client counts too. It hardly depends on other load of the machine, so it is the
number to compare. Rates and latencies need an otherwise idle machine (`load`, before and after). `replacement` is a
new worker: seconds until it serves, and until numpy and sympy have answered in it. `targets` has two goals for a
number, `floor` and the harder `stretch`, and which of them it reached. Linux only.
"""

import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import arguments

from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.launch.launchers import LAUNCHERS
from retool_jax.sandbox.launch.procfs import stat_fields

DEFAULTS = {"backends": "gvisor,bubblewrap", "calls": 300, "clients": 8, "slots": 2, "restarts": 3, "direct": 0}
PROGRAMS = {
    "print": ("print(2 + 2)", "4\n"),
    "numpy": ("import numpy as np\nprint(round(np.linalg.det(np.arange(9.0).reshape(3, 3) + np.eye(3)), 6))", "-5.0\n"),
    "sympy": (
        "from sympy import integrate, solve, symbols\nx = symbols('x')\n"
        "print(solve(x**2 - 5*x + 6, x), integrate(x**2, (x, 0, 3)))",
        "[2, 3] 9\n",
    ),
}
WARM_UP = 4
# Pairs of (floor, stretch): CPU milliseconds per call, calls per second and core, p99 / p50 of latency, and seconds.
CPU_MS = {
    "gvisor": {"print": (35, 25), "numpy": (60, 45), "sympy": (140, 110)},
    "bubblewrap": {"print": (4.5, 3.5), "numpy": (7, 5), "sympy": (27, 23)},
}
CALLS_PER_CORE_S = {
    "gvisor": {"print": (28, 36), "sympy": (8, 10)},
    "bubblewrap": {"print": (180, 250), "sympy": (35, 43)},
}
SPREAD = (2.0, 1.2)
REPLACEMENT_S = (2.0, 0.5)

Call = Callable[[str], Awaitable[str]]


def main(words: list[str]) -> None:
    options = arguments.parse(words, DEFAULTS)
    load_before = os.getloadavg()[0]
    backends = {name: asyncio.run(measure(name, options)) for name in options["backends"].split(",")}
    about = {key: options[key] for key in ("calls", "clients", "slots")}
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "load": [load_before, os.getloadavg()[0]]}
    through = "pool" if options["direct"] else "http"
    print(json.dumps({"benchmark": "sandbox", "through": through, **about, **machine, "backends": backends}))


async def measure(backend: str, options: dict) -> dict:
    """Measure one back-end; return its numbers, or why it does not work here."""
    if why := LAUNCHERS[backend].missing(SandboxConfig(backend=(backend,))):
        return {"missing": why}
    opened = through_pool if options["direct"] else through_http
    numbers: dict = {}
    async with opened(backend, options["slots"], options["clients"]) as (calls, root):
        for name, (code, expected) in PROGRAMS.items():
            await drive(calls, code, expected, WARM_UP * options["clients"])
            cpu_began, began = cpu_seconds(root), time.perf_counter()
            latencies = sorted(await drive(calls, code, expected, options["calls"]))
            seconds, cpu_s = time.perf_counter() - began, cpu_seconds(root) - cpu_began
            numbers[name] = summarise(backend, name, options, latencies, seconds, cpu_s)
    ready, warm = zip(*await replacements(backend, options["restarts"]), strict=True)
    numbers["replacement"] = {
        "ready_s": round(statistics.median(ready), 3),
        "warm_s": round(statistics.median(warm), 3),
        "target": grade(statistics.median(warm), *REPLACEMENT_S),
    }
    return numbers


def summarise(backend: str, name: str, options: dict, latencies: list[float], seconds: float, cpu_s: float) -> dict:
    calls = len(latencies)
    p50, p99 = latencies[calls // 2], latencies[min(calls * 99 // 100, calls - 1)]
    per_core = calls / seconds / options["slots"]
    row = {
        "cpu_ms": round(1000 * cpu_s / calls, 2),
        "calls_per_s": round(calls / seconds, 1),
        "p50_ms": round(1000 * p50, 2),
        "p99_ms": round(1000 * p99, 2),
        "p99_over_p50": round(p99 / p50, 2),
    }
    targets = {"p99_over_p50": grade(p99 / p50, *SPREAD)}
    if name in CPU_MS.get(backend, {}):
        targets["cpu_ms"] = grade(row["cpu_ms"], *CPU_MS[backend][name])
    if name in CALLS_PER_CORE_S.get(backend, {}):
        floor, stretch = CALLS_PER_CORE_S[backend][name]
        targets["calls_per_s_and_core"] = grade(-per_core, -floor, -stretch) | {"floor": floor, "stretch": stretch}
    return row | {"targets": targets}


def grade(value: float, floor: float, stretch: float) -> dict:
    """The goal that a value reaches, where less is better."""
    reached = "stretch" if value <= stretch else "floor" if value <= floor else "missed"
    return {"floor": floor, "stretch": stretch, "reached": reached}


async def drive(calls: list[Call], code: str, expected: str, total: int) -> list[float]:
    """Let all clients call until `total` calls are done; return the seconds of each call."""
    latencies: list[float] = []
    left = iter(range(total))

    async def client(call: Call) -> None:
        for _ in left:
            began = time.perf_counter()
            output = await call(code)
            latencies.append(time.perf_counter() - began)
            if output != expected:
                raise RuntimeError(f"{code!r} printed {output!r}, not {expected!r}")

    await asyncio.gather(*map(client, calls))
    return latencies


@asynccontextmanager
async def through_pool(backend: str, slots: int, clients: int):
    async with open_sandbox(SandboxConfig(backend=(backend,), slots=slots)) as box:

        async def call(code: str) -> str:
            return (await box.run(code)).stdout

        yield [call] * clients, os.getpid()


@asynccontextmanager
async def through_http(backend: str, slots: int, clients: int):
    """A server in its own process, and keep-alive connections to it."""
    command = [
        sys.executable,
        "-m",
        "retool_jax.sandbox.server",
        f"backend={backend}",
        f"slots={slots}",
        "port=0",
    ]
    server = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    connections = []
    try:
        line = b""
        while b"serving on" not in line:
            line = await server.stdout.readline()
            if not line:
                raise RuntimeError(f"the server of {backend} did not start")
        port = int(line.rsplit(b":", 1)[1])
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]
        yield [caller(*connection) for connection in connections], server.pid
    finally:
        for _, writer in connections:
            writer.close()
        with suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
        await server.wait()


def caller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Call:
    """A client of /run_code over one connection."""

    async def call(code: str) -> str:
        body = json.dumps({"code": code, "language": "python"}).encode()
        head = f"POST /run_code HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(headers.split("content-length:")[1].split("\r\n")[0])
        answer = json.loads(await reader.readexactly(size))
        return (answer["run_result"] or answer)["stdout"]

    return call


async def replacements(backend: str, count: int) -> list[tuple[float, float]]:
    """For each new worker, seconds from the request until it serves, and until numpy and sympy have also answered."""
    seconds = []
    async with open_sandbox(SandboxConfig(backend=(backend,), slots=1)) as box:
        await asyncio.sleep(3)  # until the spare worker has started
        for _ in range(count):
            began = time.perf_counter()
            member = await box.crew.recruit(box.config.limits.memory_mb)
            ready = time.perf_counter() - began
            for code, expected in PROGRAMS.values():
                result, _ = await member.perform(Request(code))
                if result.stdout != expected:
                    raise RuntimeError(f"a new worker of {backend} printed {result.stdout!r}, not {expected!r}")
            seconds.append((ready, time.perf_counter() - began))
            await member.launched.stop()
    return seconds


def process_tree(root: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat, from the state on, of process `root` and all its descendants, by process id."""
    stats = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            stats[int(name)] = stat_fields(int(name))
    below, found = {root}, {root}
    while below:
        below = {pid for pid, fields in stats.items() if int(fields[1]) in below} - found
        found |= below
    return {pid: stats[pid] for pid in found if pid in stats}


def cpu_seconds(root: int) -> float:
    """CPU time so far of process `root` and its descendants.

    It includes children that have ended, because their time is added to that of the parent that waited for them.
    """
    # user, system, and both of children that were waited for
    ticks = sum(int(field) for stat in process_tree(root).values() for field in stat[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(sys.argv[1:])
