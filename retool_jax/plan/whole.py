"""All functions of a run, compiled one after another."""

from rich.console import Console

from retool_jax.mesh import make_mesh
from retool_jax.mesh_config import MeshConfig, known_sizes
from retool_jax.models.config import ModelConfig
from retool_jax.plan.compiler import Compiled, NoRoom, compile_function
from retool_jax.plan.devices import devices_of
from retool_jax.plan.estimate import Assumed, Planned, assumed_of
from retool_jax.plan.functions import Function, rl_functions, sft_functions
from retool_jax.plan.work import times_of, work_of
from retool_jax.run.schema import RLRun, SFTRun
from retool_jax.slices import Slice


def functions_of(run: RLRun | SFTRun, place: Slice, teacher: ModelConfig) -> list[Function]:
    """A run's functions on the mesh that its config describes, over the devices of a slice."""
    mesh = make_mesh(MeshConfig(**known_sizes(run.mesh)), devices_of(place))
    return sft_functions(run, mesh) if isinstance(run, SFTRun) else rl_functions(run, mesh, teacher, place.of_host)


def plan(
    run: RLRun | SFTRun, place: Slice, tokens: int | None, teacher: ModelConfig, console: Console
) -> list[Planned]:
    """Every function of the run, compiled, in the order of a step."""
    assumed, functions = assumed_of(run, tokens), functions_of(run, place, teacher)
    return [
        plan_function(one, place, assumed, console, f"{i} of {len(functions)}") for i, one in enumerate(functions, 1)
    ]


def plan_function(function: Function, place: Slice, assumed: Assumed, console: Console, which: str) -> Planned:
    """Compile a function if there is a compiler for its devices, and print the progress."""
    compiled = None
    if place.chip.platform != "gpu":
        console.print(f"{which}: compiling the {function.name} ...", end=" ")
        compiled = compile_function(function)
        console.print(f"{compiled.seconds:.0f} s" if isinstance(compiled, Compiled) else compiled.reason)
    work = work_of(function, assumed.context, assumed.tokens)
    known = None if isinstance(compiled, NoRoom) else compiled
    return Planned(function, compiled, work, times_of(function, work, known, place.chip))
