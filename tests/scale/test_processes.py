"""Several processes, as on the hosts of a pod: each has its own shards, its part of a checkpoint, its own engine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import jax
import numpy as np
import pytest

from retool_jax.checkpoint import Checkpoints, damaged_file
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params
from retool_jax.models.huggingface import load_params, save_params

# Two processes with two devices each run one program after another, since most of their time is their start.
PROCESS = """
import contextlib, io, json, sys, traceback
import jax
number = int(sys.argv[1])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=number)
assert jax.device_count() == 4 and jax.local_device_count() == 2
for line in sys.stdin:
    program, words = json.loads(line)
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {"__name__": "program", "number": number, "words": words})
    except Exception:
        error = traceback.format_exc()
    print("told", json.dumps([printed.getvalue(), error]), flush=True)
"""


def told(stdout: IO[str]) -> list[str]:
    """What a program printed, and its exception; other lines are those of libraries."""
    line = next((line for line in stdout if line.startswith("told ")), None)
    return json.loads(line.removeprefix("told ")) if line else ["", "the process has ended"]


@pytest.fixture(scope="module")
def on_both(one_device, tmp_path_factory) -> Iterator[Callable[..., list[str]]]:
    """`on_both(program, word, ...)`: run it in both processes, with their `number` and the words; what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"{one_device['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = one_device | {"XLA_FLAGS": flags}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    errors = tmp_path_factory.mktemp("processes") / "stderr"
    with errors.open("w") as stderr:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        pair = [
            subprocess.Popen([sys.executable, "-c", PROCESS, str(number), address], env=environment, **pipes)
            for number in range(2)
        ]

    def run(program: str, *words: object) -> list[str]:
        for process in pair:
            process.stdin.write(json.dumps([program, [str(word) for word in words]]) + "\n")
            process.stdin.flush()
        waiting = [reader.submit(told, process.stdout) for process in pair]
        answers = [one.result(timeout=300) for one in waiting]
        assert [error for _, error in answers] == ["", ""], errors.read_text()[-3000:]
        return [printed for printed, _ in answers]

    with ThreadPoolExecutor(2) as reader:
        try:
            yield run
            for process in pair:
                process.stdin.close()
            assert [process.wait(timeout=120) for process in pair] == [0, 0], errors.read_text()[-3000:]
        finally:
            for process in pair:
                process.kill()  # one that waits for the other would wait for ever
                process.wait()


# ------------------------------------------------------------------------------------------------------------- engines

ENGINES = """
import asyncio
import hashlib
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params
from retool_jax.models.sharding import param_shardings

model = ModelConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=4, num_kv_heads=2)
trainer = make_mesh(MeshConfig(fsdp=4))


weights = jax.jit(lambda seed: init_params(model, jax.random.key(seed)), out_shardings=param_shardings(model, trainer))


class Greedy:
    temperature, cancelled, stop_at = 0.0, False, lambda *_: None

    def __init__(self, request):
        self.request, self.prompt = request, [1 + request, 7, 9]

    def turn_budget(self):
        return 12

    def end_turn(self, ids, logprobs):
        self.ids = ids


def digest(tree):
    \"\"\"Of the bits of each array, however its parts lie and its layers are stacked.\"\"\"
    return sorted(hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:8] for x in jax.tree.leaves(tree))


engine = Engine(model, EngineConfig(slots=2, max_length=32), weights(0), trainer, [], 0)
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
    print("weights", digest(engine.weights), digest(process_allgather(weights(seed), tiled=True)))
"""


def test_each_process_has_an_engine_of_its_own(on_both):
    """One trainer's mesh over all devices, an engine on the devices of each process."""
    said = [out.splitlines() for out in on_both(ENGINES)]
    drawn = [[line for line in lines if line.startswith("drawn")] for lines in said]
    weights = [[line.split(" ", 1)[1] for line in lines if line.startswith("weights")] for lines in said]
    assert weights[0] == weights[1] and len(set(weights[0])) == 2
    for line in weights[0]:
        engine, trainer = line[1:-1].split("] [")
        assert engine == trainer, "bit for bit"
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 2, "the same weights in both, and others after the update"


# --------------------------------------------------------------------------------------------- Hugging Face checkpoints

CONFIG = ModelConfig(vocab_size=96, hidden_size=24, intermediate_size=40, num_heads=4, num_kv_heads=2, head_dim=6)

SHARDS = """
from pathlib import Path
import jax
source, target = words
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
safetensors.Tensor.read = whole
print("bytes read:", sum(read), "of", sum(x.nbytes for x in jax.tree.leaves(params)))
save_params(config, params, Path(target))
"""


def test_two_processes_load_and_write_one_checkpoint(on_both, mesh, tmp_path):
    """Each reads its own shards, the first writes."""
    params = init_params(CONFIG, jax.random.key(0))
    save_params(CONFIG, params, tmp_path / "in")
    for out in on_both(SHARDS, tmp_path / "in", tmp_path / "out"):
        read, total = (int(word) for word in out.split("bytes read: ")[1].split() if word.isdecimal())
        assert read <= 0.6 * total, "a process reads its own shards, not the whole checkpoint"
    again = load_params(CONFIG, tmp_path / "out", mesh)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --------------------------------------------------------------------------------------------- checkpoints of a run

SHAPE = (64, 1024)

SAVES = """
from pathlib import Path
from typing import NamedTuple
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from retool_jax import hosts
from retool_jax.checkpoint import Checkpoints, abstract_like, damaged_file
from retool_jax.errors import UserError


class State(NamedTuple):
    params: dict[str, jax.Array]
    step: jax.Array


mesh = Mesh(np.array(jax.devices()), ("fsdp",))
shardings = State({"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, NamedSharding(mesh, PartitionSpec()))


def state_of(step):
    values = State({"w": np.random.default_rng(step).normal(size=(64, 1024)).astype(np.float32)}, np.int32(step))
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), values, shardings)


spoil = jax.jit(lambda state: jax.tree.map(lambda x: -1 - x, state), donate_argnums=0)
checkpoints = Checkpoints(words[0], keep=2)
for step in (1, 2, 3):
    state = state_of(step)
    checkpoints.save(step, state, {"step": step})
    spoil(state)
restored, notes = checkpoints.restore(3, abstract_like(state_of(3), shardings))
for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(3)), strict=True):
    for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
assert notes == {"step": 3} and checkpoints.latest() == 3

older = Path(words[0]) / "2"
if hosts.is_first():
    max(older.glob("params/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size).write_bytes(b"")
hosts.gather(None)
found = hosts.gather(damaged_file(older, ["params"]))
assert sorted(map(bool, found)) == [False, True], "each process must read its share of the files"
try:
    checkpoints.restore(2, abstract_like(state_of(2), shardings))
    raise AssertionError("a damaged checkpoint was read")
except UserError as error:
    assert str(error) == hosts.broadcast(str(error)) and "ocdbt.process_1" in str(error)
checkpoints.close()
"""


def test_each_process_saves_its_shards_and_their_digests(on_both, tmp_path):
    folder = tmp_path / "checkpoints"
    on_both(SAVES, folder)
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
