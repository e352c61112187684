"""Compare the peak of resident memory while a checkpoint is read with the size of its weights.

    python benchmarks/load.py [layers=8] [hidden=2048] [intermediate=11008] [vocab=151936] [folder=/tmp]

Writes a random checkpoint (by default 2.5 GB of bfloat16 in several files) to a temporary folder, reads it in a new
process on one CPU device, and prints JSON. `peak_bytes` is the highest resident memory of that process while it reads,
less what it had after it read a tiny checkpoint (for the interpreter, jax and its compiler). `ratio` is `peak_bytes` /
(bytes of the process's own shards + 1.5 x the largest tensor). Exits with 1 if it is above 1. Linux only.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import arguments
import jax
import numpy as np

from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig, config_from_hf
from retool_jax.models.decoder import abstract_params
from retool_jax.models.huggingface import load_params, save_params
from retool_jax.models.safetensors import read_headers

DEFAULTS = {"layers": 8, "hidden": 2048, "intermediate": 11_008, "vocab": 151_936, "folder": tempfile.gettempdir()}


def main(words: list[str]) -> None:
    if words[:1] == ["read"]:
        print(json.dumps(read(Path(words[1]), Path(words[2]))))
        return
    options = arguments.parse(words, DEFAULTS)
    model = ModelConfig(
        vocab_size=options["vocab"],
        hidden_size=options["hidden"],
        intermediate_size=options["intermediate"],
        num_layers=options["layers"],
        num_heads=16,
        num_kv_heads=2,
        head_dim=options["hidden"] // 16,
        tie_embeddings=False,
        param_dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory(dir=options["folder"]) as folder:
        warm, full = Path(folder) / "warm", Path(folder) / "full"
        write(replace(model, vocab_size=64, hidden_size=64, intermediate_size=64, head_dim=4), warm)
        write(model, full)
        command = [sys.executable, __file__, "read", str(warm), str(full)]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    result = json.loads(done.stdout)
    print(json.dumps({"benchmark": "load", **result, "jax": jax.__version__}))
    sys.exit(int(result["ratio"] > 1))


def write(model: ModelConfig, folder: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = abstract_params(model)[1]
    params = jax.tree.map(lambda x: jax.device_put(rng.random(x.shape, np.float32).astype(x.dtype)), shapes)
    save_params(model, params, folder, max_shard_bytes=500_000_000)


def read(warm: Path, full: Path) -> dict:
    """Read both checkpoints; return the numbers of the second."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    load_params(config_from_hf(warm, param_dtype="bfloat16"), warm, mesh)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    began = time.perf_counter()
    params = load_params(config_from_hf(full, param_dtype="bfloat16"), full, mesh)
    seconds = time.perf_counter() - began
    peak = resident("VmHWM") - before
    own = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    tensors = read_headers(full).values()
    largest = max(tensor.dtype.itemsize * int(np.prod(tensor.shape)) for tensor in tensors)
    return {
        "files": len({tensor.file for tensor in tensors}),
        "own_bytes": own,
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "peak_over_own_in_largest": round((peak - own) / largest, 3),
        "ratio": round(peak / (own + 1.5 * largest), 4),
        "seconds": round(seconds, 1),
    }


def resident(key: str) -> int:
    """Bytes of resident memory: current (VmRSS) or peak (VmHWM)."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main(sys.argv[1:])
