"""Several processes, as on the hosts of a pod: one trainer's mesh over all, an engine on the devices of each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, sys
import jax, numpy as np
number, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=number)
from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params
from retool_jax.models.sharding import param_shardings

model = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2)
trainer = make_mesh(MeshConfig(fsdp=4))


def weights(seed):
    make = jax.jit(lambda: init_params(model, jax.random.key(seed)), out_shardings=param_shardings(model, trainer))
    return make()


class Greedy:
    temperature, cancelled, stop_at = 0.0, False, lambda *_: None

    def __init__(self, request):
        self.request, self.prompt = request, [1 + request, 7, 9]

    def turn_budget(self):
        return 12

    def end_turn(self, ids, logprobs):
        self.ids = ids


engine = Engine(model, EngineConfig(slots=2, max_length=32, chunk_rows=2), weights(0), trainer, [], 0)
assert dict(engine.mesh.shape) == {"data": 1, "fsdp": 1, "tp": 2}
assert set(engine.mesh.devices.flat) == set(jax.local_devices())
for seed in (0, 1):
    if seed:
        old = jax.tree.leaves(engine.weights)
        engine.update_params(weights(seed))
        assert all(x.is_deleted() for x in old)
    # Each process has as many conversations as it likes: nobody else waits for them.
    chats = [Greedy(request) for request in range(2 + 3 * number)]
    asyncio.run(converse(engine, chats))
    print("drawn", [chat.ids for chat in chats[:2]])
"""


def test_each_process_has_an_engine_of_its_own():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), address],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate(timeout=180) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    drawn = [[line for line in out.splitlines() if line.startswith("drawn")] for out, _ in told]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2, "the same weights in both, and others after the update"
