"""Devices as a mesh, and the one table from logical axis names to mesh axes.

Weights and activations name their dimensions ("embed", "heads", "batch", ...); this file alone says which of
them are split, and over what. The compiler inserts the collectives.
"""

import jax
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


def update_options(mesh: Mesh) -> dict[str, int]:
    """Options of the compiler for programs that gather each layer's weights once for many rows.

    A TPU's would rather pass shards of a weight around in a loop of small products, where it finds no ring for a whole
    gather: by its own estimate that takes twice as long.
    """
    tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20} if tpu else {}


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
