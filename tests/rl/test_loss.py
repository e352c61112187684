"""The clipped policy loss against plain numpy, and what it may not see."""

import jax
import numpy as np

from retool_jax.learn.packing import Batch
from retool_jax.rl.loss import ClipConfig, clipped_policy_loss, policy_token_loss

CLIP = ClipConfig(low=0.2, high=0.28, dual=3.0)


def reference(new: float, old: float, advantage: float) -> tuple[float, bool]:
    """Case by case: which bound holds the token, if any."""
    ratio = np.exp(np.float64(new) - np.float64(old))
    if advantage > 0 and ratio > 1 + CLIP.high:
        return -(1 + CLIP.high) * advantage, True
    if advantage < 0 and ratio < 1 - CLIP.low:
        return -(1 - CLIP.low) * advantage, True
    if advantage < 0 and ratio > CLIP.dual:
        return -CLIP.dual * advantage, True
    return -ratio * advantage, False


def random_tokens(n: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    old = rng.uniform(-6, 0, n)
    advantages = rng.normal(size=n)
    advantages[::10] = 0.0
    return np.stack([old + rng.normal(0, 1.0, n), old, advantages]).astype(np.float32)


def test_value_and_clip_fraction_equal_the_case_table():
    tokens = random_tokens()
    loss, clipped = clipped_policy_loss(*tokens, CLIP)
    expected_loss, expected_clipped = np.array([reference(*token) for token in tokens.T]).T
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped, expected_clipped.astype(bool))
    # Every case was met.
    ratio, advantage = np.exp(tokens[0] - tokens[1]), tokens[2]
    for case in ((advantage > 0) & (ratio > 1.28), (advantage < 0) & (ratio < 0.8), (advantage < 0) & (ratio > 3)):
        assert case.sum() > 100 and np.asarray(clipped)[case].all()
    assert not np.asarray(clipped)[advantage == 0].any()


@jax.jit
def gradient_of(new: np.ndarray, old: np.ndarray, advantages: np.ndarray) -> jax.Array:
    return jax.grad(lambda new: clipped_policy_loss(new, old, advantages, CLIP)[0].sum())(new)


def test_gradient_is_the_policy_gradient_and_stops_at_the_bounds():
    tokens = random_tokens()
    new, old, advantages = tokens
    gradient = gradient_of(new, old, advantages)
    clipped = np.array([reference(*token)[1] for token in tokens.T], bool)
    expected = np.where(clipped, 0.0, -np.exp(new - old) * advantages)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_ratio_beyond_floating_point_is_only_clipped():
    new, old, advantages = (
        np.float32([0.0, 0.0, 0.0, -200.0]),
        np.float32([-200.0] * 3 + [0.0]),
        np.float32([1, -1, 0, 1]),
    )
    loss, clipped = clipped_policy_loss(new, old, advantages, CLIP)
    gradient = gradient_of(new, old, advantages)
    np.testing.assert_allclose(loss, [-1.28, 3.0, 0.0, 0.0], rtol=1e-6, atol=1e-6)
    assert clipped.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(gradient, 0.0)


def test_token_loss_reports_what_it_clipped_and_how_far_engine_and_trainer_are_apart():
    new, old, advantages = random_tokens(50)[:, None]
    nothing = np.zeros(new.shape, np.int32)
    columns = {"old_logprobs": old, "advantages": advantages}
    batch = Batch(nothing, nothing, nothing, nothing == 0, columns, np.int32(1))
    terms = policy_token_loss(CLIP)({"logprobs": new, "entropy": np.zeros_like(new)}, batch)
    loss, clipped = clipped_policy_loss(new, old, advantages, CLIP)
    np.testing.assert_array_equal(terms.loss, loss)
    np.testing.assert_array_equal(terms.metrics["clip_fraction"], np.float32(clipped))
    np.testing.assert_allclose(terms.metrics["logprob_diff_mean"], np.abs(new - old), rtol=1e-6)
