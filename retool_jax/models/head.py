"""The head in training: log-probabilities and entropies of given tokens, without the logits of whole rows."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retool_jax import mesh as meshes
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, head_precision, head_weight, logits_of

CHUNKS = 8  # the number of chunks of a device's tokens, so that a batch with few wanted tokens costs little
LEAST_CHUNK = 128  # tokens; with fewer, a product with the vocabulary is inefficient


class Numerics(NamedTuple):
    """Static arguments of the computation."""

    config: ModelConfig
    temperature: float
    entropy_gradient: bool


def given_logprobs(
    config: ModelConfig,
    params: Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    temperature: float,
    entropy_gradient: bool = False,
    wanted_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets under softmax(logits / temperature), and its entropies; both [B,T] fp32.

    Where `wanted` is false both are 0 and nothing is computed: each device loops over chunks of the wanted tokens of
    its own rows. At most `config.head_chunk` tokens of a device have logits at any time; the backward pass computes
    them again. Entropies carry a gradient only with `entropy_gradient`.
    """
    (B, T), devices = targets_BT.shape, meshes.row_parts(targets_BT.shape[0])
    tokens = B * T // devices
    chunk = min(config.head_chunk, max(-(-tokens // CHUNKS), LEAST_CHUNK), tokens)

    def by_device(x: jax.Array) -> jax.Array:
        """[B,T,...] to [devices,tokens,...]; a device has consecutive rows."""
        return x.reshape(devices, tokens, *x.shape[2:])

    wanted = jnp.ones((devices, tokens), bool) if wanted_BT is None else by_device(wanted_BT)
    order = jnp.argsort(~wanted, axis=1)  # wanted tokens first; a stable sort
    numerics = Numerics(config, temperature, entropy_gradient)
    rows = by_device(hidden_BTD), by_device(targets_BT), order, jnp.max(jnp.sum(wanted, 1))
    sorted_results = _visit(numerics, chunk, head_weight(config, params), *rows)
    back = jnp.argsort(order, axis=1)
    logprobs, entropy = (jnp.where(wanted, _take(x, back), 0.0).reshape(B, T) for x in sorted_results)
    return logprobs, entropy


def _on_each(function: Callable, *arrays: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
    """Apply a function to each device's part of arrays [devices,...]."""
    if arrays[0].shape[0] > 1:
        return jax.vmap(function)(*arrays)
    # Sums over the last axis of [1,c,V] take XLA's CPU backend ten times as long as those of [c,V].
    return jax.tree.map(lambda x: x[None], function(*(x[0] for x in arrays)))


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
    """The entries of [devices,tokens,...] in the order [devices,tokens]."""
    return _on_each(lambda values, places: values[places], x, order)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _visit(numerics: Numerics, chunk: int, weight_VD: jax.Array, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of the first `count` tokens in the given order, [devices,tokens] each; the rest is 0.

    `rows` are hidden states [devices,tokens,D], targets and order [devices,tokens], and the count.
    """
    return _forward(numerics, chunk, weight_VD, *rows)[0]


def _forward(
    numerics: Numerics,
    chunk: int,
    weight_VD: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    order: jax.Array,
    count: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    parts = _chunks(chunk, order)
    # Gather the weight once, instead of once for every chunk.
    split = order.shape[0] > 1
    weight_VD = (meshes.gathered if split else meshes.constrain)(weight_VD, "vocab", "embed" if split else "model")

    def body(index: jax.Array, seen: jax.Array) -> jax.Array:
        here = _part(parts, index, chunk)
        given = partial(_given, numerics, weight_VD)
        results = jnp.stack(_on_each(given, _take(hidden, here), _take(targets, here)))
        return jax.lax.dynamic_update_slice_in_dim(seen, results, index * chunk, 2)

    zeros = meshes.constrain(jnp.zeros((3, *parts.shape)), None, "batch", "length")
    seen = jax.lax.fori_loop(0, -(-count // chunk), body, zeros)
    logprobs, entropy = seen[:2, :, : order.shape[1]]
    return (logprobs, entropy), (weight_VD, hidden, targets, order, count, seen[2], seen[1])


def _backward(numerics: Numerics, chunk: int, kept: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    weight_VD, hidden, targets, order, count, *values = kept
    parts = _chunks(chunk, order)
    more = parts.shape[1] - order.shape[1]
    devices, D = order.shape[0], hidden.shape[-1]
    # The exchanged gradient has D first: parts of the last axis would not be whole lanes of a TPU.
    axes, whole = ("DV", ("model", "vocab")) if devices > 1 else ("VD", ("vocab", "model"))
    # The padding of the last chunk has a gradient of 0 and its own normaliser; with another one p could be infinite.
    values = jnp.stack([*values, *(jnp.pad(x, ((0, 0), (0, more))) for x in gradients)])

    def one_device(hidden: jax.Array, targets: jax.Array, *values: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = logits_of(numerics.config, weight_VD, hidden) / numerics.temperature
        slope_cV = _slope(numerics, scaled, targets, *values) / numerics.temperature
        precision = head_precision(numerics.config)
        # These products need no transposed copies of their factors on XLA's CPU backend.
        d_weight = jnp.einsum(f"cV,cD->{axes}", slope_cV, hidden.astype(jnp.float32), precision=precision)
        return d_weight, jnp.einsum("cV,VD->cD", slope_cV, weight_VD.astype(jnp.float32), precision=precision)

    def body(index: jax.Array, carry: tuple) -> tuple:
        d_weight, d_hidden = carry
        here = _part(parts, index, chunk)
        chunk_values = jax.lax.dynamic_slice_in_dim(values, index * chunk, chunk, 2)
        weight, states = _on_each(one_device, _take(hidden, here), _take(targets, here), *chunk_values)
        d_weight = meshes.constrain(d_weight + weight, "batch", *whole)
        return d_weight, jax.lax.dynamic_update_slice_in_dim(d_hidden, states.astype(hidden.dtype), index * chunk, 1)

    # Each device sums the gradients of its own tokens in fp32, and the sums are exchanged once.
    shape = weight_VD.shape if axes == "VD" else weight_VD.shape[::-1]
    d_weight = meshes.constrain(jnp.zeros((devices, *shape)), "batch", *whole)
    d_hidden = meshes.constrain(jnp.zeros((*parts.shape, D), hidden.dtype), "batch", "length", "model")
    d_weight, d_hidden = jax.lax.fori_loop(0, -(-count // chunk), body, (d_weight, d_hidden))
    d_hidden = _take(d_hidden, jnp.argsort(order, axis=1))  # back to the order of the tokens
    if devices == 1:
        d_weight = d_weight[0]
    else:
        # Exchange before anything else: until then each device holds an fp32 sum of the whole weight's size.
        d_weight = meshes.scattered_sum(d_weight, "embed", "vocab").T
        d_weight, d_hidden = jax.lax.optimization_barrier((d_weight, d_hidden))
    return d_weight.astype(weight_VD.dtype), d_hidden, None, None, None


_visit.defvjp(_forward, _backward)


def _chunks(chunk: int, order: jax.Array) -> jax.Array:
    """The order, padded to whole chunks with index 0; the gradient of the padding is 0."""
    return jnp.pad(order, ((0, 0), (0, -order.shape[1] % chunk)))


def _part(parts: jax.Array, index: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(parts, index * chunk, chunk, 1)


def _given(
    numerics: Numerics, weight_VD: jax.Array, hidden_cD: jax.Array, targets_c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability, entropy and the logarithm of the softmax's denominator of each token, [c] each."""
    scaled = logits_of(numerics.config, weight_VD, hidden_cD) / numerics.temperature
    normaliser = jax.nn.logsumexp(scaled, axis=-1)
    logprobs = scaled - normaliser[:, None]
    # A masked sum over the vocabulary, since a gather would need all logits in memory.
    chosen = jnp.sum(jnp.where(_is_target(scaled, targets_c), logprobs, 0.0), axis=-1)
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1), normaliser


def _is_target(scaled_cV: jax.Array, targets_c: jax.Array) -> jax.Array:
    return jnp.arange(scaled_cV.shape[1]) == targets_c[:, None]


def _slope(
    numerics: Numerics,
    scaled_cV: jax.Array,
    targets_c: jax.Array,
    normaliser_c: jax.Array,
    entropy_c: jax.Array,
    d_logprobs_c: jax.Array,
    d_entropy_c: jax.Array,
) -> jax.Array:
    """The gradient of scaled logits z, [c,V]: with p = softmax(z) and its entropy H,

    d log p(target) / dz = [v = target] - p   and   dH / dz = -p (log p + H).
    """
    logprobs = scaled_cV - normaliser_c[:, None]
    p = jnp.exp(logprobs)
    slope = jnp.where(_is_target(scaled_cV, targets_c), d_logprobs_c[:, None], 0.0) - p * d_logprobs_c[:, None]
    if numerics.entropy_gradient:
        slope -= d_entropy_c[:, None] * p * (logprobs + entropy_c[:, None])
    return slope
