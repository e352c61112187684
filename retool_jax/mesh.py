"""Devices as a mesh, and the one table from logical axis names to mesh axes.

Weights and activations name their dimensions ("embed", "heads", "batch", ...); only this file says which of them are
split, and over which mesh axes. The compiler inserts the collectives.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax import slices
from retool_jax.errors import UserError
from retool_jax.mesh_config import AXES, MeshConfig, sizes_over

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "embed": "fsdp",
    "norm": None,
    # weights and activations
    "heads": "tp",
    "kv_heads": "tp",
    "head_dim": None,
    "mlp": "tp",
    "vocab": "tp",
    # batches and activations; "model" is the dimension that weights call "embed"
    "micro": None,
    "batch": ("data", "fsdp"),  # in training: each device gathers a layer's weights and keeps its own rows
    "rows": "data",  # in the engine: its few tokens at a time cost less to exchange than weights
    "length": None,
    "model": None,
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), with collectives chosen by the compiler (Auto).

    Raises:
        UserError: the devices are not those of `config.name`, or the axes do not divide them.
    """
    devices = jax.devices() if devices is None else devices
    if config.name:
        _check_devices(slices.named(config.name), devices)
    sizes = sizes_over(config, len(devices))
    return Mesh(np.array(devices).reshape([sizes[axis] for axis in AXES]), AXES)


def _check_devices(wanted: slices.Slice, devices: list[jax.Device]) -> None:
    kinds = {device.device_kind for device in devices}
    kind, part = wanted.chip.kind, wanted.chip.platform == "gpu"  # "TPU v5" is v5p, and a part of the name of v5e
    fits = any(kind == here or (part and kind in here) for here in kinds)
    if len(devices) != wanted.devices or len(kinds) > 1 or not fits:
        raise UserError(
            f"mesh.name={wanted.name} has {wanted.devices} devices ({kind}) on {wanted.hosts} host(s), and here are"
            f" {len(devices)} ({', '.join(sorted(kinds))}); start it there, leave mesh.name out to use these devices,"
            " or plan it with python -m retool_jax.plan"
        )


def decode_options(mesh: Mesh) -> dict[str, bool]:
    """Compiler options for programs of many short steps that each read the weights, by the mesh's chips.

    Without the option, on an Ironwood chip (TPU7x), each call would copy the weights to another layout, which takes
    memory of their size.
    """
    ironwood = mesh.devices.flat[0].device_kind == slices.CHIPS["tpu7x"].kind
    return {"xla_tpu_control_large_2nd_minor_layout_for_x16": False} if ironwood else {}


def update_options(mesh: Mesh) -> dict[str, int | str]:
    """Compiler options for programs that gather each layer's weights once for many rows.

    Without the first option, a TPU's compiler passes shards of a weight around in a loop of small products where it
    finds no ring for a whole gather. By its own estimate that takes twice as long.
    """
    tpu = mesh.devices.flat[0].platform == "tpu"
    # This pass fails on gradients that are added, layer by layer, to values that a loop carries (libtpu 0.0.42).
    failing = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20} | failing if tpu else {}


def spec(*logical: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names; None is an unsplit dimension.

    A mesh axis can split only one dimension of an array; a ValueError if two of them use the same axis.
    """
    parts = [RULES[name] if name else None for name in logical]
    used = [axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical} put one mesh axis on two dimensions: {parts}")
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*logical))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Fix an activation's layout if a mesh of several devices is set (`jax.set_mesh`); otherwise return it unchanged.

    A product of rows and weights that are both split over fsdp can be computed by gathering either of them. Without
    this constraint the compiler chooses by its cost model.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:  # 0 where none is set
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def row_parts(rows: int) -> int:
    """Into how many parts the current mesh splits the rows of a batch; 1 if they do not divide over it."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])
    return parts if rows % parts == 0 else 1


def split_with_weights(rows: int) -> bool:
    """Whether the current mesh splits these rows and also the weights (mesh.fsdp above 1)."""
    return row_parts(rows) > 1 and jax.sharding.get_abstract_mesh().shape[RULES["embed"]] > 1


def _stages(size: int) -> list[list[list[int]]]:
    """The groups of devices that exchange with each other in each stage, so that after the last all have exchanged.

    Two stages, the second between neighbours. In a single stage over all chips a TPU's compiler sends twice the bytes,
    since there it can only add up whole arrays.
    """
    last = next((part for part in (4, 2) if size % part == 0 and part < size), 1)
    places = np.arange(size).reshape(-1, last)
    return [groups.tolist() for groups in (places.T, places) if groups.shape[1] > 1]


def gathered(weight: jax.Array, *logical: str) -> jax.Array:
    """A weight with these logical axes, gathered over fsdp: "embed" is split before and whole after."""
    fsdp, place = RULES["embed"], logical.index("embed")
    stages = _stages(jax.sharding.get_abstract_mesh().shape[fsdp])

    def collect(whole: jax.Array) -> jax.Array:
        for groups in reversed(stages):
            whole = jax.lax.all_gather(whole, fsdp, axis=place, axis_index_groups=groups, tiled=True)
        return whole

    return jax.shard_map(collect, in_specs=spec(*logical), out_specs=_whole(logical), check_vma=False)(weight)


def _whole(logical: tuple[str, ...]) -> PartitionSpec:
    return spec(*("model" if name == "embed" else name for name in logical))


def columns_of(rows_BTD: jax.Array) -> jax.Array:
    """Rows [B,T,D] with B split over data and fsdp, as [B*T,D] split over data and, as weights are, D over fsdp."""
    D = rows_BTD.shape[-1]

    def exchange(mine: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(mine.reshape(-1, D), RULES["embed"], split_axis=1, concat_axis=0, tiled=True)

    inside, outside = spec("batch", None, None), _columns()
    return jax.shard_map(exchange, in_specs=inside, out_specs=outside, check_vma=False)(rows_BTD)


def rows_of_columns(columns_nD: jax.Array, length: int) -> jax.Array:
    """The inverse of `columns_of`, from [B*T,D] to [B,T,D] with T = `length`."""

    def exchange(mine: jax.Array) -> jax.Array:
        own = jax.lax.all_to_all(mine, RULES["embed"], split_axis=0, concat_axis=1, tiled=True)
        return own.reshape(-1, length, own.shape[-1])

    inside, outside = _columns(), spec("batch", None, None)
    return jax.shard_map(exchange, in_specs=inside, out_specs=outside, check_vma=False)(columns_nD)


def _columns() -> PartitionSpec:
    """The partition of [B*T,D] after `columns_of`."""
    data, fsdp = RULES["batch"]
    return PartitionSpec(data, fsdp)


def scattered_sum(parts: jax.Array, *logical: str) -> jax.Array:
    """The sum over the parts of a batch of a weight's gradient: [parts,...] to an array with these logical names.

    Each device receives only its own part of the sum. With an ordinary sum over an array that is split over its first
    axis, the compiler exchanges the whole array, which takes twice the bytes and memory for all of it.
    """
    (data, fsdp), place = RULES["batch"], logical.index("embed")
    stages = _stages(jax.sharding.get_abstract_mesh().shape[fsdp])

    def exchange(mine: jax.Array) -> jax.Array:
        own = jnp.squeeze(mine, 0)
        for groups in stages:
            own = jax.lax.psum_scatter(own, fsdp, scatter_dimension=place, axis_index_groups=groups, tiled=True)
        return jax.lax.psum(own, data)

    inside = PartitionSpec(RULES["batch"], *_whole(logical))
    return jax.shard_map(exchange, in_specs=inside, out_specs=spec(*logical), check_vma=False)(parts)
