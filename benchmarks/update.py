"""Update speed of the miniature: tokens per second of one jitted policy update on packed rows.

    python benchmarks/update.py [trajectories=96] [repeats=5]

Prints JSON. Tokens are those of trajectories, padding not counted; `packing` is their share of the rows.
"""

import json
import sys
import time
from functools import partial

import jax
import numpy as np

from retool_jax.data.arithmetic import demonstration
from retool_jax.learn.optimizer import init_state
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import Outputs, make_step
from retool_jax.mesh import make_mesh
from retool_jax.rl.loss import clipped_loss
from retool_jax.run.load import load
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.tokenizer import load_tokenizer


def main(words: list[str]) -> None:
    options = {"trajectories": 96, "repeats": 5} | {k: int(v) for k, v in (w.split("=") for w in words)}
    run = load(["config=grpo"])
    mesh = make_mesh(run.mesh)
    tokenizer = load_tokenizer(run.tokenizer)
    examples = []
    for index in range(options["trajectories"]):
        tokens = demonstration_ids(tokenizer, demonstration(index, tools=True))
        examples.append(Example(tokens.ids, tokens.sampled, {"old_logprobs": -1.0, "advantages": (-1.0) ** index}))
    batch = pack(examples, run.rl.row_length, run.rl.rows_per_micro)
    tokens = int((batch.segments > 0).sum())
    state = init_state(run.model, run.rl.optimizer, mesh, seed=0)
    update = make_step(Outputs(run.model), partial(clipped_loss, rl=run.rl), run.rl.optimizer, mesh)
    state, _ = jax.block_until_ready(update(state, batch))  # compiles
    wall, cpu = [], []
    for _ in range(options["repeats"]):
        began, cpu_began = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(update(state, batch))
        wall.append(tokens / (time.perf_counter() - began))
        cpu.append(tokens / (time.process_time() - cpu_began))
    print(
        json.dumps(
            {
                "benchmark": "update",
                "trajectories": len(examples),
                "tokens": tokens,
                "packing": round(tokens / batch.tokens.size, 3),
                "tokens_per_s": round(float(np.median(wall))),
                "tokens_per_cpu_s": round(float(np.median(cpu))),
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
