"""Products of tokens and weights, in the form that a backend is fast at.

XLA's CPU backend (jax 0.10.2) takes the processor's bf16 instructions where the result is fp32 and the first factor
lies in memory as it is multiplied, row by row. That of a weight's gradient is the activations turned round, so there
it would run at half the speed: here they are written down turned.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def by_weight(x: jax.Array, weight: jax.Array, on_cpu: bool) -> jax.Array:
    """Tokens [n,...] times a weight that begins with their inner axes: [n,...] in their dtype.

    `on_cpu` is for one device of the CPU backend.
    """
    inner = x.ndim - 1
    if not on_cpu or x.dtype != jnp.bfloat16:
        return jnp.tensordot(x, weight, inner)
    flat = _half(x.reshape(len(x), -1), weight.reshape(x[0].size, -1))
    return flat.reshape(len(x), *weight.shape[inner:])


@jax.custom_vjp
def _half(x_nI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    return _summed_wide("nI,IO->nO", x_nI, weight_IO)


def _forward(x_nI: jax.Array, weight_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _half(x_nI, weight_IO), (x_nI, weight_IO)


def _backward(kept: tuple[jax.Array, jax.Array], gradient_nO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_nI, weight_IO = kept
    x_In = with_layout_constraint(x_nI.T, Layout(major_to_minor=(0, 1)))
    return _summed_wide("nO,IO->nI", gradient_nO, weight_IO), _summed_wide("In,nO->IO", x_In, gradient_nO)


_half.defvjp(_forward, _backward)


def _summed_wide(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)
