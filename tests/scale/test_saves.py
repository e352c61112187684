"""Several processes save one checkpoint, as the hosts of a pod do: each its own shards, and their digests."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from retool_jax.checkpoint import Checkpoints, damaged_file

SHAPE = (64, 1024)

PROGRAM = """
import sys
from typing import NamedTuple
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from retool_jax.checkpoint import Checkpoints, abstract_like


class State(NamedTuple):
    params: dict[str, jax.Array]
    step: jax.Array


mesh = Mesh(np.array(jax.devices()), ("fsdp",))
shardings = State({"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, NamedSharding(mesh, PartitionSpec()))


def state_of(step):
    values = State({"w": np.random.default_rng(step).normal(size=(64, 1024)).astype(np.float32)}, np.int32(step))
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), values, shardings)


spoil = jax.jit(lambda state: jax.tree.map(lambda x: -1 - x, state), donate_argnums=0)
checkpoints = Checkpoints(sys.argv[3], keep=2)
for step in (1, 2, 3):
    state = state_of(step)
    checkpoints.save(step, state, {"step": step})
    spoil(state)
restored, notes = checkpoints.restore(3, abstract_like(state_of(3), shardings))
for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(3)), strict=True):
    for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
assert notes == {"step": 3} and checkpoints.latest() == 3
checkpoints.close()
"""


def test_each_process_saves_its_shards_and_their_digests(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = tmp_path / "checkpoints"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(number), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]

    digests = [json.loads((folder / "3" / name).read_text()) for name in ("digests.json", "digests.1.json")]
    arrays = [name for name in digests[1] if "/d/" in name]
    assert arrays and all("/ocdbt.process_1/" in name for name in digests[1])
    assert not digests[0].keys() & digests[1].keys()
    assert damaged_file(folder / "3", ["params", "rest"]) is None

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = Checkpoints(folder, keep=None)
    params, _ = checkpoints.restore_params(3, {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=device)})
    checkpoints.close()
    np.testing.assert_array_equal(params["w"], np.random.default_rng(3).normal(size=SHAPE).astype(np.float32))
    (folder / "3" / arrays[0]).write_bytes(b"")
    assert damaged_file(folder / "3", ["params"]) or damaged_file(folder / "3", ["rest"])
