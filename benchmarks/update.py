"""Update speed of the miniature: tokens per second of one jitted policy update on packed rows.

    python benchmarks/update.py [trajectories=96] [repeats=5] [group=8] [prompt=128 answer=384] [rl.row_length=1152 ...]

Prints JSON. Only tokens of trajectories count, not padding; `packing` is their share of the rows. Trajectories are the
miniature's demonstrations, or `prompt` random tokens and about `answer` more. Other options, such as rl.row_length,
change config=grpo. With `group` above 1, that many trajectories have the same prompt. Then two forms of the update are
measured in turn: each trajectory with its own copy of the prompt (`apart`), and one copy for all that share a row
(`shared`). `saved` is the share of CPU time that `shared` saves.
"""

import json
import sys
import time
from functools import partial

import arguments
import jax
import numpy as np

from retool_jax.data.arithmetic import demonstration
from retool_jax.learn.optimizer import init_state
from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.learn.step import Outputs, make_step
from retool_jax.mesh import make_mesh
from retool_jax.rl.loss import clipped_loss
from retool_jax.run.load import load
from retool_jax.run.schema import RLRun
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.tokenizer import load_tokenizer


def trajectories(run: RLRun, options: dict[str, int]) -> list[Example]:
    """The examples to learn from; `group` neighbours have the same prompt."""
    tokenizer, rng = load_tokenizer(run.tokenizer), np.random.default_rng(0)
    examples = []
    for index in range(options["trajectories"]):
        if options["answer"]:
            room = run.rl.row_length - options["prompt"]
            length = min(round(options["answer"] * rng.lognormal(-0.18, 0.6)) + 1, room)  # mean `answer`, a long tail
            ids = rng.integers(0, run.model.vocab_size, options["prompt"] + length).tolist()
            sampled = [False] * options["prompt"] + [True] * length
        else:
            tokens = demonstration_ids(tokenizer, demonstration(index, tools=True))
            ids, sampled = list(tokens.ids), list(tokens.sampled)
        prompt_length = sampled.index(True)
        if index % options["group"] == 0:
            prompt = ids[:prompt_length]
        sampled = [False] * len(prompt) + sampled[prompt_length:]
        columns = {"old_logprobs": -1.0, "advantages": (-1.0) ** index}
        examples.append(Example(prompt + ids[prompt_length:], sampled, columns))
    return examples


def main(words: list[str]) -> None:
    known = {"trajectories": 96, "repeats": 5, "group": 1, "prompt": 0, "answer": 0}
    options, keys = arguments.parse_known(words, known)
    run = load(["config=grpo", *keys])
    mesh, examples = make_mesh(run.mesh), trajectories(run, options)
    rows = run.rl.row_length, run.rl.rows_per_micro
    batches = {"apart": pack(examples, *rows)}
    if options["group"] > 1:
        batches["shared"] = pack(examples, *rows, len(batches["apart"].tokens), share_prefixes=True)
    tokens = sum(len(example.ids) for example in examples)
    state = init_state(run.model, run.rl.optimizer, mesh, seed=0)
    update = make_step(Outputs(run.model), partial(clipped_loss, rl=run.rl), run.rl.optimizer, mesh)
    state, _ = jax.block_until_ready(update(state, batches["apart"]))  # compiles
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
    for _ in range(options["repeats"]):
        for name, batch in batches.items():
            wall, cpu = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(update(state, batch))
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))

    def numbers(name: str, batch: Batch) -> dict:
        wall, cpu = np.median(seconds[name], axis=0)
        used = int((batch.segments > 0).any(-1).sum())
        return {
            "rows": used,
            "micro_batches": int(batch.micro_batches),
            "packing": round(tokens / (int(batch.micro_batches) * rows[0] * rows[1]), 3),
            "cpu_s": round(float(cpu), 3),
            "tokens_per_s": round(tokens / wall),
            "tokens_per_cpu_s": round(tokens / cpu),
        }

    results = {name: numbers(name, batch) for name, batch in batches.items()}
    if options["group"] > 1:
        results["saved"] = round(1 - results["shared"]["cpu_s"] / results["apart"]["cpu_s"], 3)
    else:
        results = results["apart"]
    device = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    print(json.dumps({"benchmark": "update", "trajectories": len(examples), "tokens": tokens} | results | device))


if __name__ == "__main__":
    main(sys.argv[1:])
