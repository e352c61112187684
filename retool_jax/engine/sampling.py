"""Draw the next token, with the log-probabilities of the draw.

A token is drawn by inverting a cumulative sum twice: first to find its block of the vocabulary, then its place in the
block. That takes two random words per row, where Gumbel noise takes a random word and two logarithms for each of 152k
tokens, and it needs no pass over the vocabulary beyond that of the log-probability. If the vocabulary is split over
devices, no block spans two shards, so nothing larger than the blocks' masses leaves a device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOP = np.uint32(1 << 31)  # not a JAX array: hosts must connect (jax.distributed) before the first one is created
WHOLE_BLOCKS = 2048  # blocks without padding are used if their number plus their width is at most this


class Sampling(NamedTuple):
    """Sampling parameters of each row, arrays [B]."""

    temperature: jax.Array  # float32; 0 is greedy
    top_k: jax.Array  # int32: only the k most likely tokens; 0 is off
    top_p: jax.Array  # float32: only the most likely of these tokens that together reach p of their mass; 1 is off


class Draw(NamedTuple):
    """The drawn tokens and their log-probabilities, arrays [B]."""

    tokens: jax.Array  # int32
    logprobs: jax.Array  # float32: of the distribution after temperature, top_k and top_p
    plain_logprobs: jax.Array  # float32: of softmax(logits / temperature), which the trainer computes


def row_keys(run_key: jax.Array, requests_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """One key per row, a function of only the run, the request and the token's position in its trajectory.

    So a draw does not depend on the slot, on other rows, on when tools answered or on how many steps are fused.
    """
    return jax.vmap(lambda request, position: jax.random.fold_in(jax.random.fold_in(run_key, request), position))(
        requests_B, positions_B
    )


def sample(logits_BV: jax.Array, keys_B: jax.Array, how: Sampling, shards: int = 1) -> Draw:
    """One token per row. Temperature 0 is greedy (the first of equals); its log-probabilities are of temperature 1.

    `shards` is the number of devices that the vocabulary is split over.
    """
    greedy_B = how.temperature <= 0.0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, how.temperature)[:, None]
    truncated = ~greedy_B & ((how.top_k > 0) | (how.top_p < 1.0))
    lowest_B = jax.lax.cond(
        jnp.any(truncated),
        lambda: jnp.where(truncated, threshold(scaled_BV, how.top_k, how.top_p), -jnp.inf),
        lambda: jnp.full(greedy_B.shape, -jnp.inf),
    )
    top_B = jnp.max(scaled_BV, axis=-1)
    # A greedy row draws only from its likeliest tokens, with the uniform number 0, which selects the first of them.
    floor_B = jnp.where(greedy_B, top_B, lowest_B)
    B, V = scaled_BV.shape
    part = V // shards
    width = block_width(V, shards)
    blocks = -(-part // width)  # of a shard
    shards_BSP = scaled_BV.reshape(B, shards, part)
    padding = (0, 0), (0, 0), (0, blocks * width - part)
    blocks_BCW = jnp.pad(shards_BSP, padding, constant_values=-jnp.inf).reshape(B, shards * blocks, width)
    mass_BCW = jnp.exp(blocks_BCW - top_B[:, None, None])
    kept_BCW = jnp.where(blocks_BCW >= floor_B[:, None, None], mass_BCW, 0.0)
    kept_BC = sum_short(kept_BCW)
    all_B, kept_B = jnp.sum(mass_BCW, (1, 2)), jnp.sum(kept_BCW, (1, 2))
    bits_B2 = jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys_B) >> 8
    uniform_B2 = jnp.where(greedy_B[:, None], 0.0, bits_B2.astype(jnp.float32) * 2.0**-24)
    block_B = invert(kept_BC, uniform_B2[:, 0])
    block_BW = jnp.take_along_axis(blocks_BCW, block_B[:, None, None], axis=1)[:, 0]
    inside_BW = jnp.where(block_BW >= floor_B[:, None], jnp.exp(block_BW - top_B[:, None]), 0.0)
    place_B = invert(inside_BW, uniform_B2[:, 1])
    chosen_B = jnp.take_along_axis(block_BW, place_B[:, None], axis=1)[:, 0] - top_B
    plain_B = chosen_B - jnp.log(all_B)
    drawn_B = jnp.where(greedy_B, plain_B, chosen_B - jnp.log(kept_B))
    shard_B, own_B = block_B // blocks, block_B % blocks
    return Draw(shard_B * part + own_B * width + place_B, drawn_B, plain_B)


def sum_short(x: jax.Array) -> jax.Array:
    """The sum over the last axis. For an axis of 2, XLA's CPU backend takes ten times as long as for an addition."""
    return x[..., 0] + x[..., 1] if x.shape[-1] == 2 else jnp.sum(x, -1)


def block_width(vocabulary: int, shards: int) -> int:
    """The block width that minimises the number of blocks plus the width; the last block of a shard may be padded.

    A divisor of a shard's part of the vocabulary needs no padding. It is used if blocks plus width are at most
    `WHOLE_BLOCKS`, as for all published models. Without this limit a prime number of tokens would give blocks of one
    token, and `invert` a matrix as large as the square of the vocabulary.
    """
    part = vocabulary // shards

    def blocks_and_places(width: int) -> int:
        return shards * -(-part // width) + width

    whole = min((width for width in range(1, part + 1) if part % width == 0), key=blocks_and_places)
    return whole if blocks_and_places(whole) <= WHOLE_BLOCKS else min(range(1, part + 1), key=blocks_and_places)


def invert(mass_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The first index whose cumulative mass exceeds uniform x total, int32 [B]; its own mass is never 0."""
    below = jnp.tril(jnp.ones((mass_BN.shape[1],) * 2, jnp.float32))
    sums_BN = jnp.einsum("BN,MN->BM", mass_BN, below, precision=jax.lax.Precision.HIGHEST)
    found_BN = (sums_BN > uniform_B[:, None] * sums_BN[:, -1:]) & (mass_BN > 0)
    # Sums are rounded: if none exceeds the target, take the last index with mass.
    places = jnp.arange(mass_BN.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(mass_BN > 0, places, 0), axis=1)
    return jnp.minimum(jnp.min(jnp.where(found_BN, places, mass_BN.shape[1]), axis=1), last_B)


def threshold(scaled_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The smallest logit [B] that is kept by top_k and then top_p; tokens equal to it are kept too.

    Both are found by bisection over the 2^32 ordered bit patterns of fp32. That is exact and takes 32 passes over the
    vocabulary each, without a sort. As in `transformers`, top_p counts the mass of the tokens that top_k kept.
    """
    ordered_BV = _ordered(scaled_BV)
    masses_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, -1, keepdims=True))

    def largest(enough) -> jax.Array:
        """The largest pattern [B] such that `enough` is true for the tokens at or above it."""

        def narrow(bit: jax.Array, found_B: jax.Array) -> jax.Array:
            candidate_B = found_B | (TOP >> bit.astype(jnp.uint32))
            return jnp.where(enough(ordered_BV >= candidate_B[:, None]), candidate_B, found_B)

        return jax.lax.fori_loop(0, 32, narrow, jnp.zeros(scaled_BV.shape[0], jnp.uint32))

    k_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, scaled_BV.shape[1]), scaled_BV.shape[1])
    by_k_B = largest(lambda above_BV: jnp.sum(above_BV, -1) >= k_B)
    masses_BV = jnp.where(ordered_BV >= by_k_B[:, None], masses_BV, 0.0)
    goal_B = jnp.minimum(top_p_B, 1.0) * jnp.sum(masses_BV, -1)
    by_p_B = largest(lambda above_BV: jnp.sum(jnp.where(above_BV, masses_BV, 0.0), -1) >= goal_B)
    # Ignore by_p where top_p is off: a sum in another order may reach the total early.
    return _unordered(jnp.where(top_p_B < 1.0, jnp.maximum(by_k_B, by_p_B), by_k_B))


def _ordered(x: jax.Array) -> jax.Array:
    """Map fp32 to uint32, keeping the order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= TOP, ~bits, bits | TOP)


def _unordered(bits: jax.Array) -> jax.Array:
    """The inverse of `_ordered`."""
    return jax.lax.bitcast_convert_type(jnp.where(bits >= TOP, bits & ~TOP, ~bits), jnp.float32)
