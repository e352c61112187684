"""The KV cache: one array each for keys and values over all layers, passed through the model as data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retool_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values, [L,B,S,K,H]; row b holds one trajectory, entry s the token at position s.

    Nothing records how much of a row is valid: a query at position p sees entries 0..p, and every entry up to p
    has been written by then. So giving tokens back is only an integer, and stale entries are never seen.
    """

    k: jax.Array
    v: jax.Array


def init_cache(config: ModelConfig, rows: int, length: int) -> KVCache:
    """An empty cache for `rows` trajectories of at most `length` tokens."""
    shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.cache_dtype), jnp.zeros(shape, config.cache_dtype))


def write_layer(
    cache: KVCache, layer: jax.Array, rows_B1: jax.Array, positions_BT: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
) -> KVCache:
    """Scatter one layer's new entries in place; rows or positions outside the cache are padding and dropped."""
    at = (layer, rows_B1, positions_BT)
    return KVCache(
        cache.k.at[at].set(k_BTKH.astype(cache.k.dtype), mode="drop"),
        cache.v.at[at].set(v_BTKH.astype(cache.v.dtype), mode="drop"),
    )


def fork_rows(cache: KVCache, source_M: jax.Array, target_M: jax.Array) -> KVCache:
    """Copy rows: target[m] becomes source[m]; targets outside the cache are padding and dropped."""
    return KVCache(
        cache.k.at[:, target_M].set(cache.k[:, source_M], mode="drop"),
        cache.v.at[:, target_M].set(cache.v[:, source_M], mode="drop"),
    )
