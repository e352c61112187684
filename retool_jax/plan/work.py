"""Floating-point operations and bytes by formula, and the time that a chip needs for them at least and by estimate."""

from typing import NamedTuple

from retool_jax.models.config import ModelConfig
from retool_jax.plan.compiler import Compiled
from retool_jax.plan.functions import Function
from retool_jax.slices import Chip

KERNEL = 0.6  # share of a chip's peak at which attention's kernels are taken to run: the compiler says nothing of them
BACKWARD = 3.5  # attention's backward over its forward, in two kernels that compute the scores again
WHOLE = ("full", "offload")  # remat policies by which all of a layer is computed again


class Work(NamedTuple):
    """Of all devices together, for one micro-batch, one call of the engine or one decoded token of each row."""

    model_flops: float  # without what is computed again
    flops: float
    attention_flops: float  # those of `flops` that are attention's
    bytes: float  # weights and cache that are read, on the device that reads most


def matrix_weights(model: ModelConfig) -> int:
    """Weights that each token is multiplied with: all but the embedding, norms and biases."""
    D, N, K, H, F = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim, model.intermediate_size
    return model.num_layers * (D * (N + 2 * K) * H + N * H * D + 3 * D * F) + head_weights(model)


def head_weights(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def attention_flops(model: ModelConfig, tokens: float, keys: float) -> float:
    """Of tokens that see so many keys on average: two products for each layer and head."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * tokens * keys


def forward_flops(model: ModelConfig, tokens: float, keys: float) -> float:
    return 2 * matrix_weights(model) * tokens + attention_flops(model, tokens, keys)


def work_of(function: Function, context: float, length: float | None = None) -> Work:
    """The work of one unit of a function.

    `context` is the number of tokens that the rows of an engine hold on average. `length` is that of the sequences
    which are packed, where attention is counted for the model's sake; kernels look at whole rows, half of each.
    """
    model, tokens, mesh = function.model, function.rows * function.length, function.mesh
    weights = 2.0 * matrix_weights(model) / mesh.shape["tp"]
    if function.kind in ("update", "score"):
        keys = function.length / 2
        once, attention = forward_flops(model, tokens, keys), attention_flops(model, tokens, keys)
        wanted = forward_flops(model, tokens, (length or function.length) / 2)
        if function.kind == "score":
            return Work(wanted, once, attention, weights)
        head = 2 * head_weights(model) * tokens  # whose logits are computed again in any case
        whole = model.remat in WHOLE
        again = once - head if whole else 0.0  # products and attention are kept otherwise
        passes = 2 + whole
        attention *= 1 + BACKWARD + whole
        return Work(3 * wanted, 3 * once + again + head, attention, passes * weights)
    if function.kind == "reshard":
        return Work(0.0, 0.0, 0.0, weights)
    keys = context if function.kind == "decode" or function.length < context else function.length / 2
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * _width(model.cache_dtype)
    read = function.rows * keys * cache / mesh.size * (mesh.shape["data"] if function.rows % mesh.shape["data"] else 1)
    flops = forward_flops(model, tokens, keys)
    attention = 0.0 if function.kind == "decode" else attention_flops(model, tokens, keys)
    return Work(flops, flops, attention, weights + read)


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


class Times(NamedTuple):
    """Seconds of one unit of a function; None where nothing is known."""

    roofline: float | None  # the longest of products at peak, memory at its rate and links at theirs
    estimate: float | None  # the compiler's cycles, attention's kernels and links, one after another


def times_of(function: Function, work: Work, compiled: Compiled | None, chip: Chip) -> Times:
    """What a unit takes. A decoded token's attention reads memory, which its cycles leave out; others' compute."""
    if not chip.flops:
        return Times(None, None)
    peak, rate, link = (x / chip.devices for x in (chip.flops, chip.memory_rate, chip.link_rate))
    cost = None if compiled is None else compiled.each if function.unknown else compiled.fixed
    wire = cost.wire / link if cost else 0.0
    roofline = max(work.flops / function.mesh.size / peak, work.bytes / rate, wire)
    if cost is None or not chip.clock_hz:
        return Times(roofline, None)
    kernels = work.attention_flops / function.mesh.size / (KERNEL * peak)
    if function.kind in ("decode", "extend"):
        kernels += (work.bytes - 2.0 * matrix_weights(function.model) / function.mesh.shape["tp"]) / rate
    return Times(roofline, cost.cycles / chip.clock_hz + kernels + wire)
