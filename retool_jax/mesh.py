"""Devices as a mesh, and the one table from logical axis names to mesh axes.

Weights and activations name their dimensions ("embed", "heads", "batch", ...); this file alone says which of
them are split, and over what. The compiler inserts the collectives.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax.errors import UserError
from retool_jax.mesh_config import AXES, MeshConfig

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
    """The mesh over all devices (or those given), with compiler-chosen (Auto) collectives."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: axes are positive device counts, and at most one may be -1")
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"mesh {sizes} does not divide the {len(devices)} device(s) here; set mesh.data, mesh.fsdp and mesh.tp so"
            f" that their product is {len(devices)}, one of them -1"
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    return Mesh(np.array(devices).reshape([sizes[axis] for axis in AXES]), AXES)


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
