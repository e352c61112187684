"""Decode speed of the miniature: tokens per second of the engine, with every row live and no tools.

    python benchmarks/decode.py [slots=192] [length=64] [repeats=5]

Prints JSON. `tokens_per_s` uses wall-clock time. `tokens_per_cpu_s` uses the process's CPU time, which depends less on
other load of the machine, so it is the number to compare.
"""

import json
import sys
import time

import arguments
import jax
import numpy as np

from retool_jax.engine.engine import Engine, Turn
from retool_jax.learn.optimizer import init_state
from retool_jax.mesh import make_mesh
from retool_jax.run.load import load
from retool_jax.tokens.tokenizer import load_tokenizer


def main(words: list[str]) -> None:
    options = arguments.parse(words, {"slots": 192, "length": 64, "repeats": 5})
    slots, length = options["slots"], options["length"]
    run = load(["config=grpo", f"engine.slots={slots}"])
    mesh = make_mesh(run.mesh)
    tokenizer = load_tokenizer(run.tokenizer)
    params = init_state(run.model, run.rl.optimizer, mesh, seed=0).params
    # Without stop ids every row decodes to the end, so the work does not depend on the weights.
    engine = Engine(run.model, run.engine, params, mesh, [], seed=0)
    prompt = tokenizer.encode("What is 123 times 456?")

    def decode_all() -> int:
        engine.clear()
        engine.append([0], [prompt])
        engine.fork([0] * (slots - 1), list(range(1, slots)))
        for row in range(slots):
            engine.start(row, Turn(row, length))
        dispatches = -(-length // engine.config.decode_steps)
        under_way = [engine.decode()]
        drawn_tokens = 0
        while under_way:
            if dispatches > 1:  # dispatch the next steps before the results of the last ones are read
                under_way.append(engine.decode())
                dispatches -= 1
            drawn_tokens += int(engine.read(under_way.pop(0)).counts.sum())
        return drawn_tokens

    decode_all()  # compiles
    wall, cpu = [], []
    for _ in range(options["repeats"]):
        began, cpu_began = time.perf_counter(), time.process_time()
        tokens = decode_all()
        wall.append(tokens / (time.perf_counter() - began))
        cpu.append(tokens / (time.process_time() - cpu_began))
    print(
        json.dumps(
            {
                "benchmark": "decode",
                "slots": slots,
                "tokens_per_row": tokens // slots,
                "tokens_per_s": round(float(np.median(wall))),
                "tokens_per_cpu_s": round(float(np.median(cpu))),
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
