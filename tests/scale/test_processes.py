"""Several processes, as on the hosts of a pod: each reads its own shards of a checkpoint, the first writes it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params
from retool_jax.models.huggingface import load_params, save_params

CONFIG = ModelConfig(vocab_size=96, hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, head_dim=6)

PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
number, address, source, target = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=number)
assert jax.device_count() == 4 and jax.local_device_count() == 2
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models import safetensors
from retool_jax.models.config import config_from_hf
from retool_jax.models.huggingface import load_params, save_params

read = []
whole = safetensors.Tensor.read


def counted(self, *index):
    read.append((part := whole(self, *index)).nbytes)
    return part


safetensors.Tensor.read = counted
config = config_from_hf(source)
params = load_params(config, Path(source), make_mesh(MeshConfig(fsdp=2, tp=2)))
print("bytes read:", sum(read), "of", sum(x.nbytes for x in jax.tree.leaves(params)))
save_params(config, params, Path(target))
"""


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_two_processes_load_and_write_one_checkpoint(mesh, tmp_path):
    params = init_params(CONFIG, jax.random.key(0))
    save_params(CONFIG, params, tmp_path / "in")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    words = [free_address(), str(tmp_path / "in"), str(tmp_path / "out")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate(timeout=180) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    for out, _ in told:
        read, total = (int(word) for word in out.split("bytes read: ")[1].split() if word.isdecimal())
        assert read <= 0.6 * total, "a process reads its own shards, not the whole checkpoint"
    again = load_params(CONFIG, tmp_path / "out", mesh)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
