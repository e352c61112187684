"""A plan as JSON and as tables."""

from rich.console import Console

from retool_jax.metrics import print_table
from retool_jax.plan.compiler import NoRoom
from retool_jax.plan.estimate import Assumed, Part, Planned, advice, assumed_of, parts_of, resident
from retool_jax.plan.work import KERNEL
from retool_jax.run.schema import RLRun, SFTRun
from retool_jax.slices import Slice

GB = 1e9


def summary_of(run: RLRun | SFTRun, place: Slice, planned: list[Planned], tokens: int | None) -> dict:
    """All results of a plan. Sizes in bytes and work are those of each device; times are in seconds."""
    assumed = assumed_of(run, tokens)
    parts = parts_of(run, place, planned, assumed)
    stays = resident(one.function for one in planned)
    most = max(planned, key=lambda one: one.passing)
    peak, limit = sum(stays.values()) + most.passing, place.chip.memory / place.chip.devices
    refused = [one.function.name for one in planned if isinstance(one.compiled, NoRoom)]
    compiled = all(one.compiled is not None for one in planned)
    fits = None if not limit else False if refused or peak > limit else True if compiled else None
    return {
        "run": run.run,
        "mesh": place.name,
        "axes": dict(planned[-1].function.mesh.shape),
        "chips": place.chips,
        "hosts": place.hosts,
        "devices": place.devices,
        "compiled": compiled,
        "functions": {one.function.name: _function(one, part) for one, part in zip(planned, parts, strict=True)},
        "memory": {"stays": stays, "most": most.function.name, "passing": most.passing, "peak": peak, "limit": limit},
        "fits": fits,
        "change": advice(run, place, planned) if fits is False else [],
        "assumed": assumed._asdict() | {"kernel_share_of_peak": KERNEL},
        "step": _step(run, place, planned, parts, assumed),
    }


def _function(one: Planned, part: Part) -> dict:
    function, c = one.function, one.compiled
    found = {
        "rows": function.rows,
        "length": function.length,
        "arguments": function.held,
        "flops": one.work.flops / function.mesh.size,
        "roofline_s": one.times.roofline,
        "estimate_s": one.times.estimate,
        "units_per_step": part.units,
        "step_s": part.seconds,
    }
    if isinstance(c, NoRoom):
        return found | {"refused": c.reason}
    if c is None:
        return found
    each = c.each if function.unknown else c.fixed
    return found | {
        "arguments_total": c.arguments,
        "temporaries": c.temporaries,
        "made": c.made,
        "code": c.code,
        "cycles": each.cycles,
        "wire": each.wire,
        "sent": each.sent,
        "fixed": {"cycles": c.fixed.cycles, "wire": c.fixed.wire} if function.unknown else {},
        "compile_s": c.seconds,
    }


def _step(run: RLRun | SFTRun, place: Slice, planned: list[Planned], parts: list[Part], assumed: Assumed) -> dict:
    """Time and cost of a step. The number of steps of an SFT run that counts epochs is not known."""
    steps = run.sft.steps if isinstance(run, SFTRun) else run.rl.steps
    if not place.chip.flops or any(part.seconds is None for part in parts):
        return {"seconds": None, "steps": steps}
    seconds = sum(part.seconds for part in parts)
    by_name = {part.name: part for part in parts}
    updates = [one for one in planned if one.function.kind == "update"]
    wanted = sum(one.work.model_flops * by_name[one.function.name].units for one in updates)
    busy = sum(by_name[one.function.name].seconds for one in updates)
    trained = by_name["policy update"].units * updates[-1].function.rows * updates[-1].function.length
    return {
        "seconds": seconds,
        "steps": steps,
        "tokens": trained,
        "tokens_per_s_per_chip": trained / seconds / place.chips,
        "update_tokens_per_s_per_chip": trained / busy / place.chips,
        "update_mfu": wanted / (busy * place.chips * place.chip.flops),
        "chip_hours_per_step": place.chips * seconds / 3600,
        "chip_hours": place.chips * seconds * steps / 3600,
        "estimated": all(one.times.estimate is not None for one in planned),
    }


def show(summary: dict, console: Console) -> None:
    """Print the tables of a plan, and the lines below them."""
    axes = " ".join(f"{axis} {size}" for axis, size in summary["axes"].items())
    sizes = f"{summary['chips']} chips, {summary['hosts']} host(s), {summary['devices']} devices"
    print(f"\n{summary['mesh']}: {sizes}; {axes}\n")
    functions, lines = summary["functions"].items(), []
    for name, one in functions:
        held = one["arguments"]
        weights = held.get("parameters", 0.0) + held.get("engine weights", 0.0)
        temporaries = one.get("refused") or _gb(one["temporaries"] + one["made"] if "made" in one else None)
        shape = f"{one['rows']} x {one['length']}" if one["rows"] else ""
        lines.append(
            [name, shape, _gb(weights), *(_gb(held.get(kind)) for kind in ("optimiser", "cache")), temporaries]
        )
    print_table(console, "GB on a device", ("rows x tokens", "weights", "optimiser", "cache", "temporaries"), lines)
    lines = [
        [
            *(name, f"{one['flops'] / 1e12:,.2f}", _time(one["roofline_s"]), _time(one["estimate_s"])),
            *(_gb(one.get("wire")), f"{one['units_per_step']:,.1f}", _time(one["step_s"])),
        ]
        for name, one in functions
    ]
    title = "a micro-batch, a call, or a token of every row, on a device; and a step"
    print_table(console, title, ("TFLOP", "roofline", "estimate", "GB sent", "in a step", "s a step"), lines)
    _show_memory(summary)
    _show_step(summary)


def _show_memory(summary: dict) -> None:
    memory = summary["memory"]
    stays = ", ".join(f"{name} {_gb(size)}" for name, size in memory["stays"].items())
    print(f"\nmemory   {stays};\n         at most {_gb(memory['passing'])} beside them, in the {memory['most']}")
    limit = f" of {_gb(memory['limit'])} GB" if memory["limit"] else " GB"
    verdict = {True: "it fits", False: "it does not fit", None: "whether it fits is not known"}
    print(f"         {_gb(memory['peak'])}{limit} on a device: {verdict[summary['fits']]}")
    for line in summary["change"]:
        print(f"         change: {line}")
    if not summary["compiled"]:
        print("         not compiled: temporaries, bytes sent and estimates are missing; a step has its least time")


def _show_step(summary: dict) -> None:
    step, assumed = summary["step"], summary["assumed"]
    if step["seconds"] is None:
        print("step     no time: the speed of these chips is not known here, or a part of it does not fit on them")
        return
    print(
        f"step     {step['seconds']:,.0f} s for {step['tokens']:,.0f} tokens that are trained on:"
        f" {step['tokens_per_s_per_chip']:,.0f} tokens/s and chip;\n         the update alone"
        f" {step['update_tokens_per_s_per_chip']:,.0f}, at {100 * step['update_mfu']:.0f} % of peak"
    )
    total = f", {step['chip_hours']:,.0f} for {step['steps']} steps" if step["steps"] else ""
    print(f"cost     {step['chip_hours_per_step']:,.1f} chip-hours a step{total}, without evaluations and starts")
    print(
        f"assumed  {assumed['tokens']:,.0f} tokens a trajectory (tokens=N), {assumed['prompt']:,.0f} of them its"
        f" prompt, {assumed['calls']:.1f} calls with {assumed['answer']:,.0f} tokens\n"
        "         of answer each; slots always full, no waiting for tools, rows packed full, every trajectory learned\n"
        f"         from; products by the compiler's cycles, attention's kernels at {100 * KERNEL:.0f} % of peak or the"
        " memory's rate,\n         links at their rate, nothing overlapped"
    )


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size / GB:,.2f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.2f}" if seconds >= 0.1 else f"{1e3 * seconds:.2f} ms"
