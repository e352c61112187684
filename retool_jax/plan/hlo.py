"""Costs of a compiled module, including its loops: cycles estimated by the TPU's compiler, bytes sent between devices.

`cost_analysis` counts the body of a loop only once, so costs are added up here from the module's text. Each fusion has
the scheduler's estimate as `estimated_cycles`; Mosaic (Pallas) kernels and collectives have none.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_ESTIMATE = 1 << 60  # cycles from this number on mean that there is no estimate
BYTES = {"pred": 1.0, "token": 0.0, "s4": 0.5, "u4": 0.5}  # of types whose size does not follow from their name

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:body|to_apply|called_computations|calls)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_TEMPORARY = re.compile(r"^allocation \d+: size (\d+), preallocated-temp:", re.MULTILINE)  # others name a color
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Cost:
    """The cost of running some code once, on each device."""

    cycles: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)  # bytes to other devices, by kind of collective

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(self.sent.values())

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        kinds = self.sent.keys() | other.sent.keys()
        sent = {kind: self.sent.get(kind, 0.0) + times * other.sent.get(kind, 0.0) for kind in sorted(kinds)}
        return Cost(self.cycles + times * other.cycles, sent)


def temporaries_of(assignment: str) -> float:
    """Bytes of a module's temporaries, from a dump of its buffer assignment.

    Only allocations in the device's main memory count; those in other memories, such as the host's, name a color.
    """
    return float(sum(int(size) for size in _TEMPORARY.findall(assignment)))


def cost_of(text: str, unknown: Sequence[float] = (1,)) -> Cost:
    """The cost of a module.

    `unknown` has the trip counts of loops whose length the compiler does not know: first of the outermost such loops,
    then of those inside of them, and so on; deeper ones run once. A conditional counts as its cheaper branch, which in
    the engine's programs is the one for an option that is off.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif name and " = " in line:
            bodies[name].append(line)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    known: dict[tuple[str, int, bool], Cost] = {}

    def of(computation: str, depth: int, scattered: bool = False) -> Cost:
        key = computation, depth, scattered
        if key not in known:
            total = Cost()
            for line in bodies.get(computation, ()):
                total = total.plus(of_line(line, depth, scattered))
            known[key] = total
        return known[key]

    def of_line(line: str, depth: int, scattered: bool) -> Cost:
        if re.search(r"\bwhile\(", line):
            condition, body = (re.search(rf"{name}=%?([\w.\-]+)", line)[1] for name in ("condition", "body"))
            count = trips(bodies[condition], bodies[body])
            if count is not None:
                return Cost().plus(of(body, depth), count)
            return Cost().plus(of(body, depth + 1), unknown[depth] if depth < len(unknown) else 1)
        if branches := _BRANCHES.search(line):
            names = [part.strip().lstrip("%") for group in branches.groups() if group for part in group.split(",")]
            return min((of(name, depth) for name in names), key=lambda cost: (cost.cycles, cost.wire))
        if found := _COLLECTIVE.search(line):
            kind = "reduce-scatter" if scattered and found[2] == "all-reduce" else found[2]
            return Cost(0.0, {kind: _sent(found[1], found[2], bool(found[3]), scattered, _group(line, devices))})
        own = re.search(r'"estimated_cycles":"(-?\d+)"', line)
        cycles = float(own[1]) if own and 0 < int(own[1]) < NO_ESTIMATE else 0.0
        called = _CALLED.search(line)
        if called and re.search(r"\b(call|async-start)\(", line) and not own:
            return of(called[1], depth)
        if called and re.search(r"\bfusion\(", line):  # its cycles include those of its computation
            return Cost(cycles, of(called[1], depth, "all-reduce-scatter" in called[1]).sent)
        return Cost(cycles)

    return of(entry, 0)


def trips(condition: Sequence[str], body: Sequence[str]) -> int | None:
    """The trip count of a loop with the condition `counter < constant`, as scans have it; None for other conditions."""
    root = next(line for line in condition if line.lstrip().startswith("ROOT"))
    if not re.search(r"\bcompare\(", root) or "direction=LT" not in root:
        return None
    bounds, places = _constants(condition), _places(condition)
    operands = re.findall(r"%([\w.\-]+)", root.split("compare(")[1].split(")")[0])
    bound = next((bounds[name] for name in operands if name in bounds), None)
    place = next((places[name] for name in operands if name in places), None)
    if bound is None:
        return None
    return -(-bound // _stride(body, place))


def _stride(body: Sequence[str], place: int | None) -> int:
    """What a loop adds to its counter in each iteration: 1, unless the compiler unrolled the loop."""
    root = next((line for line in body if line.lstrip().startswith("ROOT") and " tuple(" in line), "")
    values = re.findall(r"%([\w.\-]+)", root.split(" tuple(")[1].split(")")[0]) if root else []
    if place is None or place >= len(values):
        return 1
    line = next((line for line in body if re.match(rf"\s*%{re.escape(values[place])} = ", line)), "")
    added = re.search(r" add\(([^)]*)\)", line)
    constants = _constants(body)
    named = re.findall(r"%([\w.\-]+)", added[1]) if added else []
    return max(next((constants[name] for name in named if name in constants), 1), 1)


def _constants(lines: Sequence[str]) -> dict[str, int]:
    found = (re.search(r"%([\w.\-]+) = [su](?:32|64)\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}


def _places(lines: Sequence[str]) -> dict[str, int]:
    found = (re.search(r"%([\w.\-]+) = .* get-tuple-element\(.*index=(\d+)", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}


def _sent(shape: str, kind: str, started: bool, scattered: bool, group: int) -> float:
    """Bytes that a device of a group sends in one collective with ring algorithms; `shape` is the result's.

    For n parts of p bytes: all-gather and reduce-scatter (n - 1) p each, all-reduce the sum of both, permute p.
    """
    total = sum(
        _width(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in _ARRAY.findall(shape)
    )
    others = group - 1
    if kind == "all-gather":  # the shape of an asynchronous start contains its argument, too
        return total * others / (group + 1 if started else group)
    if kind == "reduce-scatter":
        return total * (others / (group + 1) if started else others)
    if kind == "all-reduce":
        return (1 if scattered else 2) * total * others / group
    if kind == "all-to-all":
        return total * others / group
    return total / 2 if started else total


def _width(dtype: str) -> float:
    if dtype in BYTES:
        return BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0.0


def _group(line: str, devices: int) -> int:
    """Devices in each group of a collective; there are three notations."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes[1])}
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part) if part else sizes.get(name, 1) for name, part in parts)
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(counted[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    return devices
