"""Draws follow the distribution whose log-probability they report, and depend on (seed, request, position) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.engine.sampling import row_keys, sample

V = 8
LOGITS = np.random.default_rng(0).normal(0.0, 1.5, V).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def draw(requests: np.ndarray, positions: np.ndarray, temperature: float | np.ndarray, seed: int = 0) -> tuple:
    tokens, logprobs = _draw(
        jax.random.key(seed), np.uint32(requests), np.int32(positions), np.full(len(requests), temperature, np.float32)
    )
    return np.asarray(tokens), np.asarray(logprobs)


@jax.jit
def _draw(key: jax.Array, requests: jax.Array, positions: jax.Array, temperatures: jax.Array) -> tuple:
    rows = jnp.broadcast_to(LOGITS, (len(requests), V))
    return sample(rows, row_keys(key, requests, positions), temperatures)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("along", ["requests", "positions"])
def test_frequencies_are_those_of_softmax(temperature, along):
    n = 20_000
    many, one = np.arange(n), np.zeros(n)
    tokens, _ = draw(*((many, one) if along == "requests" else (one, many)), temperature)
    expected = n * np.exp(log_softmax(LOGITS / temperature))
    chi_square = ((np.bincount(tokens, minlength=V) - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 0.1% of honest samplers exceed it at 7 degrees of freedom; the keys are fixed


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probability_is_of_the_distribution_drawn_from(temperature):
    tokens, logprobs = draw(np.arange(200), np.arange(200), temperature)
    assert len(set(tokens)) > 3
    np.testing.assert_allclose(logprobs, log_softmax(LOGITS / temperature)[tokens], atol=1e-5)


def test_zero_temperature_is_greedy_and_reports_temperature_one():
    tokens, logprobs = draw(np.arange(50), np.arange(50), 0.0)
    assert set(tokens) == {LOGITS.argmax()}
    np.testing.assert_allclose(logprobs, log_softmax(LOGITS).max(), atol=1e-5)


def test_rows_of_different_temperatures_do_not_mix():
    requests, temperatures = np.arange(200), np.resize([1.0, 0.0, 0.7], 200)
    mixed = draw(requests, requests, temperatures)
    for temperature in (1.0, 0.0, 0.7):
        rows = temperatures == temperature
        for together, alone in zip(mixed, draw(requests, requests, temperature), strict=True):
            np.testing.assert_array_equal(together[rows], alone[rows])


def test_a_key_is_its_own_for_each_seed_request_and_position():
    requests, positions = np.meshgrid([0, 1, 2, 2**32 - 1], [0, 1, 2, 100])
    keys = [
        jax.random.key_data(
            row_keys(jax.random.key(seed), jnp.asarray(requests.ravel(), jnp.uint32), jnp.asarray(positions.ravel()))
        )
        for seed in (0, 1)
    ]
    assert len({tuple(key) for key in np.concatenate(keys).tolist()}) == 2 * requests.size
    # And the same alone as among others.
    one = row_keys(jax.random.key(0), jnp.array([2], jnp.uint32), jnp.array([100]))
    assert jax.random.key_data(one)[0].tolist() == np.asarray(keys[0])[14].tolist()
