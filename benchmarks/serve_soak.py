"""Endurance and speed of the HTTP server: hundreds of streams, clients that leave or send nonsense, killed workers.

    python benchmarks/serve_soak.py [init_from=runs/grpo] [streams=200] [seconds=60] [requests=400] [repeats=2] [seed=0]

The server of `config=serve` runs in this process; its clients are in another one and use HTTP. First the same
`requests` questions are answered by the scheduler without a server (`rollout`), and by the server for `streams` streams
at once. Both are done without tools and with the Python tool, in turns, `repeats` times; the best counts. `share` is
the server's tokens/s over those without a server. `cpu_share` is the same for tokens per second of this process's CPU
time (`runs` has all times), which includes neither clients nor sandbox: use it if other programs need the cores. Then,
for `seconds`, every stream sends requests in a loop: some leave in the middle, some send a malformed or too large
request, and every second the outermost process of a sandbox worker is killed.

Prints JSON. Exits with 1 unless every request ended with a status, no stream broke off, and the counts of rows, pages
and places are as before. `backend=NAME` selects the sandbox. Linux only.
"""

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import arguments
import uvicorn
from sandbox_soak import kill_one

from retool_jax.data.arithmetic import exercise
from retool_jax.data.problems import Problem
from retool_jax.engine.scheduler import Service
from retool_jax.rollout.rollout import Sample, rollout
from retool_jax.run.build import engine_of, mesh_of, model_for, resolve, sandbox_config
from retool_jax.run.weights import load_weights
from retool_jax.sandbox.remote.web import listen
from retool_jax.serving.app import build_app
from retool_jax.serving.server import Server
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.toolbox import load_tools

DEFAULTS: dict[str, Any] = {"init_from": "runs/grpo", "streams": 200, "seconds": 60.0, "requests": 400}
DEFAULTS |= {"repeats": 2, "backend": "", "seed": 0, "client": ""}
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
HANGS_S = 120.0  # an answer that takes longer counts as hung
CODE = {"type": "code_interpreter", "container": {"type": "auto"}}
BROKEN = (b"{", b"[]", b'{"messages": "x"}', b"\xff\xfe", b"[" * 20_000, b'{"messages": [{"role": "user"}], "n": -1}')


def question(number: int) -> str:
    return exercise("dev", number).question


def request(number: int, tools: bool) -> dict:
    """A request whose seed makes it the same sample as `number` without a server."""
    body = {"messages": [{"role": "user", "content": question(number)}], "seed": number, "stream": True}
    return body if tools else body | {"tools": []}


# --- the clients, in their own process ---


async def read_stream(session: aiohttp.ClientSession, path: str, data: Any, leave_after: float) -> str:
    """How a stream ended: `done`, an HTTP status, `left`, `error` (reported by an event) or `broken`."""
    async with session.post(path, data=data, headers={"Content-Type": "application/json"}) as response:
        if response.status != 200:
            await response.read()
            return str(response.status)
        text, began = b"", time.monotonic()
        async for piece in response.content.iter_any():
            text += piece
            if time.monotonic() - began > leave_after:
                return "left"
    if not text.endswith(b"data: [DONE]\n\n"):
        return "broken"
    return "error" if b'\ndata: {"error"' in text or b"event: response.failed" in text else "done"


async def end_of(session: aiohttp.ClientSession, path: str, data: Any, leave_after: float = 1e9) -> str:
    """Like `read_stream`, or `hung`, or the name of a client error."""
    try:
        async with asyncio.timeout(HANGS_S):
            return await read_stream(session, path, data, leave_after)
    except TimeoutError:
        return "hung"
    except aiohttp.ClientError as error:
        return type(error).__name__


async def race(session: aiohttp.ClientSession, options: dict, tools: bool) -> dict:
    """Ask all questions once with `streams` streams; return how often each end occurred."""
    numbers, ends = iter(range(options["requests"])), Counter()

    async def stream() -> None:
        for number in numbers:
            ends[await end_of(session, CHAT, json.dumps(request(number, tools)))] += 1

    await asyncio.gather(*(stream() for _ in range(options["streams"])))
    return dict(ends)


async def havoc(session: aiohttp.ClientSession, options: dict) -> dict:
    """Run streams of all kinds for `seconds`; return how often each end of each kind occurred."""
    draw, until = random.Random(options["seed"]), time.monotonic() + options["seconds"]
    ends: dict[str, Counter] = {kind: Counter() for kind in ("chat", "response", "left", "broken", "large")}

    async def stream() -> None:
        while time.monotonic() < until:
            (kind,) = draw.choices(list(ends), [50, 25, 15, 7, 3])
            body, path, leave = request(draw.randrange(100_000), draw.random() < 0.8), CHAT, 1e9
            if kind == "response":
                body, path = {"input": question(body["seed"]), "tools": [CODE], "stream": True}, RESPONSES
            data = json.dumps(body).encode()
            if kind == "left":
                leave = draw.uniform(0, 0.5)
            elif kind == "broken":
                data = draw.choice(BROKEN)
            elif kind == "large":
                data = b'{"messages": "' + b"x" * 1_100_000 + b'"}'
            ends[kind][await end_of(session, path, data, leave)] += 1

    await asyncio.gather(*(stream() for _ in range(options["streams"])))
    return {kind: dict(counts) for kind, counts in ends.items()}


async def clients(options: dict) -> None:
    """Execute the command in each line of stdin, and answer with a line of JSON."""
    async with aiohttp.ClientSession(options["client"], connector=aiohttp.TCPConnector(limit=0)) as session:
        for line in sys.stdin:
            word = line.strip()
            if word == "havoc":
                answer = await havoc(session, options)
            else:
                answer = {} if word == "ready" else await race(session, options, word == "python")
            print(json.dumps(answer), flush=True)


# --- the server, in this process ---


class Soak:
    """A run of `config=serve` and its engine, which is used with and without a server in turn."""

    def __init__(self, options: dict) -> None:
        words = ["config=serve", "serve.port=0", f"init_from={options['init_from']}"]
        run = resolve(words + [f"sandbox.backend=[{options['backend']}]"] * bool(options["backend"]))
        self.tokenizer = load_tokenizer(run.tokenizer)
        self.run = replace(run, model=model_for(run, self.tokenizer))
        self.tools = load_tools(self.run.tools)
        weights = load_weights(self.run, Path(run.init_from))
        self.engine = engine_of(self.run, weights, mesh_of(self.run), self.tokenizer)
        self.options = options

    async def alone(self, tools: bool) -> dict:
        """Answer the questions without a server; return tokens and seconds."""
        messages = [{"role": "user", "content": question(number)} for number in range(self.options["requests"])]
        samples = [Sample(Problem(str(number), (message,), ""), number) for number, message in enumerate(messages)]
        began = clocks()
        box = self.tools if tools else None
        trajectories, _ = await rollout(self.engine, self.tokenizer, box, samples, self.run.rollout)
        tokens = sum(sum(trajectory.sampled) for trajectory in trajectories)
        return {"tokens": tokens} | took(began)

    @asynccontextmanager
    async def served(self) -> AsyncIterator[tuple[Server, Callable[[str], Awaitable[dict]]]]:
        """A server, and a function that sends a command to the clients and returns their answer."""
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(listen(self.run.serve.host, self.run.serve.port))
            service = await stack.enter_async_context(Service(self.engine, self.tools.at_once))
            server = Server(service, self.tokenizer, self.tools, self.run.rollout, self.run.serve, "soak")
            config = uvicorn.Config(build_app(server), log_level="warning", access_log=False, lifespan="off")
            web = uvicorn.Server(config)
            gc.freeze()  # as `run/serve.py` does
            stack.callback(gc.unfreeze)
            serving = asyncio.create_task(web.serve(sockets=[listener]))
            words = [f"{key}={value}" for key, value in self.options.items()]
            words.append(f"client=http://127.0.0.1:{listener.getsockname()[1]}")
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(sys.executable, __file__, *words, stdin=pipe, stdout=pipe)

            async def order(word: str) -> dict:
                process.stdin.write(f"{word}\n".encode())
                return json.loads(await process.stdout.readline())

            try:
                await order("ready")
                yield server, order
            finally:
                process.stdin.close()
                await process.wait()
                web.should_exit = True
                await serving
                server.containers.close()

    async def over_http(self, server: Server, order: Callable[[str], Awaitable[dict]], word: str) -> dict:
        """Answer the questions by the server; return tokens, seconds, and how the streams ended."""
        before, began = server.metrics.tokens["policy"], clocks()
        ends = await order(word)
        return {"tokens": server.metrics.tokens["policy"] - before, "ends": ends} | took(began)

    async def kill(self, draw: random.Random) -> None:
        while True:
            await asyncio.sleep(1)
            kill_one(draw, self.tools.sandbox)


def clocks() -> dict[str, float]:
    """Seconds of real time, of this process's CPU time, and of the CPU time of this thread, which runs all Python."""
    return {"s": time.perf_counter(), "cpu_s": time.process_time(), "thread_s": time.thread_time()}


def took(began: dict[str, float]) -> dict[str, float]:
    return {name: now - began[name] for name, now in clocks().items()}


def ratios(alone: list[dict], served: list[dict]) -> dict:
    """The best numbers with and without a server, and their ratios."""
    both = {"alone": alone, "served": served}
    rate = {name: max(each["tokens"] / each["s"] for each in numbers) for name, numbers in both.items()}
    cpu = {name: max(each["tokens"] / each["cpu_s"] for each in numbers) for name, numbers in both.items()}
    return {
        "tokens": {name: numbers[0]["tokens"] for name, numbers in both.items()},
        "tokens_per_s": {name: round(each) for name, each in rate.items()},
        "tokens_per_cpu_s": {name: round(each) for name, each in cpu.items()},
        "share": round(rate["served"] / rate["alone"], 3),
        "cpu_share": round(cpu["served"] / cpu["alone"], 3),
        "thread_s": {name: round(min(each["thread_s"] for each in numbers), 3) for name, numbers in both.items()},
        "runs": {name: [round(each["cpu_s"], 2) for each in numbers] for name, numbers in both.items()},
        "ends": [each["ends"] for each in served],
    }


async def soak(options: dict) -> dict:
    """Run everything; return the numbers."""
    soak = Soak(options)
    kinds = {"text": False, "python": True}
    alone, served = defaultdict(list), defaultdict(list)
    async with soak.tools.open(sandbox_config(soak.run)):
        soak.engine.warm_up()
        await soak.alone(True)  # compiles and reads everything that is needed later
        before = soak.engine.counts()
        for _ in range(options["repeats"]):
            for kind, tools in kinds.items():
                alone[kind].append(await soak.alone(tools))
            async with soak.served() as (server, order):
                for kind in kinds:
                    served[kind].append(await soak.over_http(server, order, kind))
        speed = {kind: ratios(alone[kind], served[kind]) for kind in kinds}
        async with soak.served() as (server, order):
            killer = asyncio.create_task(soak.kill(random.Random(options["seed"])))
            ends = await order("havoc")
            killer.cancel()
            with suppress(TimeoutError):  # stopped programs take a while to end
                async with asyncio.timeout(HANGS_S):
                    while server.open or any(server.service.gauges().values()):
                        await asyncio.sleep(0.05)
            left = {"requests": server.open} | server.service.gauges()
        after, restarts = soak.engine.counts(), soak.tools.sandbox.metrics.restarts  # without rows kept for later
    good = {"chat": {"done", "error"}, "response": {"done", "error"}, "left": {"left", "done", "error"}}
    good |= {"broken": {"400"}, "large": {"413"}}
    held = all(set(counts) <= good[kind] for kind, counts in ends.items()) and after == before
    held &= not any(left.values())
    held &= all(set(each) == {"done"} for numbers in speed.values() for each in numbers["ends"])
    numbers = {"benchmark": "serve_soak", **options, "speed": speed, "havoc": ends, "restarts": restarts}
    numbers |= {"rows_and_pages": {"before": before, "after": after}, "left": left}
    return numbers | {"load": round(os.getloadavg()[0], 2), "held": held}


def main(words: list[str]) -> None:
    options = arguments.parse(words, DEFAULTS)
    if options["client"]:
        asyncio.run(clients(options))
        return
    numbers = asyncio.run(soak(options))
    print(json.dumps(numbers))
    sys.exit(int(not numbers["held"]))


if __name__ == "__main__":
    main(sys.argv[1:])
