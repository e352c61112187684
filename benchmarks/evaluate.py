"""Compare the CPU time per sample of an evaluation and of training's rollouts, on the same slots and problems.

    python benchmarks/evaluate.py [init_from=runs/grpo] [problems=256] [samples=8] [repeats=3] [key=value ...]

Four ways sample `problems` x `samples` trajectories of the miniature with the same requests, temperatures and tools:

- `evaluate` samples them as a stream, writes every record and computes the result.
- `rollout` submits all at once, scores them and computes the metrics that training logs.
- `steps` does the same with as many at a time as there are slots, like a step of config=grpo.
- `kept` also writes them, like rl.save_rollouts=true.

The ways take turns. Prints JSON: medians of this process's CPU-seconds per sample. The sandbox's workers are separate
processes, whose work is the same in all ways and is not counted. Other key=value words go to the run.
"""

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import arguments
import jax
import numpy as np

from retool_jax.answers import workers
from retool_jax.evaluation.measure import draw
from retool_jax.evaluation.numbers import summarise
from retool_jax.evaluation.store import Store
from retool_jax.metrics import Progress
from retool_jax.rl.replay import write_rollouts
from retool_jax.rollout.rollout import rollout, score
from retool_jax.run.build import engine_of, mesh_of, model_for, problems_to_evaluate, resolve, sandbox_config
from retool_jax.run.evaluate import SampleRecorder, result_of, sample_keys, sample_of
from retool_jax.run.weights import load_weights
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.toolbox import load_tools


async def measure(words: list[str], repeats: int) -> dict:
    run = resolve(["config=eval", *words])
    tokenizer = load_tokenizer(run.tokenizer)
    run = replace(run, model=model_for(run, tokenizer))
    tools, mesh = load_tools(run.tools), mesh_of(run)
    problems = problems_to_evaluate(run, tokenizer, tools)
    engine = engine_of(run, load_weights(run, Path(run.init_from)), mesh, tokenizer)
    engine.warm_up()
    workers.pool.start()
    every = sample_keys(len(problems), run.evaluation.samples)
    samples = [sample_of(run, problems, *key) for key in every]
    identity = {"set": "arithmetic:test", "problems": "", "weights": {"step": None}}

    async def evaluated() -> list:
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store, Progress("", len(every)) as bar:
            bar.say = lambda text: None
            recorder = SampleRecorder(tokenizer, store, every, len(every), 0.1, identity, bar)
            statistics = await draw(engine, tokenizer, tools, iter(samples), run.rollout, recorder, stream=True)
            result = result_of(run, problems, store, identity, tokenizer)
        return [result["numbers"]["accuracy"]["value"], statistics.fill]

    async def rolled_out(together: int, folder: Path | None = None) -> list:
        right, fills = 0, []
        for at in range(0, len(samples), together):
            drawn, statistics = await rollout(engine, tokenizer, tools, samples[at : at + together], run.rollout)
            await asyncio.to_thread(score, tokenizer, drawn)
            summarise(drawn, 1.0, run.evaluation.purposes, tokenizer)
            if folder:
                write_rollouts(folder / f"{at}.jsonl", drawn, run.evaluation.samples, tokenizer)
            right += sum(t.verdict.correct for t in drawn)
            fills.append(statistics.fill)
        return [right / len(samples), float(np.mean(fills))]

    async def kept() -> list:
        with tempfile.TemporaryDirectory() as folder:
            return await rolled_out(run.engine.slots, Path(folder))

    ways = {
        "evaluate": evaluated,
        "rollout": lambda: rolled_out(len(samples)),
        "steps": lambda: rolled_out(run.engine.slots),
        "kept": kept,
    }
    found: dict[str, list] = {name: [] for name in ways}
    async with tools.open(sandbox_config(run)):
        for repeat in range(repeats + 1):  # the first one warms up
            for name, work in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                accuracy, fill = await work()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if repeat:
                    found[name].append((cpu / len(every), wall / len(every), accuracy, fill))
    columns = ("cpu_s", "wall_s", "accuracy", "fill")
    medians = {name: np.median(values, axis=0).round(6).tolist() for name, values in found.items()}
    rows = {name: dict(zip(columns, values, strict=True)) for name, values in medians.items()}
    ratios = {name: round(rows["evaluate"]["cpu_s"] / rows[name]["cpu_s"], 3) for name in ways if name != "evaluate"}
    return {"samples": len(every), **rows, "ratios": ratios}


def main(words: list[str]) -> None:
    known = {"init_from": "runs/grpo", "problems": 256, "samples": 8, "repeats": 3}
    options, others = arguments.parse_known(words, known)
    settings = [f"init_from={options['init_from']}"]
    settings += [f"evaluation.{key}={options[key]}" for key in ("problems", "samples")]
    numbers = asyncio.run(measure([*settings, *others], options["repeats"]))
    print(json.dumps({"benchmark": "evaluate", **numbers, "jax": jax.__version__}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
