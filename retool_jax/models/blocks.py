"""Causal attention of packed rows in blocks of plain products, for backends without an attention kernel.

Scores are computed for one block of queries and one block of keys at a time, in the forward pass (arXiv 2307.08691,
algorithm 1) and in the backward pass (algorithm 2). Blocks that no query sees are skipped, and no array has the size
T x T. Products have their batch dimensions first, since XLA's CPU backend would copy other forms.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # the checkpoint name of attention's residuals, which remat=dots saves
CPU_BLOCK, BLOCK = 64, 512  # queries and keys of a block
CPU_SCORES = 1 << 16  # the most scores of all heads and rows at a time, so that a core's cache holds them
UNSEEN = jnp.finfo(jnp.float32).min


class Seen(NamedTuple):
    """The keys of its row that each query t sees, [B,T] int32: `start` to t, and [prefix, prefix_stop) before them."""

    start: jax.Array
    prefix: jax.Array  # the first key of the prefix; equal to `start` if there is none
    prefix_stop: jax.Array  # one after its last key; 0 if there is none


def blocked_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seen: Seen, on_cpu: bool = True
) -> jax.Array:
    """The result of `attention.attend` if queries see only these keys; [B,T,N,H]."""
    B, T, N = q_BTNH.shape[:3]
    count = -(-T // (CPU_BLOCK if on_cpu else BLOCK))
    block = -(-T // (8 * count)) * 8  # blocks of equal size, a multiple of 8 for vector instructions
    padding = count * block - T
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    start, prefix = (jnp.pad(x, ((0, 0), (0, padding)), constant_values=T) for x in (seen.start, seen.prefix))
    seen = Seen(start, prefix, jnp.pad(seen.prefix_stop, ((0, 0), (0, padding))))
    most = max(CPU_SCORES // (N * block * block), 1) if on_cpu else B
    rows = next(size for size in range(min(most, B), 0, -1) if B % size == 0)

    def visit(group: tuple) -> jax.Array:
        return _attend(block, *group)

    if rows == B:
        mixed = visit((q, k, v, seen))
    else:
        groups = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), (q, k, v, seen))
        mixed = jax.lax.map(visit, groups).reshape(q.shape)
    return mixed[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block: int, q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen) -> jax.Array:
    return _forward(block, q, k, v, seen)[0]


def _forward(
    block: int, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, seen: Seen
) -> tuple[jax.Array, tuple]:
    """The attention, and the residuals for the gradient, among them the logarithm of each softmax's denominator."""
    q, k, v = _queries_first(q_BTNH, k_BTKH.shape[2]), _heads_first(k_BTKH), _heads_first(v_BTKH)
    B, K, G, T, H = q.shape

    def query_block(i: jax.Array, results: tuple) -> tuple:
        mixed_all, denominators = results
        q_i = _part(q, i, block, 3)
        first, last, key_block = _visits(seen, block, i)

        def add_keys(n: jax.Array, carry: tuple) -> tuple:
            j, (mixed, highest, total) = key_block(n), carry
            scores = jnp.where(_mask(seen, block, i, j), _scores(q_i, _part(k, j, block, 2)), UNSEEN)
            new = jnp.maximum(highest, scores.max(-1, keepdims=True))
            weights, shrunk = jnp.exp(scores - new), jnp.exp(highest - new)
            part = _product("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), _part(v, j, block, 2))
            return mixed * shrunk + part, new, total * shrunk + weights.sum(-1, keepdims=True)

        column = jnp.zeros((B, K, G, block, 1))
        carry = jnp.zeros((B, K, G, block, H)), column + UNSEEN, column
        mixed, highest, total = jax.lax.fori_loop(first, last, add_keys, carry)
        mixed_all = _put(mixed_all, (mixed / total).astype(q.dtype), i, block, 3)
        return mixed_all, _put(denominators, highest + jnp.log(total), i, block, 3)

    results = jnp.zeros_like(q), jnp.zeros((B, K, G, T, 1))
    mixed, denominators = jax.lax.fori_loop(0, T // block, query_block, results)
    mixed_BTNH = checkpoint_name(mixed.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape), ATTENTION)
    denominators = checkpoint_name(denominators, ATTENTION)
    return mixed_BTNH, (q_BTNH, k_BTKH, v_BTKH, seen, mixed_BTNH, denominators)


def _backward(block: int, kept: tuple, gradient_BTNH: jax.Array) -> tuple:
    """Gradients of q, k and v. Those of k and v are summed as [H,T], so that no block of scores is transposed."""
    q_BTNH, k_BTKH, v_BTKH, seen, mixed_BTNH, denominators = kept
    q, k, v = _queries_first(q_BTNH, k_BTKH.shape[2]), _heads_first(k_BTKH), _heads_first(v_BTKH)
    gradient, mixed = (_queries_first(x, k.shape[1]) for x in (gradient_BTNH, mixed_BTNH))
    (B, K, G, T, H), scale = q.shape, q.shape[-1] ** -0.5
    # The gradient of a softmax is weight x (gradient - sum of weight x gradient); the sum equals this product.
    sums = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), -1, keepdims=True)

    def query_block(i: jax.Array, gradients: tuple) -> tuple:
        dq, dk, dv = gradients
        q_i, gradient_i, sums_i, denominators_i = (_part(x, i, block, 3) for x in (q, gradient, sums, denominators))
        first, last, key_block = _visits(seen, block, i)

        def add_keys(n: jax.Array, carry: tuple) -> tuple:
            j, (dq_i, dk, dv) = key_block(n), carry
            k_j, v_j = _part(k, j, block, 2), _part(v, j, block, 2)
            scores = _scores(q_i, k_j) - denominators_i
            weights = jnp.where(_mask(seen, block, i, j), jnp.exp(scores), 0.0)
            d_weights = _product("BKGTH,BKSH->BKGTS", gradient_i, v_j)
            d_scores = (weights * (d_weights - sums_i) * scale).astype(q.dtype)
            dk_j = _product("BKGTS,BKGTH->BKHS", d_scores, q_i)
            dv_j = _product("BKGTS,BKGTH->BKHS", weights.astype(v.dtype), gradient_i)
            dk = _put(dk, _part(dk, j, block, 3) + dk_j, j, block, 3)
            dv = _put(dv, _part(dv, j, block, 3) + dv_j, j, block, 3)
            return dq_i + _product("BKGTS,BKSH->BKGTH", d_scores, k_j), dk, dv

        carry = jnp.zeros((B, K, G, block, H)), dk, dv
        dq_i, dk, dv = jax.lax.fori_loop(first, last, add_keys, carry)
        return _put(dq, dq_i.astype(q.dtype), i, block, 3), dk, dv

    gradients = jnp.zeros_like(q), jnp.zeros((B, K, H, T)), jnp.zeros((B, K, H, T))
    dq, dk, dv = jax.lax.fori_loop(0, T // block, query_block, gradients)
    dq_BTNH = dq.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    return dq_BTNH, *(x.transpose(0, 3, 1, 2).astype(k.dtype) for x in (dk, dv)), None


_attend.defvjp(_forward, _backward)


def _queries_first(x_BTNH: jax.Array, K: int) -> jax.Array:
    """[B,K,G,T,H]: queries grouped by their key head."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _heads_first(x_BTKH: jax.Array) -> jax.Array:
    return x_BTKH.transpose(0, 2, 1, 3)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return _product("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH) * q_BKGTH.shape[-1] ** -0.5


def _part(x: jax.Array, i: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _put(x: jax.Array, part: jax.Array, i: jax.Array, block: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * block, axis)


def _visits(seen: Seen, block: int, i: jax.Array) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """The key blocks that queries of block i see in any row: the bounds of a loop, and the key block of its index n.

    They are the blocks of prefixes and then, after a gap, those from the first own key to block i. It is enough to look
    at the first query of block i: whatever else later queries see begins after that query, so it is in block i.
    """
    start, prefix, prefix_stop = (jax.lax.dynamic_index_in_dim(x, i * block, 1) for x in seen)
    own, first = jnp.min(start) // block, jnp.min(prefix) // block
    stop = jnp.clip(-(-jnp.max(prefix_stop) // block), first, own)
    return first, i + 1 - (own - stop), lambda n: jnp.where(n < stop, n, n + own - stop)


def _mask(seen: Seen, block: int, i: jax.Array, j: jax.Array) -> jax.Array:
    """Which keys of block j the queries of block i see, [B,1,1,T,S]."""
    queries, keys = i * block + jnp.arange(block)[:, None], j * block + jnp.arange(block)
    start, prefix, prefix_stop = (_part(x, i, block, 1)[:, :, None] for x in seen)
    seen_BTS = (keys <= queries) & (keys >= start) | (keys >= prefix) & (keys < prefix_stop)
    return seen_BTS[:, None, None]
