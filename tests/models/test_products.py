"""Products of tokens and weights in the form that is fast in bf16 on a CPU: as close to fp32 as the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.models.products import by_weight


@pytest.mark.parametrize(("inner", "outer"), [((24,), (2, 16)), ((2, 12), (40,))])
def test_half_precision_is_as_near_to_fp32_as_the_plain_form(inner, outer):
    shapes = (32, *inner), (*inner, *outer), (32, *outer)
    rng = np.random.default_rng(0)
    half = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def outputs_and_gradients(arrays: list[jax.Array], on_cpu: bool) -> list[jax.Array]:
        x, weight, cotangent = arrays

        def product(x: jax.Array, weight: jax.Array) -> jax.Array:
            return by_weight(x, weight, on_cpu)

        y, back = jax.vjp(product, x, weight)
        return [y, *back(cotangent)]

    exact = outputs_and_gradients([x.astype(jnp.float32) for x in half], on_cpu=True)
    fast, plain = (outputs_and_gradients(half, on_cpu) for on_cpu in (True, False))
    for ours, usual, reference in zip(fast, plain, exact, strict=True):
        assert ours.dtype == jnp.bfloat16 and ours.shape == reference.shape
        errors = [np.linalg.norm(np.float32(x) - reference) for x in (ours, usual)]
        assert errors[0] <= 1.01 * errors[1]
        assert errors[0] < 0.003 * np.linalg.norm(reference)
