"""Draws follow the distribution of their reported log-probabilities and depend only on (seed, request, position)."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool_jax import mesh as meshes
from retool_jax.engine.sampling import WHOLE_BLOCKS, Sampling, block_width, invert, row_keys, sample, threshold
from retool_jax.mesh import MeshConfig, make_mesh

V = 8
LOGITS = np.random.default_rng(0).normal(0.0, 1.5, V).astype(np.float32)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


ROWS = 5_000  # of a call, which is compiled once: fewer are padded


def draw(
    requests: np.ndarray,
    positions: np.ndarray,
    temperature: float | np.ndarray,
    top_k: int | np.ndarray = 0,
    top_p: float = 1.0,
    logits: np.ndarray = LOGITS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def padded(x: object, dtype: type) -> np.ndarray:
        full = np.broadcast_to(np.asarray(x), len(requests)).astype(dtype)
        return np.pad(full, (0, -len(full) % ROWS)).reshape(-1, ROWS)

    how = padded(temperature, np.float32), padded(top_k, np.int32), padded(top_p, np.float32)
    parts = zip(padded(requests, np.uint32), padded(positions, np.int32), *how, strict=True)
    results = [
        _draw(jax.random.key(0), requests, positions, Sampling(*how), logits) for requests, positions, *how in parts
    ]
    return tuple(np.concatenate(x)[: len(requests)] for x in zip(*results, strict=True))


@jax.jit
def _draw(key: jax.Array, requests: jax.Array, positions: jax.Array, how: Sampling, logits: jax.Array) -> tuple:
    rows = jnp.broadcast_to(logits, (len(requests), len(logits)))
    return sample(rows, row_keys(key, requests, positions), how)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("along", ["requests", "positions"])
def test_frequencies_are_those_of_softmax(temperature, along):
    n = 20_000
    many, one = np.arange(n), np.zeros(n)
    tokens, *_ = draw(*((many, one) if along == "requests" else (one, many)), temperature)
    expected = n * np.exp(log_softmax(LOGITS / temperature))
    chi_square = ((np.bincount(tokens, minlength=V) - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 0.1% of honest samplers exceed it at 7 degrees of freedom; the keys are fixed


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_log_probability_is_of_the_distribution_drawn_from(temperature):
    tokens, logprobs, plain = draw(np.arange(200), np.arange(200), temperature)
    assert len(set(tokens)) > 3
    np.testing.assert_allclose(logprobs, log_softmax(LOGITS / temperature)[tokens], atol=1e-5)
    np.testing.assert_array_equal(logprobs, plain)


def test_zero_temperature_is_greedy_and_reports_temperature_one():
    tokens, logprobs, _ = draw(np.arange(50), np.arange(50), 0.0)
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
    # A row draws the same alone and among others.
    one = row_keys(jax.random.key(0), jnp.array([2], jnp.uint32), jnp.array([100]))
    assert jax.random.key_data(one)[0].tolist() == np.asarray(keys[0])[14].tolist()


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The tokens that may be drawn, by sorting, as `transformers` filters them."""
    scaled = (logits / np.float32(temperature)).astype(np.float32)
    keep = scaled >= (np.sort(scaled)[-top_k] if 0 < top_k < len(scaled) else -np.inf)
    if top_p < 1.0:
        order = np.argsort(-scaled, kind="stable")
        mass = np.where(keep, np.exp(scaled.astype(np.float64) - scaled.max()), 0.0)[order]
        before = np.cumsum(mass) - mass
        keep[order[before >= top_p * mass.sum()]] = False
    return keep


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([0, 1, 2, 7, 50, 96, 200]),
    st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-6]),
)
def test_truncation_keeps_what_sorting_keeps(seed, temperature, top_k, top_p):
    logits = np.random.default_rng(seed).normal(0.0, 3.0, 96).astype(np.float32)
    expected = kept(logits, temperature, top_k, top_p)
    scaled = jnp.asarray(logits / np.float32(temperature))[None]
    lowest = jax.jit(threshold)(scaled, jnp.array([top_k]), jnp.array([top_p], jnp.float32))
    np.testing.assert_array_equal(np.asarray(scaled >= lowest)[0], expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.8), (4, 0.9), (1, 1.0), (50, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_truncated_draws_follow_what_is_left_and_report_both_log_probabilities(temperature, top_k, top_p):
    n = 5_000
    tokens, logprobs, plain = draw(np.arange(n), np.zeros(n), temperature, top_k=top_k, top_p=top_p)
    keep = kept(LOGITS, temperature, top_k, top_p)
    left = log_softmax(np.where(keep, LOGITS / temperature, -1e30))
    np.testing.assert_allclose(logprobs, left[tokens], atol=1e-5)
    np.testing.assert_allclose(plain, log_softmax(LOGITS / temperature)[tokens], atol=1e-5)
    expected = n * np.exp(left[keep])
    counts = np.bincount(tokens, minlength=V)
    assert not counts[~keep].any()
    assert ((counts[keep] - expected) ** 2 / expected).sum() < 24.3


def test_a_row_that_truncates_leaves_the_others_draws_alone():
    n = 100
    mixed = draw(np.arange(n), np.zeros(n), 1.0, top_k=np.resize([0, 2], n))
    alone = draw(np.arange(n), np.zeros(n), 1.0)
    for together, expected in zip(mixed, alone, strict=True):
        np.testing.assert_array_equal(together[::2], expected[::2])


def test_ties_at_the_threshold_are_all_kept_and_greedy_takes_the_first():
    logits = np.array([1.0, 3.0, 3.0, 0.0, 3.0, -2.0, -9.0, -9.0], np.float32)
    tokens, *_ = draw(np.arange(300), np.zeros(300), 1.0, top_k=2, logits=logits)
    assert set(tokens) == {1, 2, 4}
    assert set(draw(np.arange(9), np.zeros(9), 0.0, logits=logits)[0]) == {1}


def test_inversion_never_lands_where_there_is_no_mass():
    mass = np.zeros((3, 40), np.float32)
    mass[0, 7], mass[1, [0, 39]], mass[2, 3:6] = 1e-30, 1.0, 1.0
    for uniform in (0.0, 0.4999, 0.5, 1 - 2**-24):
        found = np.asarray(invert(jnp.asarray(mass), jnp.full(3, uniform)))
        assert found[0] == 7 and found[1] == (0 if uniform < 0.5 else 39)
        assert found[2] == 3 + int(3 * uniform)


@pytest.mark.parametrize(
    ("vocabulary", "shards", "width"),
    [
        (152_064, 8, 396),
        (151_936, 8, 1187),
        (151_936, 1, 128),
        (151_646, 1, 226),
        (398, 1, 2),
        (2048, 2, 32),
        (7, 1, 1),
    ],
)
def test_blocks_tile_a_shard_and_are_few(vocabulary, shards, width):
    """The widths determine which tokens a seed draws, so they must not change."""
    assert block_width(vocabulary, shards) == width
    assert vocabulary // shards % width == 0 and width + vocabulary // width <= WHOLE_BLOCKS


@pytest.mark.parametrize(("vocabulary", "shards"), [(151_667, 1), (151_665, 1), (303_334, 2), (4099, 1), (8198, 2)])
def test_a_vocabulary_without_a_divisor_has_few_blocks_all_the_same(vocabulary, shards):
    width = block_width(vocabulary, shards)
    assert width + shards * -(-(vocabulary // shards) // width) < 3 * vocabulary**0.5


def test_a_prime_vocabulary_takes_no_more_memory_than_its_neighbour():
    def scratch(vocabulary: int) -> int:
        B, shape = 4, jax.ShapeDtypeStruct
        how = Sampling(shape((B,), jnp.float32), shape((B,), jnp.int32), shape((B,), jnp.float32))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
        compiled = jax.jit(sample).lower(shape((B, vocabulary), jnp.float32), keys, how).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(151_667) < 1.5 * scratch(151_936)


@pytest.mark.parametrize("shards", [1, 2])
def test_draws_from_padded_blocks_follow_the_distribution(shards):
    """Two shards of a prime size, whose last blocks end in padding."""
    V = 4099 * shards
    width = block_width(V, shards)
    assert 4099 % width, "the last block is padded"
    logits = np.full(V, -30.0, np.float32)
    likely = np.array([0, width - 1, width, 4098, *[4099, 4099 + width, V - 1][: 3 * (shards - 1)]])
    logits[likely] = np.random.default_rng(0).normal(0.0, 1.0, len(likely))
    n = 2000
    how = Sampling(np.ones(n, np.float32), np.zeros(n, np.int32), np.ones(n, np.float32))
    keys = row_keys(jax.random.key(0), jnp.arange(n, dtype=jnp.uint32), jnp.zeros(n, jnp.int32))
    drawn = jax.jit(partial(sample, shards=shards))
    result = drawn(jnp.broadcast_to(logits, (n, V)), keys, how)
    tokens = np.asarray(result.tokens)
    expected = n * np.exp(log_softmax(logits))[likely]
    counts = np.array([(tokens == token).sum() for token in likely])
    assert counts.sum() == n and ((counts - expected) ** 2 / expected).sum() < 24.3
    np.testing.assert_allclose(result.logprobs, log_softmax(logits)[tokens], atol=1e-5)
    greedy = drawn(jnp.broadcast_to(logits, (n, V)), keys, how._replace(temperature=np.zeros(n, np.float32)))
    assert set(np.asarray(greedy.tokens).tolist()) == {logits.argmax()}
    anywhere = np.asarray(drawn(jnp.zeros((n, V)), keys, how).tokens)
    assert anywhere.min() >= 0 and anywhere.max() < V and len(set(anywhere.tolist())) > n / 2


@pytest.mark.parametrize("V", [2048, 8198])
def test_a_split_vocabulary_stays_split(V):
    """The compiled program for two devices gathers no array as large as the logits, and draws the same tokens."""
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    B = 4
    logits = np.random.default_rng(0).normal(0.0, 3.0, (B, V)).astype(np.float32)
    how = Sampling(np.float32([1.0, 0.7, 0.0, 1.0]), np.int32([0, 50, 0, 0]), np.float32([1.0, 1.0, 1.0, 0.9]))
    arguments = row_keys(jax.random.key(0), jnp.arange(B, dtype=jnp.uint32), jnp.zeros(B, jnp.int32)), how
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, meshes.sharding(mesh, None, "vocab"))
        compiled = jax.jit(partial(sample, shards=2)).lower(split, *arguments).compile()
        results = compiled(split, *arguments)
    gathered = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather\(", compiled.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in gathered]
    assert max(sizes, default=0) <= B * 2 * -(-V // 2 // block_width(V, 2))
    for ours, expected in zip(results, jax.jit(partial(sample, shards=2))(logits, *arguments), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
