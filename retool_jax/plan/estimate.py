"""Estimates for a planned run: its memory, whether it fits, and the time of a step by part."""

from collections.abc import Iterable
from typing import NamedTuple

from retool_jax.plan.compiler import Compiled, NoRoom
from retool_jax.plan.functions import Function, held
from retool_jax.plan.work import WHOLE, Times, Work
from retool_jax.run.schema import RLRun, SFTRun
from retool_jax.slices import TOPOLOGIES, Slice


class Planned(NamedTuple):
    """A function with its compiled program, work and times."""

    function: Function
    compiled: Compiled | NoRoom | None  # None: no compiler for these devices
    work: Work
    times: Times

    @property
    def passing(self) -> float:
        """Bytes that it takes while it runs: batches, temporaries, results, code, and the padding of arguments."""
        c, classes = self.compiled, self.function.held
        if not isinstance(c, Compiled):
            return classes.get("batch", 0.0)
        made = 0.0 if self.function.kind == "reshard" else c.made  # its result is counted as resident
        padding = max(c.arguments - sum(classes.values()), 0.0)
        return classes.get("batch", 0.0) + padding + c.temporaries + made + c.code


class Assumed(NamedTuple):
    """Averages that a step's time depends on and that are unknown before the run."""

    tokens: float  # of a trajectory, including prompt and tool output
    prompt: float  # tokens
    calls: float  # tool calls in a trajectory
    answer: float  # tokens of a tool's answer

    @property
    def context(self) -> float:
        """Tokens that a live row holds on average."""
        return self.prompt + (self.tokens - self.prompt) / 2


class Part(NamedTuple):
    """A part of a step."""

    name: str
    units: float  # how often its function runs: micro-batches, calls, or decoded tokens of all rows
    seconds: float | None  # of all units together


def assumed_of(run: RLRun | SFTRun, tokens: int | None) -> Assumed:
    """Half of the longest trajectory (unless `tokens` is given), a quarter of the longest prompt, half of the calls."""
    if isinstance(run, SFTRun):
        return Assumed(tokens or run.sft.row_length, 0.0, 0.0, 0.0)
    prompt, most = run.rollout.max_prompt_tokens / 4, run.rollout.max_turns - 1
    calls = most / 2 if run.tools != "none" else 0.0
    return Assumed(tokens or run.engine.max_length // 2, prompt, calls, run.rollout.tool_output_tokens)


def resident(functions: Iterable[Function]) -> dict[str, float]:
    """Bytes of each device that a run with these functions holds all the time, by class."""
    found = {}
    for name, classes in ((one.name, one.held) for one in functions):
        if name in ("policy update", "critic update"):
            of = "" if name == "policy update" else "critic's "
            found |= {f"{of}{kind}": classes[kind] for kind in ("parameters", "optimiser")}
        if name in ("reference", "teacher"):
            found[f"{name}'s parameters"] = classes["parameters"]
        if name == "decode":
            found |= {kind: classes[kind] for kind in ("engine weights", "cache")}
    return found


def parts_of(run: RLRun | SFTRun, place: Slice, planned: list[Planned], assumed: Assumed) -> list[Part]:
    """How often a step runs each function and how long that takes. Only the engines of several hosts run at once."""
    by_name = {one.function.name: one for one in planned}
    units = dict.fromkeys(by_name, 0.0)
    if isinstance(run, SFTRun):
        update = by_name["policy update"].function
        tokens = run.sft.batch_size * assumed.tokens or run.sft.batch_tokens
        units["policy update"] = max(tokens / (update.rows * update.length), 1.0)
    else:
        rl, trajectories = run.rl, run.rl.prompts_per_step * run.rl.group_size
        micro = trajectories * assumed.tokens / (rl.rows_per_micro * rl.row_length)
        for name, one in by_name.items():
            if one.function.kind in ("update", "score"):
                units[name] = micro * (rl.epochs if one.function.kind == "update" else 1)
        if "decode" in by_name:
            drawn = max(assumed.tokens - assumed.prompt - assumed.calls * assumed.answer, 1.0)
            units["decode"] = trajectories * drawn / place.hosts / live_rows(run, by_name["decode"].function, assumed)
            written = trajectories * assumed.calls * assumed.answer + rl.prompts_per_step * assumed.prompt
            call = by_name["write"].function
            units["write"] = written / place.hosts / (call.rows * call.length)
            units["weights to engines"] = 1.0
    return [Part(name, units[name], _seconds(one, units[name], run, place)) for name, one in by_name.items()]


def live_rows(run: RLRun, decode: Function, assumed: Assumed) -> float:
    """Rows of an engine that decode at once: its slots, or fewer if its pages hold fewer."""
    state = decode.arguments["cache"][0]
    tokens = state.cache.shape[0] // run.model.num_layers * state.cache.shape[1]
    return min(run.engine.slots, max(tokens / assumed.context, 1.0))


def _seconds(one: Planned, units: float, run: RLRun | SFTRun, place: Slice) -> float | None:
    """Seconds of these units, with the fixed cost of each batch or dispatch."""
    if one.times.estimate is None or not isinstance(one.compiled, Compiled):
        return None if one.times.roofline is None else units * one.times.roofline
    seconds = units * one.times.estimate
    if one.function.unknown and place.chip.clock_hz:
        chip, fixed = place.chip, one.compiled.fixed
        overhead = fixed.cycles / chip.clock_hz + fixed.wire / (chip.link_rate / chip.devices)
        batches = 1.0
        if one.function.kind == "decode":
            batches = units / run.engine.decode_steps
        elif one.function.kind == "update" and isinstance(run, RLRun):
            batches = run.rl.minibatches * run.rl.epochs
        seconds += batches * overhead
    return seconds


def advice(run: RLRun | SFTRun, place: Slice, planned: list[Planned]) -> list[str]:
    """Changes that save memory for a run that does not fit, the cheapest first."""
    stays, most = resident(one.function for one in planned), max(planned, key=lambda one: one.passing)
    over = sum(stays.values()) + most.passing - place.chip.memory / place.chip.devices
    section, rows = ("sft", run.sft.rows_per_micro) if isinstance(run, SFTRun) else ("rl", run.rl.rows_per_micro)
    mesh = planned[-1].function.mesh
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    changes = []
    if rows > parts:
        changes.append(f"{section}.rows_per_micro={parts}, a row for each device that has rows of its own")
    if run.model.remat not in WHOLE:
        changes.append("model.remat=full, which computes whole layers again")
    elif run.model.remat == "full" and any(
        one.function.kind == "update" and (one is most or isinstance(one.compiled, NoRoom)) for one in planned
    ):
        changes.append("model.remat=offload, which keeps the inputs of layers in the host's memory")
    if decode := next((one.function for one in planned if one.function.name == "decode"), None):
        pool = decode.arguments["cache"][0].cache
        pages = pool.shape[0] // run.model.num_layers
        fewer = int(pages * (1 - over / held(pool)))
        if fewer * pool.shape[1] >= run.engine.max_length:
            changes.append(f"engine.pages={fewer} instead of {pages}")
    if run.model.num_kv_heads % (2 * mesh.shape["tp"]) == 0 and mesh.shape["fsdp"] % 2 == 0:
        changes.append(f"mesh.tp={2 * mesh.shape['tp']}, which halves what a device has of a layer")
    changes.append(f"{section}.optimizer.moment_dtype=bfloat16, which halves Adam's moments")
    kind, _, size = place.name.partition("-")
    larger = [known for known in TOPOLOGIES.get(kind, ()) if known > int(size)]
    if larger:
        changes.append(f"mesh={kind}-{larger[0]}, which splits the weights over more chips")
    return changes
