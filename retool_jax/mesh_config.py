"""Devices along each axis of a mesh: what a run may set, and which rows divide over it."""

from collections.abc import Mapping

from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED

AXES = ("data", "fsdp", "tp")


@dataclass(frozen=True, config=CHECKED)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 and takes what is left."""

    data: int = 1  # copies of the weights, each with rows of its own
    fsdp: int = -1  # devices that split weights and rows; one of the three may be -1: all devices that are left
    tp: int = 1  # devices that split heads, hidden units and vocabulary


def check_rows(sizes: Mapping[str, int], name: str, rows: int) -> None:
    """A `UserError` unless the rows of a micro-batch divide over axes of these sizes; -1 is not known yet."""
    parts = max(sizes["data"], 1) * max(sizes["fsdp"], 1)
    if rows % parts:
        raise UserError(
            f"{name}={rows} does not divide over mesh.data x mesh.fsdp = {parts} devices; use a multiple of {parts}"
        )
