"""Search for the best mesh, micro-batch and remat policy: rate all by formula, then compile the best few."""

import math
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from retool_jax.errors import UserError
from retool_jax.mesh_config import MeshConfig
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import REMAT
from retool_jax.plan.compiler import Compiled
from retool_jax.plan.estimate import assumed_of, resident
from retool_jax.plan.whole import functions_of, plan_function
from retool_jax.plan.work import BACKWARD, KERNEL, WHOLE, attention_flops, forward_flops, head_weights, matrix_weights
from retool_jax.run.schema import RLRun, SFTRun
from retool_jax.slices import Slice

COMPILED = 3  # how many of the candidates are compiled
PRODUCTS = 0.7  # share of a chip's peak that the formula assumes for matrix products


class Candidate(NamedTuple):
    """A way to train, with the memory and time of its update by formula."""

    tp: int
    rows: int  # of a micro-batch
    remat: str
    memory: float  # bytes of each device
    seconds: float  # for each token of a device


def candidates(model: ModelConfig, place: Slice, length: int, beside: float = 0.0) -> list[Candidate]:
    """All candidates that divide over the slice and may fit beside `beside` other bytes a device, fastest first."""
    limit = place.chip.memory / place.chip.devices
    found = []
    for tp in (tp for tp in range(1, model.num_kv_heads + 1) if model.num_kv_heads % tp == place.devices % tp == 0):
        fsdp = place.devices // tp
        if any(size % tp for size in (model.num_heads, model.intermediate_size, model.vocab_size)) or (
            model.hidden_size % fsdp
        ):
            continue
        for rows in (fsdp, 2 * fsdp, 4 * fsdp):
            for remat in REMAT:
                one = Candidate(
                    tp,
                    rows,
                    remat,
                    memory_of(model, place.devices, tp, rows // fsdp * length, remat),
                    seconds_of(model, place, tp, rows // fsdp, length, remat),
                )
                if not limit or one.memory + beside < limit:
                    found.append(one)
    # The formulas do not know the time of transfers to the host, so offload is used only if nothing else fits.
    return sorted([one for one in found if one.remat != "offload"] or found, key=lambda one: one.seconds)


def memory_of(model: ModelConfig, devices: int, tp: int, tokens: int, remat: str) -> float:
    """Approximate bytes of an update on each device: state, gradients, activations of its tokens, a gathered layer."""
    D, N, K, H, F = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim, model.intermediate_size
    weights = matrix_weights(model) + head_weights(model)
    state = (3 * 4 + 4) * weights / devices  # weights, moments and accumulated gradients
    heads = (2 * (N + K) * H + 2 * F) / tp  # outputs of a layer's products for each token
    kept = {
        "offload": 0.0,
        "full": 1.0 * D,
        "dots": 3 * D + heads + N * H / tp,
        "none": 8 * D + 2 * heads + 2 * F / tp,
    }[remat]
    layer = 4 * (matrix_weights(model) - head_weights(model)) / model.num_layers / tp
    layer += 2 * tokens * (8 * D + 3 * heads)
    # The head's gradient is computed before those of the layers, so they do not need memory at the same time.
    return state + 2 * tokens * model.num_layers * kept + max(layer, 10 * head_weights(model) / tp)


def seconds_of(model: ModelConfig, place: Slice, tp: int, rows: int, length: int, remat: str) -> float:
    """Approximate seconds of an update for each token of a device with this many rows, without any overlap."""
    chip, tokens = place.chip, rows * length
    keys = length / 2
    products = forward_flops(model, tokens, 0.0) * (3 + (remat in WHOLE))
    kernels = attention_flops(model, tokens, keys) * (1 + BACKWARD + (remat in WHOLE))
    peak, link = chip.flops / chip.devices, chip.link_rate / chip.devices
    computed = (products / PRODUCTS + kernels / KERNEL) / tp / peak
    # Weights are gathered in each pass, gradients are summed over all devices, and tp sums hidden states twice for each
    # layer and pass.
    passes = 2 + (remat in WHOLE)
    gathered = 2.0 * matrix_weights(model) / tp * (passes + 2)
    summed = 2 * passes * model.num_layers * 2.0 * tokens * model.hidden_size * 2 * (tp - 1) / tp
    return (computed + (gathered + summed) / link) / (tokens / tp)


def search_meshes(run: RLRun | SFTRun, place: Slice, teacher: ModelConfig, console: Console) -> list[dict]:
    """The best candidates with the compiler's results for their policy update, the fastest first.

    They fit beside everything else that the run holds all the time: engine, critic, teacher.

    Raises:
        UserError: the slice's speed is not known here, or no candidate may fit.
    """
    if not place.chip.flops:
        raise UserError(f"mesh={place.name} has no known speed to search by; name a slice of v5e, v5p, v6e or tpu7x")
    length = run.sft.row_length if isinstance(run, SFTRun) else run.rl.row_length
    stays = resident(functions_of(run, place, teacher))
    beside = sum(size for what, size in stays.items() if what not in ("parameters", "optimiser"))
    every = candidates(run.model, place, length, beside)
    if not every:
        raise UserError(
            f"no mesh of {place.name} has room for an update of this model beside the {beside / 1e9:.1f} GB that the"
            " run holds on each device; name a larger slice, or lower engine.pages"
        )
    console.print(f"{len(every)} of all meshes, micro-batches and remat policies may fit; compiling the best")
    found = []
    for at, one in enumerate(every[:COMPILED], 1):
        tried = with_candidate(run, place, one)
        functions = functions_of(tried, place, teacher)
        update = next(function for function in functions if function.name == "policy update")
        planned = plan_function(update, place, assumed_of(tried, None), console, f"{at} of {COMPILED}")
        c, tokens = planned.compiled, one.rows * length
        fits = isinstance(c, Compiled) and c.arguments + c.temporaries + beside < place.chip.memory / place.chip.devices
        seconds = planned.times.estimate if fits else None
        found.append(
            one._asdict()
            | {
                "fsdp": place.devices // one.tp,
                "fits": fits if c is not None else None,
                "beside": beside,
                "arguments": c.arguments if isinstance(c, Compiled) else None,
                "temporaries": c.temporaries if isinstance(c, Compiled) else None,
                "wire": c.each.wire if isinstance(c, Compiled) else None,
                "tokens_per_s_per_chip": tokens / seconds / place.chips if seconds else None,
            }
        )
    return sorted(found, key=lambda one: -(one["tokens_per_s_per_chip"] or -math.inf))


def with_candidate(run: RLRun | SFTRun, place: Slice, one: Candidate) -> RLRun | SFTRun:
    """The run with a candidate's mesh, micro-batches and remat policy."""
    mesh = MeshConfig(name=place.name, data=1, fsdp=place.devices // one.tp, tp=one.tp)
    model = replace(run.model, remat=one.remat)
    if isinstance(run, SFTRun):
        return replace(run, mesh=mesh, model=model, sft=replace(run.sft, rows_per_micro=one.rows))
    return replace(run, mesh=mesh, model=model, rl=replace(run.rl, rows_per_micro=one.rows))


def show_found(found: list[dict], console: Console) -> None:
    """Print the ranked table, with the words that select each candidate."""
    table = Table("words", title="policy update, one micro-batch", title_justify="left", title_style="bold")
    for name in ("arguments", "temporaries", "beside", "sent", "tokens/s and chip"):
        table.add_column(name, justify="right")
    keys = "arguments", "temporaries", "beside", "wire"
    for one in found:
        words = f"mesh.fsdp={one['fsdp']} mesh.tp={one['tp']} rows_per_micro={one['rows']} model.remat={one['remat']}"
        sizes = ("-" if one[key] is None else f"{one[key] / 1e9:,.2f}" for key in keys)
        rate = one["tokens_per_s_per_chip"]
        last = "does not fit" if one["fits"] is False else "-" if rate is None else f"{rate:,.0f}"
        table.add_row(words, *sizes, last)
    console.print(table)
    console.print("GB of one device: of the update; beside: all else that the run holds; sent: for one micro-batch")
