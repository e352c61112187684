"""Attention and rotary positions against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.models.attention import attend, packed_mask, rotate


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query and one head at a time, in float64."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attend_is_grouped_softmax_attention(kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 4, 8))
    k, v = rng.normal(size=(2, 2, 7, kv_heads, 8))
    mask = rng.random((2, 5, 7)) < 0.5
    mask[:, :, 0] = True
    ours = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(ours, reference(q, k, v, mask), atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_forwards_and_backwards():
    q = jnp.ones((1, 2, 2, 4))
    mask = jnp.array([[[True, False, False], [False, False, False]]])
    value, gradient = jax.value_and_grad(lambda k: attend(q, k, k, mask).sum())(jnp.ones((1, 3, 1, 4)))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_packed_mask_is_causal_within_a_segment():
    mask = np.asarray(packed_mask(jnp.array([[1, 1, 2, 2, 0]])))[0]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_rotate_turns_the_two_halves_as_complex_numbers():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2], [7, 100, 5000]])
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * frequencies)
    ours = rotate(jnp.asarray(x), jnp.asarray(positions), 10_000.0)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=2e-3)
    np.testing.assert_allclose(ours[0], np.concatenate([turned.real, turned.imag], -1)[0], atol=1e-6)


def test_rotated_scores_depend_on_distance_alone():
    rng = np.random.default_rng(2)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(at: int) -> float:
        return float(jnp.vdot(rotate(q, jnp.array([[at + 9]]), 1e4), rotate(k, jnp.array([[at]]), 1e4)))

    np.testing.assert_allclose([score(3), score(40)], score(0), atol=1e-5)
