"""The mesh section of a run: devices along each axis, and checks that heads and rows divide over them."""

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax import slices
from retool_jax.errors import UserError
from retool_jax.fields import CHECKED

AXES = ("data", "fsdp", "tp")
Axis = Annotated[int, Field(le=1 << 20)]


@dataclass(frozen=True, config=CHECKED)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1, which means all devices that are left."""

    data: Axis = 1  # copies of the weights, each with rows of its own
    fsdp: Axis = -1  # devices that split weights and rows; one of the three may be -1: all devices that are left
    tp: Axis = 1  # devices that split heads, hidden units and vocabulary
    name: str = ""  # slice of the run, such as v5p-64, v6e-256, tpu7x-128, h100-8 (docs/tpu.md); empty: what is here

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            named = dict(zip(AXES, sizes, strict=True))
            raise UserError(f"mesh {named}: axes are positive device counts, and at most one may be -1")
        known_sizes(self)


def known_sizes(config: MeshConfig) -> dict[str, int]:
    """The axes' sizes as far as the config alone determines them; -1 is unknown until the devices are known."""
    if config.name:
        there = slices.named(config.name)
        return sizes_over(config, there.devices, f"of {config.name}")
    return {axis: getattr(config, axis) for axis in AXES}


def sizes_over(config: MeshConfig, devices: int, where: str = "here") -> dict[str, int]:
    """The axes' sizes over this number of devices.

    Raises:
        UserError: they do not divide it.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not free and fixed != devices):
        raise UserError(
            f"mesh {sizes} does not divide the {devices} device(s) {where}; set mesh.data, mesh.fsdp and mesh.tp so"
            f" that their product is {devices}, one of them -1"
        )
    return sizes | {axis: devices // fixed for axis in free}


def check_heads(sizes: Mapping[str, int], kv_heads: int) -> None:
    """A `UserError` unless tp divides the model's key/value heads. A size of -1 is not known yet and passes."""
    tp = sizes["tp"]
    if tp > 0 and kv_heads % tp:
        divisors = [size for size in range(1, kv_heads + 1) if kv_heads % size == 0]
        raise UserError(
            f"mesh.tp={tp} does not divide model.num_kv_heads={kv_heads}, and a head cannot be split; set"
            f" mesh.tp to one of {', '.join(map(str, divisors))}, and mesh.fsdp to the devices that are left"
        )


def check_rows(sizes: Mapping[str, int], name: str, rows: int) -> None:
    """A `UserError` unless data x fsdp divides the rows of a micro-batch. A size of -1 is not known yet and passes."""
    parts = max(sizes["data"], 1) * max(sizes["fsdp"], 1)
    if rows % parts:
        raise UserError(
            f"{name}={rows} does not divide over mesh.data x mesh.fsdp = {parts} devices; use a multiple of {parts}"
        )
