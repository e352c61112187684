"""Measure how cost grows with the work: more trajectories in a rollout, longer rows in an update, more sandbox workers.

    python benchmarks/scaling.py [parts=rollout,update,sandbox] [scale=1.0] [layers=4] [read_late=1] [png=FILE]

- `rollout`: sampled tokens per CPU-second of 64, 256 and 1,024 trajectories of three turns in 192 slots; `read_late` is
  the engine's setting.
- `update`: tokens per CPU-second of 16,384 tokens in rows of 1k, 4k and 16k, one sequence each.
- `sandbox`: calls per second of 1, 2 and 4 workers with as many clients, in the first back-end that works here.

The model is that of `engine_turns.py`. `scale` shrinks the work for a quick test. Prints a table; `png` also draws the
curves (with matplotlib). Token rates are per second of CPU time, so they are those of one core; rates of calls are per
second of real time and need idle cores.
"""

import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import arguments
import jax
import numpy as np
from engine_turns import MODEL, Trajectory, make_engine, tokens
from sandbox import PROGRAMS, drive, through_pool

from retool_jax.engine.scheduler import converse
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import init_state
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import Outputs, make_step
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.rl.config import RLConfig
from retool_jax.rl.loss import clipped_loss
from retool_jax.sandbox import SandboxConfig
from retool_jax.sandbox.launch.launchers import LAUNCHERS

TRAJECTORIES, SLOTS, TURN = (64, 256, 1024), 192, 32
ROWS, TOKENS = (1024, 4096, 16384), 16384
WORKERS, CALLS = (1, 2, 4), 200

Point = tuple[int, float, str]  # amount of work, rate, and a remark


def main(words: list[str]) -> None:
    known = {"parts": "rollout,update,sandbox", "scale": 1.0, "layers": 4, "read_late": 1, "png": ""}
    options = arguments.parse(words, known)
    scale, model = options["scale"], replace(MODEL, num_layers=options["layers"])
    parts = {
        "rollout": ("trajectories", "tokens per CPU-second", rollouts(model, scale, options["read_late"])),
        "update": ("tokens of a row", "tokens per CPU-second", updates(model, scale)),
        "sandbox": ("workers", "calls per second", sandboxes(scale)),
    }
    print("| part | work | rate | |\n| --- | --- | --- | --- |")
    curves = {}
    for name in options["parts"].split(","):
        what, unit, measured = parts[name]
        curves[f"{name}: {unit}", what] = points = []
        for work, rate, remark in measured:
            points.append((work, rate))
            print(f"| {name} | {work} {what} | {rate:.0f} {unit} | {remark} |", flush=True)
    if options["png"]:
        draw(curves, options["png"])


def rollouts(model: ModelConfig, scale: float, read_late: int) -> Iterator[Point]:
    turn, slots = max(round(scale * TURN), 2), max(round(scale * SLOTS), 2)
    engine = make_engine(model, slots=slots, max_length=64 + 3 * turn + 2 * 20, read_late=read_late)

    def run(count: int) -> tuple[float, float]:
        began = time.process_time()
        stats = asyncio.run(converse(engine, [Trajectory(i, 0.0, turn) for i in range(count)]))
        return stats.decoded_tokens / (time.process_time() - began), stats.fill

    run(slots)  # compiles
    for trajectories in [max(round(scale * count), 1) for count in TRAJECTORIES]:
        rate, fill = run(trajectories)
        yield trajectories, rate, f"{fill:.0%} of the slots' steps draw"


def updates(model: ModelConfig, scale: float) -> Iterator[Point]:
    optimizer, mesh = OptimizerConfig(warmup_steps=1), make_mesh(MeshConfig())
    update = make_step(Outputs(model), partial(clipped_loss, rl=RLConfig()), optimizer, mesh)
    for length in ROWS:
        row, rows = round(scale * length), TOKENS // length
        columns = {"old_logprobs": -7.6, "advantages": 1.0}
        batch = pack([Example(tokens(row), np.arange(row) > row // 3, columns)] * rows, row, rows)
        state, seconds = init_state(model, optimizer, mesh, seed=0), 0.0
        for _ in range(2):  # the first one compiles
            began = time.process_time()
            state, _ = jax.block_until_ready(update(state, batch))
            seconds = time.process_time() - began
        yield row, row * rows / seconds, f"{rows} rows"


def sandboxes(scale: float) -> Iterator[Point]:
    backend = next(name for name in ("gvisor", "bubblewrap", "process") if not LAUNCHERS[name].missing(SandboxConfig()))
    calls = max(round(scale * CALLS), 1)

    async def rate(workers: int) -> float:
        async with through_pool(backend, workers, workers) as (clients, _):
            await drive(clients, *PROGRAMS["print"], 4 * workers)
            began = time.perf_counter()
            await drive(clients, *PROGRAMS["print"], calls)
            return calls / (time.perf_counter() - began)

    for workers in WORKERS:
        yield workers, asyncio.run(rate(workers)), backend


def draw(curves: dict[tuple[str, str], list[tuple[int, float]]], path: str) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3), squeeze=False)
    for axis, ((title, what), points) in zip(axes[0], curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.set(title=title, xlabel=what, xscale="log", xticks=[work for work, _ in points])
        axis.set_xticklabels([f"{work}" for work, _ in points])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
