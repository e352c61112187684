"""Compile a function, and read memory and costs of the compiled program."""

import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from retool_jax.errors import one_line
from retool_jax.plan.functions import Function
from retool_jax.plan.hlo import Cost, cost_of, temporaries_of


class Compiled(NamedTuple):
    """A compiled function; bytes and costs are those of each device."""

    arguments: float
    temporaries: float
    made: float  # outputs that do not reuse the memory of arguments
    code: float
    fixed: Cost  # outside of the loop whose length the caller decides
    each: Cost  # of one iteration of that loop: a micro-batch, a decoded token
    seconds: float  # compile time


class NoRoom(NamedTuple):
    """A function that the compiler refuses because it does not fit on a device."""

    reason: str


def compile_function(function: Function) -> Compiled | NoRoom:
    """Compile a function for the devices that it was made for."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lowered = function.lower()
        dumped = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if function.platform == "tpu" else {}
        try:
            compiled = lowered.compile(compiler_options=dumped)
        except Exception as error:  # each backend has its own type
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
            return NoRoom(f"needs {used[1]} of {used[2]}" if used else one_line(error))
        # Preferred to `as_text`, since jax may fail to parse a module of a newer compiler.
        text = _largest(folder, "*after_codegen.txt") or compiled.as_text()
        assigned = _largest(folder, "*after_optimizations-buffer-assignment.txt")
    _, *inner = function.unknown or (1,)
    fixed = cost_of(text, (0, *inner))
    memory = compiled.memory_analysis()
    # For a TPU `memory_analysis` reports more temporaries than the compiler allocates and checks against the limit.
    temporaries = temporaries_of(assigned) if assigned else float(memory.temp_size_in_bytes)
    return Compiled(
        float(memory.argument_size_in_bytes),
        temporaries,
        float(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        float(memory.generated_code_size_in_bytes),
        fixed,
        cost_of(text, (1, *inner)).plus(fixed, -1.0),
        time.perf_counter() - began,
    )


def _largest(folder: str, pattern: str) -> str:
    """The text of the largest file of a kind in a dump, which is that of the function; empty if there is none."""
    files = list(Path(folder).glob(pattern))
    return max(files, key=lambda path: path.stat().st_size).read_text() if files else ""
