"""Products of activations and weights, and embedding lookups, when devices split both rows and weights.

Each device gathers a weight, computes the gradient of its own rows, and keeps its part of the sum over devices (a
reduce-scatter). Without this code the compiler exchanges the whole sum (an all-reduce), which is twice the bytes.
"""

from functools import partial

import jax
import jax.numpy as jnp

from retool_jax import mesh as meshes


def rows_of(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """The embeddings [B,T,D] of tokens, in the type `dtype`."""
    return _rows(dtype, jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype), table_VD, tokens_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rows(dtype: str, _: jax.ShapeDtypeStruct, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    # Each device looks up its part of D for the tokens of all devices. That sends less than gathering the table.
    found_nD = table_VD.astype(dtype)[_all_tokens(tokens_BT)]
    return meshes.rows_of_columns(found_nD, tokens_BT.shape[1])


def _rows_forward(
    dtype: str, table: jax.ShapeDtypeStruct, table_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _rows(dtype, table, table_VD, tokens_BT), tokens_BT


def _rows_backward(
    _: str, table: jax.ShapeDtypeStruct, tokens_BT: jax.Array, gradient_BTD: jax.Array
) -> tuple[jax.Array, None]:
    # The reverse of the forward pass, so no device holds a gradient of the whole table.
    total = meshes.constrain(jnp.zeros(table.shape, table.dtype), "vocab", "embed")
    return total.at[_all_tokens(tokens_BT)].add(meshes.columns_of(gradient_BTD).astype(table.dtype)), None


_rows.defvjp(_rows_forward, _rows_backward)


def _all_tokens(tokens_BT: jax.Array) -> jax.Array:
    """The ids of all rows, [B*T], on each device."""
    return meshes.constrain(tokens_BT, "rows", "length").reshape(-1)


def product(x: jax.Array, weight: jax.Array, *logical: str) -> jax.Array:
    """Activations [B,T,...] times a weight with these logical axes, which begins with the activations' inner axes."""
    return _product(logical, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(logical: tuple[str, ...], x: jax.Array, weight: jax.Array) -> jax.Array:
    return _times(x, meshes.gathered(weight, *logical))


def _times(x: jax.Array, weight: jax.Array) -> jax.Array:
    B, T = x.shape[:2]
    # The barrier stores the activations first. The TPU's compiler would recompute them for each tile of the product.
    x = jax.lax.optimization_barrier(x)
    flat = jnp.tensordot(x.reshape(B * T, *x.shape[2:]), weight, x.ndim - 2)
    return flat.reshape(B, T, *flat.shape[1:])


def _product_forward(logical: tuple[str, ...], x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple]:
    whole = meshes.gathered(weight, *logical)  # also for the backward pass; only remat=none keeps it until then
    return _times(x, whole), (x, whole)


def _product_backward(logical: tuple[str, ...], kept: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    B, T = x.shape[:2]
    inner, parts = x.ndim - 2, meshes.row_parts(B)
    outer = tuple(range(1, gradient.ndim - 1)), tuple(range(inner, weight.ndim))
    d_x = jnp.tensordot(gradient.reshape(B * T, *gradient.shape[2:]), weight, outer)
    ours, theirs = (y.reshape(parts, B // parts * T, *y.shape[2:]) for y in (x, gradient))
    d_weight = jax.lax.dot_general(ours, theirs, (((1,), (1,)), ((0,), (0,))))
    return d_x.reshape(x.shape), meshes.scattered_sum(d_weight, *logical)


_product.defvjp(_product_forward, _product_backward)
