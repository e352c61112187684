"""Measure on a GPU: kernels against plain code, a 1.5B Qwen2.5 against PyTorch's, and a short run with the sandbox.

    python benchmarks/gpu.py [minutes=8] [parts=kernels,decode,...] [json=gpu.json] [rows=64] [context=2048] ...

Parts run one after another. Each has its own process, so that the card's memory is free again after it. If a part fails
or has no time left, that is recorded and the next part begins. Weights are random, in bf16; the trainer also has an
fp32 master copy. `decode` samples `new` tokens for `rows` rows of `context` tokens. `update` is a step on `batch` rows
of `length` tokens, one sequence each, in micro-batches of `micro` rows, with full rematerialisation. Parts whose names
begin with torch do the same with transformers, its static cache and its checkpointing. Prints JSON with the card's name
and writes it to `json`. Without a GPU it runs on the CPU, which needs small sizes: layers=1 width=128 vocab=512 ...
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments

SIZES = {
    "layers": 28,
    "width": 1536,
    "ffn": 8960,
    "heads": 12,
    "kv_heads": 2,
    "vocab": 151_936,
    "rows": 64,
    "context": 2048,
    "new": 128,
    "batch": 8,
    "length": 4096,
    "micro": 2,
    "repeats": 3,
}
PARTS = (
    "kernels",
    "decode_xla",
    "decode_triton",
    "torch_decode",
    "update_cudnn",
    "update_xla",
    "torch_update",
    "mismatch",
    "train",
)
HERE = Path(__file__).resolve()


def model_of(sizes: dict[str, int], **how):
    from retool_jax.models.config import ModelConfig

    shape = (sizes[name] for name in ("vocab", "width", "ffn", "layers", "heads", "kv_heads"))
    half = {"compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}
    return ModelConfig(*shape, sizes["width"] // sizes["heads"], **half | how)


def peak_rates() -> tuple[float, float]:
    """The device's peak bf16 FLOP/s and memory bytes/s; 0 if they are not known."""
    import jax

    from retool_jax.slices import CHIPS

    kind = jax.devices()[0].device_kind
    chip = next((chip for chip in CHIPS.values() if chip.platform == "gpu" and chip.kind in kind), CHIPS["cpu"])
    return chip.flops, chip.memory_rate


def peak_memory() -> float:
    """The peak device memory of this process in GB; 0 if the device does not count it."""
    import jax

    return round((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, 2)


def kernels(sizes: dict[str, int]) -> dict:
    """The largest relative errors (norm of the difference / norm) of bf16 kernels against plain code."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np

    from retool_jax.models.attention import attend, packed_attention
    from retool_jax.models.cache import read_pages
    from retool_jax.models.paged import paged_decode

    rng, on_gpu, found = np.random.default_rng(0), jax.default_backend() == "gpu", {}

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    def error(ours, plain) -> float:
        pairs = [(np.float32(x), np.float32(y)) for x, y in zip(ours, plain, strict=True)]
        return round(max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs), 5)

    for heads, kv_heads, head_dim in ((4, 4, 64), (12, 2, 128), (5, 1, 64)):
        q, k, v, gradient = (random(2, 130, n, head_dim) for n in (heads, kv_heads, kv_heads, heads))
        segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 130))), jnp.int32)

        @partial(jax.jit, static_argnums=0)
        def both(kernel: str, segments: jax.Array, gradient: jax.Array, *inputs: jax.Array) -> list:
            output, back = jax.vjp(packed_attention(kernel, segments, jnp.zeros_like(segments)), *inputs)
            return [output, *back(gradient)]

        name = f"{heads} heads over {kv_heads} of {head_dim}"
        if on_gpu:
            ours, plain = (both(kernel, segments, gradient, q, k, v) for kernel in ("cudnn", "xla"))
            found[f"cudnn, {name}"] = error(ours, plain)
        pool, table = random(40, 64, 2 * kv_heads, head_dim), rng.permutation(40)[:20].reshape(2, 10)
        lengths = jnp.array([640, 65])
        seen = (np.arange(640) < np.asarray(lengths)[:, None])[:, None]
        ours = paged_decode(q[:, 0], pool, jnp.asarray(table, jnp.int32), lengths, interpret=not on_gpu)
        found[f"triton, {name}"] = error([ours], [attend(q[:, :1], *read_pages(pool, 0, table), seen)[:, 0]])
    return {"errors": found, "right": all(off < 0.02 for off in found.values())}


def decode(sizes: dict[str, int], kernel: str) -> dict:
    """The engine's tokens/s with every row live, and the share of the memory's peak rate that this uses."""
    import jax
    import numpy as np

    from retool_jax.engine.config import EngineConfig
    from retool_jax.engine.engine import Engine, Turn
    from retool_jax.mesh import MeshConfig, make_mesh
    from retool_jax.models.decoder import init_params
    from retool_jax.plan.work import matrix_weights

    rows, context, new = (sizes[name] for name in ("rows", "context", "new"))
    model = model_of(sizes, param_dtype="bfloat16", cache_kernel=kernel)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = EngineConfig(slots=rows, max_length=context + new + 1)
    engine = Engine(model, config, init_params(model, jax.random.key(0)), mesh, [], seed=0)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, model.vocab_size, (rows, context)).tolist()
    began = time.perf_counter()
    engine.append(list(range(rows)), prompts)
    engine.wait()
    written = time.perf_counter() - began
    rates = []
    for _ in range(sizes["repeats"] + 1):  # the first one compiles
        for row in range(rows):
            engine.truncate(row, context - 1)
        engine.append(list(range(rows)), [ids[-1:] for ids in prompts])
        for row in range(rows):
            engine.start(row, Turn(row, new))
        engine.wait()
        began, tokens = time.perf_counter(), 0
        under_way = [engine.decode()]
        for _ in range(-(-new // config.decode_steps) - 1):
            under_way.append(engine.decode())
            tokens += int(engine.read(under_way.pop(0)).counts.sum())
        tokens += int(engine.read(under_way.pop()).counts.sum())
        rates.append(tokens / (time.perf_counter() - began))
    rate = float(np.median(rates[1:]))
    token_bytes = 4.0 * model.num_layers * model.num_kv_heads * model.head_dim  # keys and values of a token, in bf16
    step_bytes = 2.0 * matrix_weights(model) + rows * (context + new / 2) * token_bytes
    memory_rate = peak_rates()[1]
    share = step_bytes * rate / rows / memory_rate if memory_rate else None
    return {
        "tokens_per_s": round(rate),
        "step_ms": round(1e3 * rows / rate, 3),
        "share_of_memory_rate": share and round(share, 3),
        "prompts_first_s": round(written, 2),  # with compilation
        "peak_GB": peak_memory(),
    }


def update(sizes: dict[str, int], kernel: str) -> dict:
    """Tokens/s of a policy update, and its share of the peak FLOP/s, without counting rematerialisation."""
    from functools import partial

    import jax
    import numpy as np

    from retool_jax.learn.config import OptimizerConfig
    from retool_jax.learn.optimizer import init_state
    from retool_jax.learn.packing import Example, pack
    from retool_jax.learn.step import Outputs, make_step
    from retool_jax.mesh import MeshConfig, make_mesh
    from retool_jax.plan.work import forward_flops
    from retool_jax.rl.config import RLConfig
    from retool_jax.rl.loss import clipped_loss

    batch, length = sizes["batch"], sizes["length"]
    model, optimizer = model_of(sizes, remat="full", attention_kernel=kernel), OptimizerConfig(warmup_steps=1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    ids = np.random.default_rng(0).integers(1, model.vocab_size, (batch, length))
    examples = [
        Example(row.tolist(), [False] + [True] * (length - 1), {"old_logprobs": -1.0, "advantages": (-1.0) ** i})
        for i, row in enumerate(ids)
    ]
    packed = pack(examples, length, sizes["micro"])
    step = make_step(Outputs(model), partial(clipped_loss, rl=RLConfig()), optimizer, mesh)
    state, times = init_state(model, optimizer, mesh, seed=0), []
    for _ in range(sizes["repeats"] + 1):  # the first one compiles
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, packed))
        times.append(time.perf_counter() - began)
    rate = batch * length / float(np.median(times[1:]))
    flops = peak_rates()[0]
    share = 3 * forward_flops(model, 1, length / 2) * rate / flops if flops else None
    return {
        "tokens_per_s": round(rate),
        "share_of_peak": share and round(share, 3),
        "first_s": round(times[0], 1),
        "peak_GB": peak_memory(),
    }


def torch_model(sizes: dict[str, int], dtype: str):
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        return transformers.Qwen2ForCausalLM(config).to(getattr(torch, dtype)), device


def torch_timed(work, device, repeats: int) -> tuple[float, float]:
    """Median seconds of `work` after one call that warms up, and the peak memory in GB."""
    import torch

    times, on_gpu = [], device.type == "cuda"
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2], round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else 0.0


def torch_decode(sizes: dict[str, int]) -> dict:
    """transformers' generate with its static cache, less the time of a call for one token, which is mostly prompt."""
    import torch
    import transformers

    model, device = torch_model(sizes, "bfloat16")
    rows, new = sizes["rows"], sizes["new"]
    prompts = torch.randint(1, sizes["vocab"], (rows, sizes["context"]), device=device)

    def draw(count: int):
        how = transformers.GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=count, cache_implementation="static", pad_token_id=0
        )
        with torch.no_grad():
            drawn = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)
        assert drawn.shape[1] == sizes["context"] + count

    whole, memory = torch_timed(lambda: draw(new), device, sizes["repeats"])
    first, _ = torch_timed(lambda: draw(1), device, sizes["repeats"])
    rate = rows * (new - 1) / max(whole - first, 1e-9)
    return {"tokens_per_s": round(rate), "step_ms": round(1e3 * rows / rate, 3), "peak_GB": memory}


def torch_update(sizes: dict[str, int]) -> dict:
    """A train step with fp32 weights, bf16 autocast, checkpointed layers, fused attention and fused AdamW."""
    import torch

    model, device = torch_model(sizes, "float32")
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(1, sizes["vocab"], (sizes["batch"], sizes["length"]), device=device)

    def step() -> None:
        for rows in ids.split(sizes["micro"]):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=rows, labels=rows).loss
            (loss * len(rows) / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, memory = torch_timed(step, device, sizes["repeats"])
    return {"tokens_per_s": round(ids.numel() / seconds), "peak_GB": memory}


def mismatch(sizes: dict[str, int]) -> dict:
    """Run `benchmarks/mismatch.py`, which compares log-probabilities of engine and trainer."""
    words = [f"rows={min(sizes['rows'], 32)}", f"length={min(sizes['new'], 192)}", f"layers={min(sizes['layers'], 8)}"]
    words.append(f"width={min(sizes['width'], 1024)}")
    done = subprocess.run([sys.executable, HERE.parent / "mismatch.py", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def train(sizes: dict[str, int]) -> dict:
    """The output of a short run of the miniature: a cold start and two steps, with any sandbox that works here."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["config=grpo", f"run={folder}/run", "sft.steps=400", "rl.steps=2", "evaluation.problems=32"]
        done = subprocess.run([sys.executable, "-m", "retool_jax.train", *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        return {"printed": done.stdout[-2500:].splitlines()}


def run_part(name: str, sizes: dict[str, int]) -> dict:
    kind, _, kernel = name.partition("_")
    if kind in ("decode", "update"):
        return {"decode": decode, "update": update}[kind](sizes, kernel)
    return {f.__name__: f for f in (kernels, torch_decode, torch_update, mismatch, train)}[name](sizes)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def card_name() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def main(words: list[str]) -> None:
    options = arguments.parse(words, {"minutes": 8.0, "parts": ",".join(PARTS), "json": "gpu.json"} | SIZES)
    sizes = {name: options[name] for name in SIZES}
    if unknown := set(options["parts"].split(",")) - set(PARTS):
        sys.exit(f"error: there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    end = time.monotonic() + 60 * options["minutes"]
    found = {"benchmark": "gpu", "card": card_name(), "versions": versions(), "sizes": sizes, "parts": {}}
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # this checkout first
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": os.pathsep.join(paths)}
    for name in options["parts"].split(","):
        left, began = end - time.monotonic(), time.monotonic()
        command = [sys.executable, HERE, f"part={name}", json.dumps(sizes)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(left, 0.1))
            part = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-2000:]}
        except subprocess.TimeoutExpired:
            part = {"failed": f"no time left: it had {left:.0f} s"}
        found["parts"][name] = part | {"seconds": round(time.monotonic() - began, 1)}
        # Written after each part, so that an interrupted call keeps the parts that are done.
        Path(options["json"]).write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}: {found['parts'][name]}", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("part="):
        part = sys.argv[1].removeprefix("part=")
        print(json.dumps({"benchmark": "gpu", "part": part} | run_part(part, json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
