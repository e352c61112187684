"""Compare the engine with its peers on one core: tokens per CPU-second of the same generation.

    python benchmarks/engine.py [tunix=VENV/bin/python] [rows=32] [prompt=64] [new=192] [repeats=3] [core=0]

A Qwen2 of 4 layers, d 256, 4/2 heads of 64, ffn 768, a vocabulary of 2,048 and random weights in fp32 decodes greedily
32 rows of 64 + 192 tokens. Each side runs in its own process, pinned to one core: `ours`, `ours_sampled` (temperature
1, with the log-probs that training needs), `transformers` (`generate`) and `tunix` (google-tunix's sampler). Because
google-tunix's dependencies differ from ours, `tunix` names a Python that has it installed. Prints JSON with the best of
the repeats and the ratios of `ours` to the peers.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import arguments
import numpy as np

MODEL = {"layers": 4, "hidden": 256, "ffn": 768, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 2048}
OPTIONS = {"rows": 32, "prompt": 64, "new": 192, "repeats": 3, "core": 0}


def prompts(options: dict) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(1, MODEL["vocabulary"], (options["rows"], options["prompt"])).tolist()


def ours(options: dict, temperature: float) -> Callable[[], int]:
    """retool_jax's engine; one dispatch is read while the next one runs."""
    import jax

    from retool_jax.engine.engine import Engine, EngineConfig, Turn
    from retool_jax.mesh import MeshConfig, make_mesh
    from retool_jax.models.config import ModelConfig
    from retool_jax.models.decoder import init_params

    model = ModelConfig(
        vocab_size=MODEL["vocabulary"],
        hidden_size=MODEL["hidden"],
        intermediate_size=MODEL["ffn"],
        num_layers=MODEL["layers"],
        num_heads=MODEL["heads"],
        num_kv_heads=MODEL["kv_heads"],
        head_dim=MODEL["head_dim"],
    )
    rows, room = options["rows"], options["prompt"] + options["new"]
    config = EngineConfig(slots=rows, max_length=room, decode_steps=32)
    engine = Engine(model, config, init_params(model, jax.random.key(0)), make_mesh(MeshConfig()), [], seed=0)
    engine.warm_up()
    ids = prompts(options)

    def generate() -> int:
        engine.clear()
        engine.append(range(rows), ids)
        for row in range(rows):
            engine.start(row, Turn(row, options["new"], temperature))
        left, under_way, drawn = options["new"], [], 0
        while left > 0 or under_way:
            if left > 0:
                under_way.append(engine.decode())
                left -= config.decode_steps
            if len(under_way) > 1 or left <= 0:
                drawn += int(engine.read(under_way.pop(0)).counts.sum())
        return drawn

    return generate


def transformers(options: dict) -> Callable[[], int]:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=MODEL["vocabulary"],
        hidden_size=MODEL["hidden"],
        intermediate_size=MODEL["ffn"],
        num_hidden_layers=MODEL["layers"],
        num_attention_heads=MODEL["heads"],
        num_key_value_heads=MODEL["kv_heads"],
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.tensor(prompts(options))

    def generate() -> int:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options["new"], do_sample=False
            )
        return out.shape[0] * (out.shape[1] - ids.shape[1])

    return generate


def tunix(options: dict) -> Callable[[], int]:
    import jax.numpy as jnp
    from flax import nnx
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2.model import ModelConfig, Qwen2

    config = ModelConfig(
        num_layers=MODEL["layers"],
        vocab_size=MODEL["vocabulary"],
        embed_dim=MODEL["hidden"],
        hidden_dim=MODEL["ffn"],
        num_heads=MODEL["heads"],
        head_dim=MODEL["head_dim"],
        num_kv_heads=MODEL["kv_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )

    class Numbers:
        """A tokenizer whose texts are ids, separated by spaces; its end id is never generated."""

        encode = staticmethod(lambda text, **_: [int(word) for word in text.split()])
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids)))
        bos_id = staticmethod(lambda: 0)
        eos_id = staticmethod(lambda: MODEL["vocabulary"])
        pad_id = staticmethod(lambda: 0)

    room = options["prompt"] + options["new"]
    cache = CacheConfig(room + 1, MODEL["layers"], MODEL["kv_heads"], MODEL["head_dim"])
    sampler = Sampler(Qwen2(config, rngs=nnx.Rngs(0)), Numbers(), cache)
    texts = [" ".join(map(str, ids)) for ids in prompts(options)]

    def generate() -> int:
        out = sampler(texts, max_generation_steps=options["new"], max_prompt_length=options["prompt"])
        return sum(len(tokens) for tokens in out.tokens)

    return generate


SIDES: dict[str, Callable[[dict], Callable[[], int]]] = {
    "ours": lambda options: ours(options, 0.0),
    "ours_sampled": lambda options: ours(options, 1.0),
    "transformers": transformers,
    "tunix": tunix,
}


def measure(side: str, options: dict) -> None:
    """Print one side's tokens per CPU-second, best of the repeats; the first generation compiles and does not count."""
    os.sched_setaffinity(0, {options["core"]})
    generate = SIDES[side](options)
    generate()
    rates = []
    for _ in range(options["repeats"]):
        began = time.process_time()
        tokens = generate()
        rates.append(tokens / (time.process_time() - began))
    print(json.dumps({"tokens_per_cpu_s": round(max(rates)), "tokens": tokens}))


def main(words: list[str]) -> None:
    options = arguments.parse(words, OPTIONS | {"tunix": "", "side": ""})
    python, side = options.pop("tunix"), options.pop("side")
    if side:
        return measure(side, options)
    results: dict[str, dict] = {}
    for name in SIDES:
        interpreter = python if name == "tunix" else sys.executable
        if not interpreter:
            results[name] = {"skipped": "no Python with google-tunix given: tunix=VENV/bin/python"}
            continue
        command = [interpreter, __file__, f"side={name}", *(f"{key}={value}" for key, value in options.items())]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        failed = (done.stderr.strip() or "no message").splitlines()[-1]
        results[name] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"skipped": failed}
    rates = {name: result["tokens_per_cpu_s"] for name, result in results.items() if "tokens_per_cpu_s" in result}
    ratios = {f"ours/{name}": round(rates["ours"] / rates[name], 2) for name in rates if not name.startswith("ours")}
    print(json.dumps({"benchmark": "engine", **options, "generate": results, "ratios": ratios}, indent=1))
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
