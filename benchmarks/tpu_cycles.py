"""Read the TPU compiler's own time estimates out of its dump, without a TPU.

`compile(compiler_options={"xla_dump_to": DIR, "xla_dump_hlo_as_text": True})` leaves the scheduled program in a file
`*after_codegen.txt`. The scheduler's estimate of each fusion stands there as `estimated_cycles`; `cost_analysis` counts
the body of a loop once whatever its trip count, so the estimates are summed here through the loops. Mosaic (Pallas)
kernels and collectives carry no cycles. Compare figures within one generation of chips only.
"""

import re
from pathlib import Path
from typing import NamedTuple

CLOCK_HZ = 1.75e9  # of v5p and v6e: peak flops over flops per cycle
UNKNOWN = 1 << 60  # estimates from here on stand for none

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|to_apply|called_computations|calls)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)


class Loop(NamedTuple):
    """A while loop and the cycles of one turn of its body, inner loops included."""

    body: str
    trips: int | None  # None where the compiler does not know
    cycles: float


def read(folder: Path) -> tuple[float, list[Loop]]:
    """Cycles of the largest dumped program, loops of unknown length once, and all its loops.

    A conditional counts as its cheaper branch: here that is the one for an option that is off.
    """
    path = max(folder.glob("*after_codegen.txt"), key=lambda path: path.stat().st_size)
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in path.read_text().splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name and " = " in line:
            bodies[name].append(line)
    loops: list[Loop] = []
    known: dict[str, float] = {}

    def cycles(computation: str) -> float:
        if computation not in known:
            known[computation] = sum(map(of_line, bodies.get(computation, ())))
        return known[computation]

    def of_line(line: str) -> float:
        own = re.search(r'"estimated_cycles":"(-?\d+)"', line)
        if re.search(r"\bwhile\(", line):
            condition, body = (re.search(rf"{name}=%?([\w.\-]+)", line)[1] for name in ("condition", "body"))
            loops.append(Loop(body, _trips(bodies[condition]), cycles(body)))
            return loops[-1].cycles * (loops[-1].trips or 1)
        if branches := _BRANCHES.search(line):
            names = [part.strip().lstrip("%") for group in branches.groups() if group for part in group.split(",")]
            return min(map(cycles, names))
        if own:
            return float(own[1]) if 0 < int(own[1]) < UNKNOWN else 0.0
        if re.search(r"\b(call|async-start)\(", line) and (called := _CALLED.search(line)):
            return cycles(called[1])
        return 0.0

    return cycles(entry), loops


def _trips(condition: list[str]) -> int | None:
    """The bound of a loop whose condition is nothing but `counter < constant`, as scans and bounded loops count."""
    root = next(line for line in condition if line.lstrip().startswith("ROOT"))
    if not re.search(r"\bcompare\(", root) or "direction=LT" not in root:
        return None
    bounds = [re.search(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", line) for line in condition]
    named = {bound[1]: int(bound[2]) for bound in bounds if bound}
    operands = re.findall(r"%([\w.\-]+)", root.split("compare(")[1].split(")")[0])
    return next((named[name] for name in operands if name in named), None)
