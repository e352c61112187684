"""Products of tokens and weights, in the form that is fast on a backend.

XLA's CPU backend (jax 0.10.2) uses the processor's bf16 instructions if the result is fp32 and the first factor is
stored row by row in the order of the product. For the gradient of a weight the first factor is the transposed
activations, and the product would run at half the speed, so they are stored transposed first.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def by_weight(x: jax.Array, weight: jax.Array, on_cpu: bool) -> jax.Array:
    """Tokens [n,...] times a weight that begins with their inner axes: [n,...] in their dtype.

    `on_cpu` means a single device of the CPU backend.
    """
    inner = x.ndim - 1
    if not on_cpu or x.dtype != jnp.bfloat16:
        return jnp.tensordot(x, weight, inner)
    flat = _bf16_product(x.reshape(len(x), -1), weight.reshape(x[0].size, -1))
    return flat.reshape(len(x), *weight.shape[inner:])


@jax.custom_vjp
def _bf16_product(x_nI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    return _fp32_sum("nI,IO->nO", x_nI, weight_IO)


def _forward(x_nI: jax.Array, weight_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bf16_product(x_nI, weight_IO), (x_nI, weight_IO)


def _backward(kept: tuple[jax.Array, jax.Array], gradient_nO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_nI, weight_IO = kept
    x_In = with_layout_constraint(x_nI.T, Layout(major_to_minor=(0, 1)))
    return _fp32_sum("nO,IO->nI", gradient_nO, weight_IO), _fp32_sum("In,nO->IO", x_In, gradient_nO)


_bf16_product.defvjp(_forward, _backward)


def _fp32_sum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum that is summed in fp32 and rounded to the type of x."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)
