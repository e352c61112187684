"""Compare the engine's log-probabilities of its samples with the trainer's, in several number formats.

    python benchmarks/mismatch.py [init_from=FOLDER] [rows=32] [length=192] [layers=4] [width=256]

Uses random weights of a small Qwen2, or those of a run or a Hugging Face folder. Each row of the engine samples
`length` ids at temperature 1 after a prompt; then the trainer's forward pass scores the same ids. Prints JSON: mean,
standard deviation, 99th percentile and maximum of |difference| per token, the estimator k3 of the KL divergence, and
the effective sample size as a share, for fp32, for bf16, and for bf16 with the head's product in fp32.
"""

import dataclasses
import json
import sys
from pathlib import Path

import arguments
import jax
import numpy as np

from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine, Turn
from retool_jax.learn.packing import Example
from retool_jax.learn.scorer import Scorer
from retool_jax.learn.step import Outputs
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, init_params
from retool_jax.run.build import resolve
from retool_jax.run.weights import load_weights

KINDS = {
    "fp32": {"compute_dtype": "float32", "cache_dtype": "float32"},
    "bf16": {"compute_dtype": "bfloat16", "cache_dtype": "bfloat16"},
    "bf16, head in fp32": {"compute_dtype": "bfloat16", "cache_dtype": "bfloat16", "fp32_head": True},
}


def sample(engine: Engine, prompt: list[int], rows: int, length: int) -> list[tuple[list[int], list[float]]]:
    """Sample `length` ids in each row; return each row's ids and their log-probabilities in the engine."""
    engine.append([0], [prompt])
    engine.fork([0] * (rows - 1), list(range(1, rows)))
    for row in range(rows):
        engine.start(row, Turn(row, length))
    ids: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    while len(ids[0]) < length:
        turns = engine.read(engine.decode())
        for row, count in enumerate(turns.counts):
            ids[row] += turns.tokens[row, :count].tolist()
            logprobs[row] += turns.plain_logprobs[row, :count].tolist()
    return list(zip(ids, logprobs, strict=True))


def measure(model: ModelConfig, params: Params, rows: int, length: int) -> dict[str, float]:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    prompt = np.random.default_rng(0).integers(1, model.real_vocab or model.vocab_size, 64).tolist()
    config = EngineConfig(slots=rows, max_length=len(prompt) + length + 1)
    samples = sample(Engine(model, config, params, mesh, [], seed=0), prompt, rows, length)
    examples = [Example(prompt + ids, [False] * len(prompt) + [True] * length) for ids, _ in samples]
    scorer = Scorer(Outputs(model, ("logprobs",)), mesh, len(prompt) + length, 4, -(-rows // 4))
    scored = scorer(params, examples)["logprobs"]
    trainer = np.concatenate([values[len(prompt) :] for values in scored]).astype(np.float64)
    engine = np.concatenate([logprobs for _, logprobs in samples]).astype(np.float64)
    difference, ratio = np.abs(trainer - engine), np.exp(trainer - engine)
    return {
        "mean": difference.mean(),
        "std": difference.std(),
        "p99": np.quantile(difference, 0.99),
        "max": difference.max(),
        "k3": (ratio - 1 - np.log(ratio)).mean(),
        "ess": ratio.mean() ** 2 / (ratio**2).mean(),
    }


def main(words: list[str]) -> None:
    options = arguments.parse(words, {"init_from": "", "rows": 32, "length": 192, "layers": 4, "width": 256})
    rows, length, width = (options[name] for name in ("rows", "length", "width"))
    if folder := options["init_from"]:
        run = resolve(["config=sft", f"init_from={folder}"])
        model, params = run.model, load_weights(run, Path(folder))
    else:
        sizes = {"num_heads": width // 64, "num_kv_heads": max(width // 128, 1), "head_dim": 64}
        model = ModelConfig(2048, width, 3 * width, options["layers"], **sizes, tie_embeddings=False)
        params = init_params(model, jax.random.key(0))
    found = {}
    for name, kind in KINDS.items():
        numbers = measure(dataclasses.replace(model, **kind), params, rows, length)
        found[name] = {key: float(f"{value:.3g}") for key, value in numbers.items()}
    device = jax.devices()[0].device_kind
    print(json.dumps({"benchmark": "mismatch", "tokens": rows * length, "device": device, "of": found}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
