"""Peak memory of log-probs, entropy and their gradient with a large vocabulary: in chunks against all logits at once.

    python benchmarks/head.py [vocabulary=152064] [length=4096] [hidden=64] [chunk=512]

Prints JSON. Each form runs in its own process: `peak_mib` is how much its resident memory rose during the call,
`compiled_mib` the compiler's count of temporaries. `ratio` is chunked over plain.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import arguments

MIB = 2**20


def resident() -> int:
    """Bytes of this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(options: dict[str, int], chunk: int) -> dict[str, float]:
    """Compute value and gradient once, in this process; with chunk 0 in the plain form."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from retool_jax.models.config import ModelConfig
    from retool_jax.models.decoder import init_params, logits
    from retool_jax.models.head import given_logprobs

    model = ModelConfig(
        vocab_size=options["vocabulary"],
        hidden_size=options["hidden"],
        intermediate_size=8,
        head_chunk=chunk or options["length"],
    )
    params = jax.block_until_ready(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, options["length"], options["hidden"])), jnp.float32)
    targets = jnp.asarray(rng.integers(0, options["vocabulary"], (1, options["length"])), jnp.int32)

    def loss(weight: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        if chunk:
            logprobs, entropy = given_logprobs(model, {"embedding": weight}, hidden, targets, 0.7)
        else:
            every = jax.nn.log_softmax(logits(model, {"embedding": weight}, hidden) / 0.7, axis=-1)
            logprobs = jnp.take_along_axis(every, targets[..., None], axis=-1)
            entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        return logprobs.mean(), entropy.mean()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(params["embedding"], hidden).compile()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    (value, entropy), gradients = jax.block_until_ready(compiled(params["embedding"], hidden))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(gradients)]
    return {
        "peak_mib": round((peak - before) / MIB, 1),
        "compiled_mib": round(compiled.memory_analysis().temp_size_in_bytes / MIB, 1),
        "seconds": round(seconds, 2),
        "numbers": [float(value), float(entropy), *norms],
    }


def main(words: list[str]) -> None:
    known = {"vocabulary": 152_064, "length": 4096, "hidden": 64, "chunk": 512, "only": -1}
    options = arguments.parse(words, known)
    if options["only"] >= 0:
        print(json.dumps(measure(options, options["only"])))
        return
    results = {}
    for name, chunk in (("plain", 0), ("chunked", options["chunk"])):
        command = [sys.executable, __file__, *words, f"only={chunk}"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(run.stdout)
    plain, chunked = (results[name].pop("numbers") for name in ("plain", "chunked"))
    print(
        json.dumps(
            {
                "benchmark": "head",
                **{key: options[key] for key in ("vocabulary", "length", "hidden", "chunk")},
                **results,
                "ratio": round(results["chunked"]["peak_mib"] / results["plain"]["peak_mib"], 4),
                "compiled_ratio": round(results["chunked"]["compiled_mib"] / results["plain"]["compiled_mib"], 4),
                "largest_difference": max(abs(x - y) / abs(y) for x, y in zip(chunked, plain, strict=True)),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
