"""Attention of one token a row with a paged cache, on a GPU: a Triton kernel that reads pages in place.

A batch has too few rows and heads to fill a GPU, and its rows have different lengths. So a row is cut into `PARTS`
equal parts, and each program of the kernel reads one part of one row for one key head. The results of the parts are
combined with the maxima and sums of their softmaxes (arXiv 2311.01282, section 3).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

PARTS = 4  # of a row
KEYS = 64  # keys that a program reads at a time
QUERIES = 16  # the least number of rows of a product; the queries of a key head are padded to it
UNSEEN = float(jnp.finfo(jnp.float32).min)


def paged_decode(
    q_BNH: jax.Array, pages: jax.Array, table_BP: jax.Array, lengths_B: jax.Array, interpret: bool = False
) -> jax.Array:
    """The result of `attention.attend` for one query a row over the first `lengths` tokens of its pages; [B,N,H].

    `pages` is the pool of `cache.py`, [pages, page, 2K, H], and `table` has each row's pages. Scores and sums are fp32.
    The page size and H must be powers of two, and H at least 16. A row of length 0 gives finite meaningless numbers.
    `interpret` runs without a GPU, for tests.
    """
    B, N, H = q_BNH.shape
    page_size, K = pages.shape[1], pages.shape[2] // 2
    together = max(KEYS // page_size, 1)  # pages
    keys, G = together * page_size, N // K
    padded = max(QUERIES, pl.next_power_of_2(G))
    q_BKGH = jnp.pad(q_BNH.reshape(B, K, G, H), ((0, 0), (0, 0), (0, padded - G), (0, 0)))
    table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % together)))

    def kernel(q_ref, pages_ref, table_ref, length_ref, mixed_ref, highest_ref, total_ref) -> None:
        head, part = pl.program_id(1), pl.program_id(2)
        length = length_ref[0]
        blocks = pl.cdiv(length, keys)
        q_GH = q_ref[...]

        def read(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            mixed, highest, total = carry
            own = table_ref[pl.ds(at * together, together)]
            k_SH = pages_ref[own, :, 2 * head, :].reshape(keys, H)
            v_SH = pages_ref[own, :, 2 * head + 1, :].reshape(keys, H)
            seen_S = at * keys + jnp.arange(keys) < length
            scores_GS = jnp.dot(q_GH, k_SH.T, preferred_element_type=jnp.float32) * H**-0.5
            scores_GS = jnp.where(seen_S[None], scores_GS, UNSEEN)
            new = jnp.maximum(highest, scores_GS.max(axis=1))
            weights_GS, shrunk = jnp.exp(scores_GS - new[:, None]), jnp.exp(highest - new)
            v_SH = jnp.where(seen_S[:, None], v_SH, 0)  # an earlier owner of the page may have left NaN
            part_GH = jnp.dot(weights_GS.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
            return mixed * shrunk[:, None] + part_GH, new, total * shrunk + weights_GS.sum(axis=1)

        zeros = jnp.zeros((padded,), jnp.float32)
        start = jnp.zeros((padded, H), jnp.float32), zeros + UNSEEN, zeros
        first, last = part * blocks // PARTS, (part + 1) * blocks // PARTS
        mixed_ref[...], highest_ref[...], total_ref[...] = jax.lax.fori_loop(first, last, read, start)

    own_head = pl.BlockSpec((None, None, padded, H), lambda b, k, c: (b, k, 0, 0))
    by_part = (B, K, PARTS, padded)
    own_part = pl.BlockSpec((None, None, None, padded), lambda b, k, c: (b, k, c, 0))
    mixed, highest, total = pl.pallas_call(
        kernel,
        grid=(B, K, PARTS),
        in_specs=[
            own_head,
            pl.BlockSpec(pages.shape, lambda b, k, c: (0, 0, 0, 0)),
            pl.BlockSpec((None, table_BP.shape[1]), lambda b, k, c: (b, 0)),
            pl.BlockSpec((1,), lambda b, k, c: (b,)),
        ],
        out_specs=[pl.BlockSpec((None, None, None, padded, H), lambda b, k, c: (b, k, c, 0, 0)), own_part, own_part],
        out_shape=[
            jax.ShapeDtypeStruct((*by_part, H), jnp.float32),
            jax.ShapeDtypeStruct(by_part, jnp.float32),
            jax.ShapeDtypeStruct(by_part, jnp.float32),
        ],
        compiler_params=None if interpret else triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="paged_decode",
    )(q_BKGH, pages, table_BP, lengths_B)
    weights = jnp.exp(highest - highest.max(axis=2, keepdims=True))
    total = jnp.maximum((total * weights).sum(axis=2), jnp.finfo(jnp.float32).tiny)
    mixed = (mixed * weights[..., None]).sum(axis=2) / total[..., None]
    return mixed[:, :, :G].reshape(B, N, H).astype(q_BNH.dtype)
