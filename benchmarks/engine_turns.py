"""Measure what is gained by keeping the cache during tool calls: ratios, as JSON.

    python benchmarks/engine_turns.py [scale=1.0] [repeats=3] [layers=4]

- `live_cache`: the prefill work of a trajectory of 8 turns (a prompt of 2,000 tokens; in each turn 1,000 sampled tokens
  and 200 of tool output). Appending only new tokens to the live cache is compared with prefilling the whole context in
  each turn. The token counts are 3,400 and 49,600; `of_ideal` is the measured ratio over the ratio of these.
- `fork`: one prefill and 15 forks for a group of 16, against 16 prefills.
- `fused`: decoding with 32 steps per dispatch against one step per dispatch.
- `rollout`: 4 prompts of 261 tokens for groups of 8, 4 turns of 36 sampled tokens with answers of 29: CPU-seconds of
  the warm-up and of the rollout, and the share of padding among the written positions.
- `tools`: tokens/s and slot utilisation with tools that take 0, 0.1, 1 and 5 s and twice as many trajectories as slots.

`scale` shrinks the lengths and `layers` the model, for a quick test. Pin it to one core (`taskset -c 0`); the ratios
hold elsewhere too, the rates only for that core.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace

import arguments
import jax
import numpy as np

from retool_jax.engine.config import EngineConfig
from retool_jax.engine.conversation import Statistics
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse
from retool_jax.engine.turns import Turn
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params

MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
PROMPT, SAMPLED, TOOL, TURNS = 2000, 1000, 200, 8


def make_engine(model: ModelConfig, **sizes) -> Engine:
    mesh = make_mesh(MeshConfig())
    return Engine(model, EngineConfig(**sizes), init_params(model, jax.random.key(0)), mesh, [], seed=0)


def tokens(count: int) -> list[int]:
    return np.random.default_rng(count).integers(1, MODEL.vocab_size, count).tolist()


def typical(work: Callable[[], float], repeats: int) -> float:
    """The median of the numbers that `work` returns, after one call that compiles."""
    work()
    return float(np.median([work() for _ in range(repeats)]))


def seconds(engine: Engine, work: Callable[[], None]) -> float:
    """Wall-clock seconds of `work`, from an idle device until the device is idle again."""
    engine.wait()
    began = time.perf_counter()
    work()
    engine.wait()
    return time.perf_counter() - began


def live_cache(model: ModelConfig, scale: float, repeats: int) -> dict:
    prompt, sampled, tool = (round(n * scale) for n in (PROMPT, SAMPLED, TOOL))
    length = prompt + TURNS * (sampled + tool)
    # With a small scale these are one size, because compiling several would take long and show nothing.
    reads = {max(round(scale * n), 64) for n in (2048, 4096, 6144, 8192, 10240)}
    engine = make_engine(model, slots=1, max_length=length, decode_steps=1, read_buckets=tuple(sorted(reads)))

    def live() -> float:
        engine.free(0)
        spent = seconds(engine, lambda: engine.append([0], [tokens(prompt)]))
        for _ in range(TURNS - 1):
            engine.append([0], [tokens(sampled)])  # stands for decoding, so it is not timed
            spent += seconds(engine, lambda: engine.append([0], [tokens(tool)]))
        return spent

    def anew() -> float:
        spent = 0.0
        for turn in range(TURNS):
            engine.free(0)
            context = tokens(prompt + turn * (sampled + tool))
            spent += seconds(engine, lambda context=context: engine.append([0], [context]))
        return spent

    live_s, anew_s = (typical(work, repeats) for work in (live, anew))
    counts = prompt + (TURNS - 1) * tool, sum(prompt + turn * (sampled + tool) for turn in range(TURNS))
    ideal = counts[1] / counts[0]
    return {
        "tokens_live": counts[0],
        "tokens_anew": counts[1],
        "live_s": round(live_s, 3),
        "anew_s": round(anew_s, 3),
        "ratio": round(anew_s / live_s, 2),
        "ideal_ratio": round(ideal, 2),
        "of_ideal": round(anew_s / live_s / ideal, 2),
    }


def fork(model: ModelConfig, scale: float, repeats: int) -> dict:
    prompt, group = tokens(round(1000 * scale)), 16
    engine = make_engine(model, slots=group, max_length=len(prompt) + 16, decode_steps=1)
    rows = list(range(group))

    def clear() -> None:
        for row in rows:
            engine.free(row)

    def forked() -> float:
        clear()

        def work() -> None:
            engine.append([0], [prompt])
            engine.fork([0] * (group - 1), rows[1:])

        return seconds(engine, work)

    def prefilled() -> float:
        clear()
        return seconds(engine, lambda: engine.append(rows, [prompt] * group))

    fork_s, prefill_s = (typical(work, repeats) for work in (forked, prefilled))
    numbers = {"group": group, "prompt_tokens": len(prompt), "fork_s": round(fork_s, 4)}
    return numbers | {"prefill_s": round(prefill_s, 4), "ratio": round(prefill_s / fork_s, 2)}


def fused(model: ModelConfig, scale: float, repeats: int) -> dict:
    prompt, drawn = tokens(64), max(round(192 * scale) // 32 * 32, 32)
    engine = make_engine(model, slots=32, max_length=len(prompt) + drawn + 1, decode_steps=32)
    rows = list(range(32))

    def rate(steps: int) -> float:
        for row in rows:
            engine.free(row)
        engine.append(rows, [prompt] * 32)
        for row in rows:
            engine.start(row, Turn(row, drawn + 1))

        def work() -> None:
            for _ in range(drawn // steps):
                engine.read(engine.decode(steps))

        return 32 * drawn / seconds(engine, work)

    rates = {n: typical(lambda n=n: rate(n), repeats) for n in (1, 32)}
    return {f"tokens_per_s_n{n}": round(r) for n, r in rates.items()} | {"ratio": round(rates[32] / rates[1], 2)}


@dataclass
class Trajectory:
    """Turns of a fixed length, with a tool of a fixed latency in between."""

    request: int
    latency_s: float
    turn: int
    turns: int = 3
    answer: int = 20  # tokens
    prompt: list[int] = field(default_factory=lambda: tokens(64))
    temperature: float = 1.0
    cancelled: bool = False

    def turn_budget(self) -> int:
        return self.turn

    def stop_at(self, ids: list[int], seen: int) -> None:
        return None

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int]] | None:
        self.turns -= 1
        return self._tool() if self.turns else None

    def drop(self, reason: str) -> None:
        raise RuntimeError(f"request {self.request} was dropped: {reason}")

    async def _tool(self) -> list[int]:
        await asyncio.sleep(self.latency_s)
        return tokens(self.answer)


def rollout(model: ModelConfig, scale: float, repeats: int) -> dict:
    length, turn, answer = (max(round(n * scale), 8) for n in (261, 36, 29))
    prompts = [tokens(261 + group)[:length] for group in range(4)]
    engine = make_engine(model, slots=32, max_length=max(round(512 * scale), length + 4 * turn + 3 * answer))
    began = time.process_time()
    engine.warm_up()
    numbers = {"warm_up_cpu_s": round(time.process_time() - began, 1)}
    spent = []
    for _ in range(repeats + 1):  # the first one warms up
        began = time.process_time()
        group = [Trajectory(i, 0.0, turn, turns=4, answer=answer, prompt=prompts[i // 8]) for i in range(32)]
        stats = asyncio.run(converse(engine, group))
        spent.append(time.process_time() - began)
    numbers |= {"cpu_s": round(min(spent[1:]), 2), "written": stats.written_tokens, "places": stats.written_places}
    return numbers | {"waste": round(stats.write_waste, 3)}


def tools(model: ModelConfig, scale: float) -> list[dict]:
    slots, turn = 16, max(round(256 * scale), 8)
    length = 64 + 3 * (turn + 20)
    pages = 2 * slots * -(-length // 16)  # enough that rows waiting for a tool keep their pages
    engine = make_engine(model, slots=slots, max_length=length, page_size=16, pages=pages, tool_lag=-1)

    def run(latency: float) -> Statistics:
        return asyncio.run(converse(engine, [Trajectory(i, latency * scale, turn) for i in range(2 * slots)]))

    run(0.0)  # compiles
    found = []
    for latency in (0.0, 0.1, 1.0, 5.0):
        stats = run(latency)
        rate = stats.decoded_tokens / stats.total_s
        line = {"tool_s": latency * scale, "tokens_per_s": round(rate), "fill": round(stats.fill, 3)}
        line["of_no_latency"] = round(rate / found[0]["tokens_per_s"], 3) if found else 1.0
        found.append(line | {"tool_time_hidden": round(stats.tool_hidden, 3)})
    return found


def main(words: list[str]) -> None:
    options = arguments.parse(words, {"scale": 1.0, "repeats": 3, "layers": 4})
    scale, repeats = options["scale"], options["repeats"]
    model = replace(MODEL, num_layers=options["layers"])
    numbers = {
        "benchmark": "engine_turns",
        "scale": scale,
        "live_cache": live_cache(model, scale, repeats),
        "fork": fork(model, scale, repeats),
        "fused": fused(model, scale, repeats),
        "rollout": rollout(model, scale, repeats),
        "tools": tools(model, scale),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
