"""Grouped-query attention and rotary positions, as pure functions."""

import jax
import jax.numpy as jnp


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention of N query heads over K key heads; scores and softmax in fp32.

    Returns [B,T,N,H] in q's dtype. A query that may see no key gets the mean of all values: such rows are
    padding, and finite garbage is easier to mask than NaN.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def packed_mask(segments_BT: jax.Array) -> jax.Array:
    """[B,T,T]: query t sees key s when s <= t and both belong to the same segment of a packed row."""
    T = segments_BT.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) with Qwen's layout: the two halves of a head are the pairs."""
    H = x_BTNH.shape[-1]
    frequencies = theta ** (-jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)
