"""Devices as a mesh, and the one table from logical axis names to mesh axes.

Weights and activations name their dimensions ("embed", "heads", "batch", ...); this file alone says which of
them are split, and over what. The compiler inserts the collectives.
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
    # of weights
    "layers": None,
    "embed": "fsdp",
    "norm": None,
    # of weights, and of the activations that they make
    "heads": "tp",
    "kv_heads": "tp",
    "head_dim": None,
    "mlp": "tp",
    "vocab": "tp",
    # of batches and activations; "model" is what weights call "embed"
    "micro": None,
    "batch": ("data", "fsdp"),  # in training, so that each device gathers a layer's weights and keeps its own rows
    "rows": "data",  # of the engine: few tokens at a time, which cost less to exchange than weights
    "length": None,
    "model": None,
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices (or those given), with compiler-chosen (Auto) collectives.

    Raises:
        UserError: they are others than the config's name says, or its axes do not divide over them.
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
            f" {len(devices)} ({', '.join(sorted(kinds))}); start it there, leave mesh.name out to take what is here,"
            " or look at it with python -m retool_jax.plan"
        )


def decode_options(mesh: Mesh) -> dict[str, bool]:
    """Options of the compiler for programs that read weights in each of many short steps, by their mesh's chips.

    For an Ironwood chip (TPU7x) the compiler would lay the weights out anew at every call, in memory of their size.
    """
    ironwood = mesh.devices.flat[0].device_kind == slices.CHIPS["tpu7x"].kind
    return {"xla_tpu_control_large_2nd_minor_layout_for_x16": False} if ironwood else {}


def update_options(mesh: Mesh) -> dict[str, int | str]:
    """Options of the compiler for programs that gather each layer's weights once for many rows.

    A TPU's would rather pass shards of a weight around in a loop of small products, where it finds no ring for a whole
    gather: by its own estimate that takes twice as long.
    """
    tpu = mesh.devices.flat[0].platform == "tpu"
    # The pass fails on gradients that are added, layer by layer, to what a loop carries (libtpu 0.0.42).
    failing = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20} | failing if tpu else {}


def spec(*logical: str | None) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names; None is an unsplit dimension.

    A mesh axis can split only one dimension of an array; a second claim on it is an error, not a silent choice.
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
    """Pin an activation's layout where a mesh of several devices is set (`jax.set_mesh`); elsewhere the array as it is.

    A product of rows that are split over fsdp and weights that are split over fsdp can be had by gathering either.
    Without this the compiler chooses, by a cost model of its own.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:  # 0 where none is set
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def row_parts(rows: int) -> int:
    """How many parts the rows of a batch are in on the mesh in use; 1 where they do not divide over it."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])
    return parts if rows % parts == 0 else 1


def split_with_weights(rows: int) -> bool:
    """Whether so many rows are split over devices of the mesh in use which have parts of each weight, too."""
    return row_parts(rows) > 1 and jax.sharding.get_abstract_mesh().shape[RULES["embed"]] > 1


def _stages(size: int) -> list[list[list[int]]]:
    """Which of so many devices exchange with each other, one time after another, until all have.

    In two stages, the last between neighbours: in one over all chips a TPU's compiler sends twice the bytes, as it
    knows no way around all of them but to add up whole arrays.
    """
    last = next((part for part in (4, 2) if size % part == 0 and part < size), 1)
    places = np.arange(size).reshape(-1, last)
    return [groups.tolist() for groups in (places.T, places) if groups.shape[1] > 1]


def gathered(weight: jax.Array, *logical: str) -> jax.Array:
    """A weight with these logical axes, which devices have parts of, whole on each that has rows of its own."""
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
    """Rows that are split over devices as [B*T,D], of which each has a part of D instead, as of weights."""
    D = rows_BTD.shape[-1]

    def exchange(mine: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(mine.reshape(-1, D), RULES["embed"], split_axis=1, concat_axis=0, tiled=True)

    inside, outside = spec("batch", None, None), _columns()
    return jax.shard_map(exchange, in_specs=inside, out_specs=outside, check_vma=False)(rows_BTD)


def rows_of_columns(columns_nD: jax.Array, length: int) -> jax.Array:
    """The inverse of `columns_of`: [B*T,D], of which each device has a part of D, as rows [B,T,D] of T = `length`."""

    def exchange(mine: jax.Array) -> jax.Array:
        own = jax.lax.all_to_all(mine, RULES["embed"], split_axis=0, concat_axis=1, tiled=True)
        return own.reshape(-1, length, own.shape[-1])

    inside, outside = _columns(), spec("batch", None, None)
    return jax.shard_map(exchange, in_specs=inside, out_specs=outside, check_vma=False)(columns_nD)


def _columns() -> PartitionSpec:
    """Of [B*T,D] whose D axis is split as that of weights."""
    data, fsdp = RULES["batch"]
    return PartitionSpec(data, fsdp)


def scattered_sum(parts: jax.Array, *logical: str) -> jax.Array:
    """The sum of what each part of a batch says of a weight: [parts,...] to an array with these logical names.

    Each device gets its own part of the sum, and nothing else is sent. A sum that is written as one over an array that
    is split over its first axis is exchanged as a whole, which takes twice the bytes and the memory of the whole.
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
