"""Checkpoints are restored bit by bit, or the error says why not; a full disk destroys none that was there."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from retool_jax.checkpoint import Checkpoints, abstract_like, damaged_file, write_digests
from retool_jax.errors import UserError
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState, init_state, state_shardings
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
OPTIMIZER = OptimizerConfig(warmup_steps=2, decay_steps=10)


@cache
def like(mesh) -> TrainState:
    shapes = jax.eval_shape(lambda: init_state(MODEL, OPTIMIZER, mesh, 0))
    return abstract_like(shapes, state_shardings(MODEL, OPTIMIZER, mesh))


def state_of(mesh, seed: int) -> TrainState:
    """A state in mid-training: nothing in it is zero, so that compression cannot remove it."""
    rng = np.random.default_rng(seed)

    def noise(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=x.shape) if x.dtype == np.float32 else np.full(x.shape, seed)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(noise, like(mesh))


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory) -> Path:
    """A folder with checkpoints 1, 2 and 3 of which two are kept; copy it to damage it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state_of(mesh, step), {"seconds": {"update": 0.1 * step}})
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_a_state_comes_back_bit_by_bit(saved, mesh):
    checkpoints = Checkpoints(saved, keep=2)
    state, notes = checkpoints.restore(3, like(mesh))
    checkpoints.close()
    assert_equal(state, state_of(mesh, 3))
    assert notes == {"seconds": {"update": 0.1 * 3}}
    moments = jax.tree.leaves(state.opt_state)
    assert len(moments) > 2 * len(jax.tree.leaves(state.params)) and all(np.any(np.asarray(x)) for x in moments)


def test_moments_in_bf16_come_back_bit_by_bit(tmp_path, mesh):
    config = dataclasses.replace(OPTIMIZER, moment_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: init_state(MODEL, config, mesh, 0))
    halves = abstract_like(shapes, state_shardings(MODEL, config, mesh))
    state = jax.tree.map(lambda x, y: x.astype(y.dtype), state_of(mesh, 3), halves)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, state, {})
    assert_equal(checkpoints.restore(3, halves)[0], state)
    checkpoints.close()
    assert {x.dtype.name for x in jax.tree.leaves(halves)} == {"float32", "bfloat16", "int32"}


def test_the_last_ones_are_kept(saved):
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_an_empty_folder_has_no_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", keep=2)
    assert checkpoints.latest() is None
    checkpoints.close()


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_a_state_comes_back_on_another_mesh(saved, mesh, sizes):
    other = make_mesh(MeshConfig(*sizes))
    checkpoints = Checkpoints(saved, keep=2)
    state, _ = checkpoints.restore(3, like(other))
    checkpoints.close()
    assert_equal(jax.device_get(state), jax.device_get(state_of(mesh, 3)))
    for x, expected in zip(jax.tree.leaves(state), jax.tree.leaves(like(other)), strict=True):
        assert x.sharding == expected.sharding
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8


def test_what_a_killed_save_left_is_swept(copied, mesh):
    half = copied / "4.orbax-checkpoint-tmp"
    shutil.copytree(copied / "3", half)
    reader = Checkpoints(copied, keep=None)
    assert reader.latest() == 3 and half.exists(), "another run's folder is only read: its save may be going on"
    reader.close()
    checkpoints = Checkpoints(copied, keep=2)
    assert checkpoints.latest() == 3 and not half.exists()
    checkpoints.save(4, state_of(mesh, 4), {})
    assert_equal(checkpoints.restore(4, like(mesh))[0], state_of(mesh, 4))
    checkpoints.close()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    match how:
        case "truncate":
            path.write_bytes(content[:half])
        case "garble":
            path.write_bytes(content[:half] + bytes(b ^ 0xFF for b in content[half : half + 8]) + content[half + 8 :])
        case "remove":
            path.unlink()


@pytest.mark.parametrize("how", ["truncate", "garble", "remove"])
@pytest.mark.parametrize(
    "which", ["largest", "notes/metadata", "params/manifest.ocdbt", "rest/manifest.ocdbt", "digests.json"]
)
def test_a_damaged_file_is_named_and_the_one_before_is_used(copied, mesh, capfd, which, how):
    """The largest file holds the arrays: if it is garbled, orbax alone reads wrong weights without an error."""
    step = copied / "3"
    files = [path for path in step.rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size) if which == "largest" else step / which
    damage(path, how)
    checkpoints = Checkpoints(copied, keep=2)
    if which == "digests.json" and how == "remove":
        assert_equal(checkpoints.restore(3, like(mesh))[0], state_of(mesh, 3))
        checkpoints.close()
        return
    with pytest.raises(UserError) as caught:
        checkpoints.restore(checkpoints.latest(), like(mesh))
    checkpoints.close()
    message = str(caught.value)
    assert message.startswith(f"checkpoint {step} is corrupt ({path.relative_to(step)} ")
    assert message.endswith("remove that folder; the one of step 2 is used then")
    assert capfd.readouterr().err == ""
    shutil.rmtree(step)
    checkpoints = Checkpoints(copied, keep=2)
    assert_equal(checkpoints.restore(checkpoints.latest(), like(mesh))[0], state_of(mesh, 2))
    checkpoints.close()


def test_the_only_checkpoint_is_damaged(copied, mesh):
    shutil.rmtree(copied / "2")
    damage(copied / "3" / "params" / "_METADATA", "truncate")
    checkpoints = Checkpoints(copied, keep=2)
    with pytest.raises(UserError, match=r"checkpoint .*/3 is corrupt .*: remove that folder to start over$"):
        checkpoints.restore(3, like(mesh))
    checkpoints.close()


def test_each_process_answers_for_the_files_that_it_wrote(copied):
    """On a pod every host digests its own shards, instead of one host all of them."""
    step = copied / "3"
    for path in step.glob("*/ocdbt.process_0"):
        shutil.copytree(path, path.with_name("ocdbt.process_1"))
    assert any(step.glob("params/ocdbt.process_1/**/*"))
    for process in (0, 1):
        write_digests(step, process)
    whose = {name: set(json.loads((step / name).read_text())) for name in ("digests.json", "digests.1.json")}
    assert all("/ocdbt.process_1/" in name for name in whose["digests.1.json"])
    everything = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert set.union(*whose.values()) == everything - {"digests.json", "digests.1.json"}
    assert damaged_file(step, ["params"]) is None
    damage(max((step / "params" / "ocdbt.process_1").rglob("*"), key=lambda path: path.stat().st_size), "garble")
    assert "params/ocdbt.process_1/" in damaged_file(step, ["params"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB; each state here takes one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; the limit on file sizes is tested beside")
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seen_in_advance", [True, False])
def test_a_full_disk_costs_no_checkpoint(small_disk, mesh, monkeypatch, capfd, seen_in_advance):
    folder = small_disk / "checkpoints"
    checkpoints = Checkpoints(folder, keep=9)
    if not seen_in_advance:  # another process takes the room while the save is going on
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    with pytest.raises(UserError) as caught:
        for step in range(1, 9):
            checkpoints.save(step, state_of(mesh, step), {"step": step})
    last = checkpoints.latest()
    assert last is not None and 1 <= last < 8
    reason = "MB left" if seen_in_advance else "No space left on device"
    assert f"cannot save checkpoint {last + 1} in {folder} (" in str(caught.value) and reason in str(caught.value)
    assert f"checkpoint {last} is intact; make room" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == [str(step) for step in range(1, last + 1)]
    assert capfd.readouterr().err == ""
    assert_equal(checkpoints.restore(last, like(mesh))[0], state_of(mesh, last))
    checkpoints.close()

    shutil.rmtree(folder / "1")  # make room, start again
    checkpoints = Checkpoints(folder, keep=9)
    checkpoints.save(last + 1, state_of(mesh, last + 1), {})
    assert_equal(checkpoints.restore(last + 1, like(mesh))[0], state_of(mesh, last + 1))
    checkpoints.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_write_that_the_system_refuses_costs_no_checkpoint(copied, mesh, capfd):
    """What can also happen to a user without rights: a limit on the size of a file, in the middle of a run."""
    checkpoints = Checkpoints(copied, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        checkpoints.save(4, state_of(mesh, 4), {})  # does not wait for the disk
        with pytest.raises(UserError, match=r"cannot save checkpoint 4 .*File too large.*checkpoint 3 is intact"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in copied.iterdir()) == ["2", "3"]
    assert_equal(checkpoints.restore(3, like(mesh))[0], state_of(mesh, 3))
    checkpoints.save(4, state_of(mesh, 4), {})
    assert_equal(checkpoints.restore(4, like(mesh))[0], state_of(mesh, 4))
    assert sorted(path.name for path in copied.iterdir()) == ["3", "4"]
    checkpoints.close()


@pytest.mark.parametrize("asked", ["save", "latest", "restore", "close"])
def test_a_save_that_failed_is_told_by_the_next_call(copied, mesh, asked):
    checkpoints = Checkpoints(copied, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        checkpoints.save(4, state_of(mesh, 4), {})
        words = {"save": (5, state_of(mesh, 5), {}), "restore": (3, like(mesh))}.get(asked, ())
        with pytest.raises(UserError, match="cannot save checkpoint 4 "):
            getattr(checkpoints, asked)(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()  # which tells nothing twice


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1)])
def test_an_update_may_consume_a_state_while_it_is_saved(tmp_path, sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: -1 - x, state), donate_argnums=0)
    jax.block_until_ready(spoil(state_of(mesh, 0)))  # compiled
    state, notes = state_of(mesh, 7), {"seconds": {"update": 1.0}}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(7, state, notes)
    notes["seconds"]["update"] = 2.0
    for _ in range(3):
        before, state = state, spoil(state)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    saved, told = checkpoints.restore(7, like(mesh))
    assert_equal(saved, state_of(mesh, 7))
    assert told == {"seconds": {"update": 1.0}}
    checkpoints.close()


KILLED = """
import os, signal, sys
from typing import NamedTuple
import jax, numpy as np
from retool_jax.checkpoint import Checkpoints


class State(NamedTuple):
    params: dict[str, jax.Array]
    step: jax.Array


checkpoints = Checkpoints(sys.argv[1], keep=1)
for step in (1, 2):
    weights = np.random.default_rng(step).normal(size=(1024, 1024))
    checkpoints.save(step, State({"w": jax.numpy.asarray(weights)}, jax.numpy.int32(step)), {"step": step})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_save_that_was_killed_counts_whole_or_not_at_all(tmp_path, one_device):
    """The previous checkpoint is there until then, even if only one is kept."""
    folder = tmp_path / "checkpoints"
    done = subprocess.run([sys.executable, "-c", KILLED, folder], env=one_device, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = Checkpoints(folder, keep=1)
    step = checkpoints.latest()
    assert step in (1, 2)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = {"w": jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=device)}
    params, notes = checkpoints.restore_params(step, weights)
    np.testing.assert_array_equal(params["w"], np.random.default_rng(step).normal(size=(1024, 1024)).astype(np.float32))
    assert notes == {"step": step}
    checkpoints.close()
    assert not [path for path in folder.iterdir() if "tmp" in path.name]


def test_a_state_of_another_model_is_refused(copied, mesh):
    other = abstract_like(
        {"weight": jax.ShapeDtypeStruct((3,), np.float32)},
        {"weight": jax.sharding.SingleDeviceSharding(jax.devices()[0])},
    )
    checkpoints = Checkpoints(copied, keep=2)
    with pytest.raises(UserError, match=r"as the state of this config .*: choose the folder of a run of this model"):
        checkpoints.restore(3, like(mesh)._replace(params=other))
    checkpoints.close()


# ---------------------------------------------------------------------------------------------------- weights alone


def save_as_before(folder: Path, items: dict) -> Path:
    """A checkpoint as it was written when saves were synchronous, an array at a time."""
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(3, args=ocp.args.Composite(**arrays, notes=ocp.args.JsonSave({"seconds": {}})))
    write_digests(folder / "3")
    return folder


@pytest.fixture(scope="module")
def whole(mesh, tmp_path_factory) -> Path:
    """A checkpoint from the time before weights were a separate item."""
    return save_as_before(tmp_path_factory.mktemp("whole") / "checkpoints", {"state": state_of(mesh, 3)})


@pytest.fixture(scope="module")
def divided(mesh, tmp_path_factory) -> Path:
    """A checkpoint from the time after that."""
    rest = state_of(mesh, 3)._asdict()
    return save_as_before(
        tmp_path_factory.mktemp("divided") / "checkpoints", {"params": rest.pop("params"), "rest": rest}
    )


@pytest.mark.parametrize("layout", ["whole", "divided"])
def test_an_older_checkpoint_comes_back_bit_by_bit(layout, mesh, request):
    checkpoints = Checkpoints(request.getfixturevalue(layout), keep=None)
    state, notes = checkpoints.restore(3, like(mesh))
    assert_equal(state, state_of(mesh, 3))
    params, also = checkpoints.restore_params(3, like(mesh).params)
    assert notes == also == {"seconds": {}}
    assert_equal(params, state.params)
    checkpoints.close()


def arrays_read() -> int:
    """Bytes that tensorstore has read from files in this process."""
    counted = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(metric["values"][0]["value"] for metric in counted)


@pytest.mark.parametrize("layout", ["saved", "whole"])
def test_weights_alone_are_a_third_of_the_bytes(layout, mesh, request, alive):
    checkpoints = Checkpoints(request.getfixturevalue(layout), keep=None)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like(mesh).params))
    before, there = arrays_read(), alive()
    params, _ = checkpoints.restore_params(3, like(mesh).params)
    assert alive() - there == size
    assert 0.5 * size < arrays_read() - before < 1.3 * size
    checkpoints.close()
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(state_of(mesh, 3).params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_damage_beside_the_weights_does_not_keep_them_from_being_read(copied, mesh):
    damage(copied / "3" / "rest" / "_METADATA", "truncate")
    checkpoints = Checkpoints(copied, keep=None)
    checkpoints.restore_params(3, like(mesh).params)
    damage(copied / "3" / "params" / "_METADATA", "truncate")
    with pytest.raises(UserError, match=r"checkpoint .*/3 is corrupt \(params/_METADATA has"):
        checkpoints.restore_params(3, like(mesh).params)
    checkpoints.close()


def test_weights_come_back_in_another_type(saved, mesh):
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), like(mesh).params)
    checkpoints = Checkpoints(saved, keep=None)
    params, _ = checkpoints.restore_params(3, half)
    checkpoints.close()
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(state_of(mesh, 3).params), strict=True):
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))
