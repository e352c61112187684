"""Slices of accelerators by name: chips, hosts, devices and the figures of each chip. Nothing heavy is imported.

Figures are those of the data sheets, with two exceptions: memory is what the TPU compiler lets a program use, and link
rates are nine tenths of the data sheet's. Clock rates follow from peak FLOP/s and products per cycle.
"""

import difflib
import re
from typing import NamedTuple

from retool_jax.errors import UserError

GIB = 1 << 30


class Chip(NamedTuple):
    """A generation of chips; 0 means not known."""

    platform: str  # jax's name: tpu, gpu, cpu
    kind: str  # a part of jax's `device_kind`
    devices: int = 1  # of jax, on each chip
    flops: float = 0.0  # bf16, a second
    memory: float = 0.0  # bytes
    memory_rate: float = 0.0  # bytes a second
    link_rate: float = 0.0  # bytes a second that it can send to other chips, over all links
    clock_hz: float = 0.0  # rate of the cycles that the compiler counts


CHIPS = {
    "v5e": Chip("tpu", "TPU v5 lite", 1, 197e12, 15.75 * GIB, 819e9, 180e9, 1.5e9),
    "v5p": Chip("tpu", "TPU v5", 1, 459e12, 95.73 * GIB, 2765e9, 540e9, 1.75e9),
    "v6e": Chip("tpu", "TPU v6 lite", 1, 918e12, 31.25 * GIB, 1638e9, 360e9, 1.75e9),
    "tpu7x": Chip("tpu", "TPU7x", 2, 2307e12, 2 * 94.75 * GIB, 7370e9, 1080e9, 2.2e9),
    "h100": Chip("gpu", "H100", 1, 989e12, 80e9, 3350e9, 450e9),
    "h200": Chip("gpu", "H200", 1, 989e12, 141e9, 4800e9, 450e9),
    "cpu": Chip("cpu", "cpu"),
}
# As in Google's names, the number counts chips for v5e and v6e, and cores (two a chip) for v5p and tpu7x.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8"}
TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}
GPUS_PER_HOST = 8


class Slice(NamedTuple):
    """The slice that a name stands for."""

    name: str
    chip: Chip
    chips: int
    hosts: int
    topology: str = ""  # of a TPU, in its compiler's format: v5p:2x4x4

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def of_host(self) -> int:
        """Devices of one host."""
        return self.devices // self.hosts

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of a TPU's links, three of them."""
        sides = [int(side) for side in self.topology.partition(":")[2].split("x")]
        return (*sides, *[1] * (3 - len(sides)))


def named(name: str) -> Slice:
    """The slice with a name such as v5p-64, v6e-256, tpu7x-128, h100-8 or cpu-8.

    Raises:
        UserError: there is no such slice; the message names the nearest.
    """
    found = re.fullmatch(r"(\w+)-(\d+)", name)
    kind, size = (found[1], int(found[2])) if found else (name, 0)
    if kind in TOPOLOGIES and size in TOPOLOGIES[kind]:
        topology = TOPOLOGIES[kind][size]
        chips = size if TOPOLOGIES[kind] is _FLAT else size // 2
        hosts = 1 if chips <= 8 and TOPOLOGIES[kind] is _FLAT else chips // 4
        return Slice(name, CHIPS[kind], chips, hosts, f"{kind}:{topology}")
    if kind in CHIPS and kind not in TOPOLOGIES and (0 < size <= GPUS_PER_HOST or size % GPUS_PER_HOST == 0 < size):
        return Slice(name, CHIPS[kind], size, 1 if kind == "cpu" else -(-size // GPUS_PER_HOST))
    raise UserError(f"no slice is called {name!r}; {_nearest(kind, size)}")


def _nearest(kind: str, size: int) -> str:
    if kind in TOPOLOGIES:
        near = min(TOPOLOGIES[kind], key=lambda known: abs(known - size))
        return f"did you mean {kind}-{near}? there are: {', '.join(f'{kind}-{known}' for known in TOPOLOGIES[kind])}"
    if kind in CHIPS:
        return f"{kind}-1 to {kind}-{GPUS_PER_HOST} are on one host; larger sizes are multiples of {GPUS_PER_HOST}"
    near = difflib.get_close_matches(kind, CHIPS, 1, 0.0)[0]
    return f"did you mean {near}? kinds are: {', '.join(CHIPS)}; a name is a kind and a number, such as v5p-64"
