"""Floating-point operations and bytes by formula, and the least and the estimated time that a chip needs for them."""

from typing import NamedTuple

from retool_jax.models.config import ModelConfig
from retool_jax.plan.compiler import Compiled
from retool_jax.plan.functions import Function
from retool_jax.slices import Chip

KERNEL = 0.6  # assumed share of a chip's peak for attention's kernels, of which the compiler has no estimate
BACKWARD = 3.5  # FLOPs of attention's backward relative to its forward: two kernels that recompute the scores
WHOLE = ("full", "offload")  # remat policies that compute whole layers again


class Work(NamedTuple):
    """The work of a micro-batch, a call of the engine or a decoded token of each row, on all devices together."""

    model_flops: float  # without recomputation
    flops: float
    attention_flops: float  # the part of `flops` in attention
    bytes: float  # weights and cache that are read, on the device that reads most


def matrix_weights(model: ModelConfig) -> int:
    """Number of weights that each token is multiplied with: all except the embedding, norms and biases."""
    D, N, K, H, F = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim, model.intermediate_size
    return model.num_layers * (D * (N + 2 * K) * H + N * H * D + 3 * D * F) + head_weights(model)


def head_weights(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def attention_flops(model: ModelConfig, tokens: float, keys: float) -> float:
    """FLOPs of attention for tokens that see `keys` keys on average: two products for each layer and head."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * tokens * keys


def forward_flops(model: ModelConfig, tokens: float, keys: float) -> float:
    return 2 * matrix_weights(model) * tokens + attention_flops(model, tokens, keys)


def work_of(function: Function, context: float, length: float | None = None) -> Work:
    """The work of one unit of a function.

    `context` is the average number of tokens in an engine's rows. `length` is that of the packed sequences; it counts
    for `model_flops`. The kernels' `flops` count whole rows, of which a token sees half on average.
    """
    model, tokens, mesh = function.model, function.rows * function.length, function.mesh
    weights = 2.0 * matrix_weights(model) / mesh.shape["tp"]
    if function.kind in ("update", "score"):
        keys = function.length / 2
        once, attention = forward_flops(model, tokens, keys), attention_flops(model, tokens, keys)
        wanted = forward_flops(model, tokens, (length or function.length) / 2)
        if function.kind == "score":
            return Work(wanted, once, attention, weights)
        head = 2 * head_weights(model) * tokens  # logits are always computed again
        whole = model.remat in WHOLE
        again = once - head if whole else 0.0  # other policies keep products and attention
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
    """Seconds of one unit of a function; None if not known."""

    roofline: float | None  # the largest of products at peak, memory at its rate, and links at their rate
    estimate: float | None  # the sum of the compiler's cycles, attention's kernels, and links


def times_of(function: Function, work: Work, compiled: Compiled | None, chip: Chip) -> Times:
    """The times of a unit. The compiler's cycles leave out attention: in the engine reading memory, else computing."""
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
