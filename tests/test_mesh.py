"""Devices become a mesh, and logical axis names become shardings, or an error says why not."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from retool_jax import mesh as meshes
from retool_jax.errors import UserError
from retool_jax.mesh import make_mesh, spec
from retool_jax.mesh_config import MeshConfig, check_heads, check_rows, known_sizes
from retool_jax.plan.hlo import cost_of
from retool_jax.run.load import load

DEVICES = 8


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (1, 8, 1)),
        ({"tp": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tp": -1}, (2, 2, 2)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1)),
    ],
)
def test_a_free_axis_takes_what_is_left(sizes, expected):
    mesh = make_mesh(MeshConfig(**sizes))
    assert tuple(mesh.shape[axis] for axis in meshes.AXES) == expected
    assert sorted(device.id for device in mesh.devices.flat) == list(range(DEVICES)), "every device, once"


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"fsdp": 16},
        {"data": 2, "fsdp": 2, "tp": 1},
        {"data": 0},
        {"tp": -2},
        {"data": -1},  # two free axes
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(sizes):
    with pytest.raises(UserError) as caught:
        make_mesh(MeshConfig(**sizes))
    message = str(caught.value)
    assert str({"data": 1, "fsdp": -1, "tp": 1} | sizes) in message
    assert f"product is {DEVICES}" in message or "at most one may be -1" in message


def test_a_mesh_over_some_devices(mesh):
    assert mesh.devices.size == 1
    assert make_mesh(MeshConfig(), jax.devices()[:3]).shape["fsdp"] == 3


def test_logical_names_become_mesh_axes():
    assert spec("layers", "embed", "heads", "head_dim") == PartitionSpec(None, "fsdp", "tp", None)
    assert spec("batch", "length") == PartitionSpec(("data", "fsdp"), None)
    assert spec(None, "vocab") == PartitionSpec(None, "tp")
    with pytest.raises(ValueError, match="put one mesh axis on two dimensions"):
        spec("heads", "mlp")
    with pytest.raises(ValueError, match="put one mesh axis on two dimensions"):
        spec("batch", "embed")
    with pytest.raises(KeyError):
        spec("haeds")
    used = {axis for rule in meshes.RULES.values() if rule for axis in ((rule,) if isinstance(rule, str) else rule)}
    assert used == set(meshes.AXES)


def test_an_array_is_split_as_its_names_say():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tp=2))
    x = jax.device_put(np.arange(8 * 4).reshape(8, 4), meshes.sharding(mesh, "batch", "vocab"))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 2)}
    everywhere = jax.device_put(np.arange(3), meshes.replicated(mesh))
    assert {shard.data.shape for shard in everywhere.addressable_shards} == {(3,)}


def test_a_pinned_layout_needs_a_mesh():
    x = np.ones((8, 4), np.float32)
    assert meshes.constrain(x, "batch", "length") is x
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: meshes.constrain(x * 2, "batch", "length"))(x)
    assert y.sharding.is_equivalent_to(meshes.sharding(mesh, "batch", "length"), y.ndim)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 4)}
    np.testing.assert_array_equal(y, x * 2)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (4, 2, 1)])
def test_a_scattered_sum_leaves_each_device_its_part_and_sends_no_more(sizes):
    mesh, logical = make_mesh(MeshConfig(*sizes)), ("heads", "embed", "head_dim")
    data, fsdp, tp = sizes
    parts = np.random.default_rng(0).integers(-9, 9, (data * fsdp, 6, 16, 3)).astype("f4")
    with jax.set_mesh(mesh):
        assert meshes.row_parts(data * fsdp * 3) == data * fsdp and meshes.row_parts(1) == 1
        where = meshes.sharding(mesh, "batch", "heads", "model", "head_dim")
        compiled = jax.jit(lambda x: meshes.scattered_sum(x, *logical), in_shardings=where).lower(parts).compile()
        summed = compiled(jax.device_put(parts, where))
    np.testing.assert_array_equal(summed, parts.sum(0))
    assert summed.sharding.is_equivalent_to(meshes.sharding(mesh, *logical), 3)
    sent, whole = cost_of(compiled.as_text()).sent, parts[0].nbytes / tp
    assert sent.pop("reduce-scatter") == pytest.approx(whole * (1 - 1 / fsdp))
    assert sum(sent.values()) == pytest.approx(2 * whole / fsdp * (1 - 1 / data))  # of the copies of the weights


def test_rows_of_a_micro_batch_divide_over_data_and_fsdp():
    check_rows(make_mesh(MeshConfig(data=2, fsdp=2, tp=2)).shape, "rl.rows_per_micro", 4)
    with pytest.raises(
        UserError, match=r"rl.rows_per_micro=4 does not divide over .* = 8 devices; use a multiple of 8"
    ):
        check_rows(make_mesh(MeshConfig(data=2, fsdp=4)).shape, "rl.rows_per_micro", 4)


def test_a_named_mesh_has_its_sizes_before_there_are_devices():
    assert known_sizes(MeshConfig(name="v5p-64", tp=4)) == {"data": 1, "fsdp": 8, "tp": 4}
    assert known_sizes(MeshConfig(name="tpu7x-8", data=2, fsdp=1, tp=-1)) == {"data": 2, "fsdp": 1, "tp": 4}
    assert known_sizes(MeshConfig(tp=4)) == {"data": 1, "fsdp": -1, "tp": 4}
    with pytest.raises(UserError, match=r"does not divide the 32 device\(s\) of v5p-64; .* product is 32"):
        MeshConfig(name="v5p-64", tp=3)
    with pytest.raises(UserError, match="no slice is called 'v5p-63'; did you mean v5p-64"):
        MeshConfig(name="v5p-63")


def test_a_mesh_is_called_by_its_name_in_words():
    run = load(["config=grpo_qwen2.5_32b", "mesh=v5p-64", "mesh.tp=4", "mesh.fsdp=-1"])
    assert run.mesh == MeshConfig(name="v5p-64", tp=4)
    assert load(["config=grpo", "mesh={fsdp: 2, tp: 2}"]).mesh == MeshConfig(fsdp=2, tp=2)
    assert load(["config=grpo", "mesh.name=cpu-4"]).mesh.name == "cpu-4"
    for name in ("sft", "grpo", "ppo"):  # the slice that docs/tpu.md begins with takes them as they are
        assert load([f"config={name}_qwen2.5_32b", "mesh=v5p-64"]).mesh.name == "v5p-64"
    with pytest.raises(UserError, match=r"rl.rows_per_micro=32 does not divide over .* = 64 devices; use a multiple"):
        load(["config=grpo_qwen2.5_32b", "mesh=v6e-64"])


def test_a_named_mesh_takes_the_devices_of_its_name_and_no_others():
    assert make_mesh(MeshConfig(name=f"cpu-{DEVICES}", tp=2)).shape["fsdp"] == DEVICES // 2
    for name, reason in (("cpu-4", r"has 4 devices \(cpu\)"), ("v6e-8", r"has 8 devices \(TPU v6 lite\)")):
        with pytest.raises(UserError, match=rf"mesh.name={name} {reason} .* here are 8 \(cpu\); start it there"):
            make_mesh(MeshConfig(name=name))


def test_heads_lie_whole_on_a_device():
    check_heads({"tp": 8}, 8)
    check_heads({"tp": -1}, 8)
    with pytest.raises(UserError, match=r"mesh.tp=16 does not divide model.num_kv_heads=8.* one of 1, 2, 4, 8, and"):
        check_heads({"tp": 16}, 8)


def test_options_of_the_compiler_are_those_of_the_chips():
    here = make_mesh(MeshConfig())
    assert meshes.decode_options(here) == meshes.update_options(here) == {}
