"""Policy losses compared with plain NumPy token by token, their additional terms, and tokens that must not matter."""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, loss_and_gradient
from retool_jax.rl.config import KLConfig, RLConfig
from retool_jax.rl.loss import (
    ClipConfig,
    aggregation_weights,
    clipped_loss,
    clipped_policy_loss,
    sequence_loss,
    truncated_loss,
)

CLIP = ClipConfig(low=0.2, high=0.28, dual=3.0)
LOSSES = {"clipped": clipped_loss, "sequence": sequence_loss, "truncated": truncated_loss}


def reference(new: float, old: float, advantage: float) -> tuple[float, bool]:
    """A case for each bound that may be active for a token."""
    return bounded(math.exp(float(new) - float(old)), advantage)


def bounded(ratio: float, advantage: float) -> tuple[float, bool]:
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
    # Every case occurred.
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
    terms = clipped_loss({"logprobs": new, "entropy": np.zeros_like(new)}, batch, RLConfig(clip=CLIP))
    loss, clipped = clipped_policy_loss(new, old, advantages, CLIP)
    np.testing.assert_array_equal(terms.loss, loss)
    np.testing.assert_array_equal(terms.metrics["clip_fraction"], np.float32(clipped))
    np.testing.assert_allclose(terms.spread["logprob_diff"], np.abs(new - old), rtol=1e-6)


EXTRA = ("importance", "reference_logprobs", "engine_logprobs", "teacher_logprobs")
FULL = RLConfig(clip=CLIP, kl=KLConfig(coefficient=0.3), entropy_coefficient=0.05)


def rows(seed: int = 0, names: tuple[str, ...] = EXTRA) -> tuple[Columns, Batch]:
    """Outputs and a packed micro-batch [4,40]: sequences with tool outputs between sampled tokens, and padding."""
    rng = np.random.default_rng(seed)
    shape = 4, 40
    segments = np.zeros(shape, np.int32)
    for row in range(3):  # the last row is padding
        ends = np.sort(rng.choice(np.arange(5, 36), 3, replace=False))
        for segment, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            segments[row, start:end] = segment
    sampled = (rng.random(shape) < 0.7) & (segments > 0)
    sampled &= ~((segments == 2) & (np.arange(4)[:, None] == 1))  # a sequence without a sampled token
    old = rng.uniform(-4, 0, shape)
    by_sequence = rng.normal(0, 0.6, (4, 4))[np.arange(4)[:, None], segments]  # so that bounds hold for whole sequences
    columns = {
        "old_logprobs": old,
        "advantages": rng.normal(size=shape),
        "importance": rng.choice([0.0, 0.7, 2.0], shape),
        "reference_logprobs": old + rng.normal(0, 0.5, shape),
        "engine_logprobs": old + rng.normal(0, 0.4, shape),
        "teacher_logprobs": old + rng.normal(0, 0.3, shape),
    }
    outputs = {"logprobs": old + by_sequence + rng.normal(0, 0.4, shape), "entropy": rng.uniform(0, 2, shape)}
    kept = ("old_logprobs", "advantages", *names)
    masked = [
        {name: np.where(sampled, x, 0).astype(np.float32) for name, x in of.items()}
        for of in (outputs, {name: columns[name] for name in kept})
    ]
    nothing = np.zeros(shape, np.int32)
    return masked[0], Batch(nothing, nothing, segments, sampled, masked[1], np.int32(1))


def sampled_of(batch: Batch) -> list[tuple[int, int]]:
    return [(b, t) for b, t in np.ndindex(batch.sampled.shape) if batch.sampled[b, t]]


def by_hand(kind: str, outputs: Columns, batch: Batch, rl: RLConfig) -> tuple[np.ndarray, ...]:
    """Loss, its gradient by log-prob and by entropy, and whether it was clipped, each [B,T]; two loops over tokens."""
    results = np.zeros((4, *batch.sampled.shape))
    for b, t in sampled_of(batch):
        told = {name: float(x[b, t]) for name, x in batch.columns.items()}
        new, old, A = float(outputs["logprobs"][b, t]), told["old_logprobs"], told["advantages"]
        ratio = math.exp(new - old)
        if kind == "sequence":
            logs = []
            for u in range(batch.sampled.shape[1]):
                if batch.sampled[b, u] and batch.segments[b, u] == batch.segments[b, t]:
                    logs.append(float(outputs["logprobs"][b, u]) - float(batch.columns["old_logprobs"][b, u]))
            ratio = math.exp(sum(logs) / len(logs))
        if kind == "truncated":
            weight = min(max(ratio, 1 - CLIP.low), 1 + CLIP.high)
            loss, slope, clipped = -weight * A * new, -weight * A, weight != ratio
        else:
            loss, clipped = bounded(ratio, A)
            slope = 0.0 if clipped else -ratio * A
        loss, slope = (x * told.get("importance", 1.0) for x in (loss, slope))
        if rl.kl.coefficient and rl.kl.place == "loss":
            d = new - told["reference_logprobs"]
            value, gradient = {
                "k1": (d, 1.0),
                "k2": (d * d / 2, d),
                "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
            }[rl.kl.estimator]
            loss, slope = loss + rl.kl.coefficient * value, slope + rl.kl.coefficient * gradient
        loss -= rl.entropy_coefficient * float(outputs["entropy"][b, t])
        results[:, b, t] = loss, slope, -rl.entropy_coefficient, clipped
    return tuple(results)


@cache
def compiled(kind: str, rl: RLConfig) -> Callable:
    """Terms, and the gradient of the sum of the sampled tokens' weighted losses."""

    def total(outputs: Columns, batch: Batch, weights: jax.Array) -> tuple:
        terms = LOSSES[kind](outputs, batch, rl)
        return jnp.sum(jnp.where(batch.sampled, terms.loss * weights, 0.0)), terms

    return jax.jit(jax.grad(total, has_aux=True))


def ones(batch: Batch) -> np.ndarray:
    return np.ones(batch.sampled.shape, np.float32)


VARIANTS = [
    *[(kind, FULL, EXTRA) for kind in LOSSES],
    *[(kind, RLConfig(clip=CLIP), ()) for kind in LOSSES],
    ("clipped", dataclasses.replace(FULL, kl=KLConfig(0.3, "k1")), EXTRA),
    ("clipped", dataclasses.replace(FULL, kl=KLConfig(0.3, "k2")), EXTRA),
    ("clipped", dataclasses.replace(FULL, kl=KLConfig(0.3, "k3", "reward")), EXTRA),
]


@pytest.mark.parametrize(("kind", "rl", "names"), VARIANTS)
def test_loss_and_gradient_are_their_formula(kind, rl, names):
    outputs, batch = rows(1, names)
    gradient, terms = compiled(kind, rl)(outputs, batch, ones(batch))
    loss, by_logprob, by_entropy, clipped = by_hand(kind, outputs, batch, rl)
    mask = batch.sampled
    np.testing.assert_allclose(np.asarray(terms.loss)[mask], loss[mask], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["logprobs"], by_logprob, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["entropy"], by_entropy, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(terms.metrics["clip_fraction"])[mask], clipped[mask])
    assert 0.05 < clipped[mask].mean() < 0.95
    for name, value in divergences(outputs, batch, rl).items():
        assert (name in terms.metrics) == bool(names)
        if names:
            np.testing.assert_allclose(np.asarray(terms.metrics[name])[mask], value, rtol=2e-4, atol=1e-6)


def divergences(outputs: Columns, batch: Batch, rl: RLConfig) -> dict[str, list[float]]:
    """The metrics of the reference and the teacher for each sampled token."""
    if "teacher_logprobs" not in batch.columns:
        return {"kl": [], "teacher_kl": []}
    kl, teacher_kl = [], []
    for at in sampled_of(batch):
        d = float(outputs["logprobs"][at]) - float(batch.columns["reference_logprobs"][at])
        kl.append({"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[rl.kl.estimator])
        teacher_kl.append(float(batch.columns["old_logprobs"][at]) - float(batch.columns["teacher_logprobs"][at]))
    return {"kl": kl, "teacher_kl": teacher_kl}


def test_what_is_off_leaves_the_bits_of_the_plain_loss():
    """Without a reference, without an entropy bonus, and with a correction of ones."""
    outputs, batch = rows(2, ("importance",))
    ones_of = batch.columns | {"importance": ones(batch)}
    _, terms = compiled("clipped", RLConfig(clip=CLIP))(outputs, batch._replace(columns=ones_of), ones(batch))
    new, old, advantages = outputs["logprobs"], batch.columns["old_logprobs"], batch.columns["advantages"]
    loss, clipped = jax.jit(partial(clipped_policy_loss, clip=CLIP))(new, old, advantages)
    np.testing.assert_array_equal(terms.loss, loss)
    np.testing.assert_array_equal(terms.metrics["clip_fraction"], clipped)
    np.testing.assert_array_equal(terms.spread["logprob_diff"], np.abs(new - old))


def test_of_a_sequence_all_tokens_are_held_by_a_bound_or_none():
    outputs, batch = rows(3, ())
    signs = np.where(np.random.default_rng(0).random((4, 4)) < 0.5, -1.0, 1.0)  # one value for a whole sequence
    columns = batch.columns | {"advantages": signs[np.arange(4)[:, None], batch.segments].astype(np.float32)}
    _, terms = compiled("sequence", RLConfig(clip=CLIP))(outputs, batch._replace(columns=columns), ones(batch))
    clipped = np.asarray(terms.metrics["clip_fraction"])
    fractions = {clipped[b][(batch.segments[b] == s) & batch.sampled[b]].mean() for b, s in sequences(batch)}
    assert fractions == {0.0, 1.0}


def sequences(batch: Batch) -> list[tuple[int, int]]:
    """(row, segment) of all sequences with a sampled token."""
    return sorted({(b, int(batch.segments[b, t])) for b, t in sampled_of(batch)})


def test_gspo_has_the_gradient_of_the_sequences_own_objective():
    """Of -mean_i min(s_i A_i, clip(s_i) A_i) by differences, where s_i itself depends on each of its tokens."""
    outputs, batch = rows(4, ())
    advantages = np.random.default_rng(5).normal(size=(4, 4))
    spread = advantages[np.arange(4)[:, None], batch.segments].astype(np.float32)
    batch = batch._replace(columns=batch.columns | {"advantages": np.where(batch.sampled, spread, 0)})
    old = batch.columns["old_logprobs"].astype(float)
    members = [(batch.segments[b] == s) & batch.sampled[b] for b, s in sequences(batch)]

    def objective(new: np.ndarray) -> float:
        total = 0.0
        for (b, s), at in zip(sequences(batch), members, strict=True):
            ratio = math.exp((new[b][at] - old[b][at]).mean())
            total += bounded(ratio, float(np.float32(advantages[b, s])))[0]
        return total / len(members)

    lengths = np.array([at.sum() for at in members])
    weights = np.zeros(batch.sampled.shape, np.float32)
    share = aggregation_weights("sequence_token_mean", lengths, 40)
    for (b, s), weight in zip(sequences(batch), share, strict=True):
        weights[b][batch.segments[b] == s] = weight / lengths.sum()
    gradient, _ = compiled("sequence", RLConfig(clip=CLIP))(outputs, batch, weights)
    new = outputs["logprobs"].astype(float)
    for b, t in sampled_of(batch)[::3]:
        step = np.zeros_like(new)
        step[b, t] = 1e-5
        slope = (objective(new + step) - objective(new - step)) / 2e-5
        assert float(gradient["logprobs"][b, t]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_a_divergence_may_be_large_and_stays_a_number():
    outputs, batch = rows(5)
    columns = batch.columns | {"reference_logprobs": np.where(batch.sampled, outputs["logprobs"] + 300, 0)}
    gradient, terms = compiled("clipped", FULL)(outputs, batch._replace(columns=columns), ones(batch))
    assert np.isfinite(terms.loss).all() and np.isfinite(gradient["logprobs"]).all()


@pytest.mark.parametrize("names", [(), ("engine_logprobs",)])
def test_the_mismatch_is_reported_for_each_token(names):
    """The trainer's old log-probs minus the engine's; if only one of them exists, the new ones minus it."""
    outputs, batch = rows(6, names)
    _, terms = compiled("clipped", RLConfig(clip=CLIP))(outputs, batch, ones(batch))
    for b, t in sampled_of(batch):
        old = float(batch.columns["old_logprobs"][b, t])
        off = old - float(batch.columns["engine_logprobs"][b, t]) if names else float(outputs["logprobs"][b, t]) - old
        expected = {
            "mismatch_k3": math.exp(off) - 1 - off,
            "mismatch_ratio": math.exp(off),
            "mismatch_ratio_squared": math.exp(2 * off),
            "mismatch_clipped": float(math.exp(off) > 2),
        }
        for name, value in expected.items():
            assert float(terms.metrics[name][b, t]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert float(terms.spread["logprob_diff"][b, t]) == pytest.approx(abs(off), rel=1e-6)


def test_a_small_mismatch_keeps_its_digits():
    outputs, batch = rows(7, ())
    outputs["logprobs"] = batch.columns["old_logprobs"] + np.float32(2**-12)
    _, terms = compiled("clipped", RLConfig(clip=CLIP))(outputs, batch, ones(batch))
    off = (outputs["logprobs"] - batch.columns["old_logprobs"]).astype(float)
    np.testing.assert_allclose(terms.metrics["mismatch_k3"], off**2 / 2, rtol=0.01)


class Given:
    """Outputs that are the parameters themselves, so that a step's gradient is the derivative by each output."""

    def of(self, params: Columns, batch: Batch) -> Columns:
        return params


NOISE = st.sampled_from([0.0, -3.0, 80.0, 1e30, np.nan, np.inf])


@cache
def stepped(kind: str) -> Callable:
    return jax.jit(partial(loss_and_gradient, Given(), lambda outputs, batch: LOSSES[kind](outputs, batch, FULL)))


@pytest.mark.parametrize("kind", LOSSES)
@given(
    seed=st.integers(0, 2**16),
    noise=st.fixed_dictionaries(
        {name: NOISE for name in ("logprobs", "entropy", "old_logprobs", "advantages", *EXTRA)}
    ),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_columns_of_tokens_that_were_not_sampled_have_no_effect(kind, seed, noise):
    """Loss, metrics and gradient have the same bits, and the gradient of such a token is zero."""
    outputs, batch = rows(seed)

    def noisy(values: Columns) -> Columns:
        return {name: np.where(batch.sampled, x, np.float32(noise[name])) for name, x in values.items()}

    def run(outputs: Columns, columns: Columns) -> tuple[Columns, dict]:
        one = batch._replace(columns=columns)
        return stepped(kind)(outputs, jax.tree.map(lambda x: x[None] if x.ndim else x, one))

    gradient, metrics = run(outputs, batch.columns)
    other, told = run(noisy(outputs), noisy(batch.columns))
    for name in outputs:
        np.testing.assert_array_equal(other[name], gradient[name])
        assert not np.asarray(other[name])[~batch.sampled].any() and np.asarray(other[name])[batch.sampled].any()
    assert told.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_array_equal(told[name], value, err_msg=name)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_token_mean", "sequence_token_sum", "fixed"])
def test_weights_make_a_token_mean_the_aggregation(aggregation):
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=length) for length in (3, 0, 17, 1, 8)]
    lengths = np.array([len(x) for x in losses])
    weights = aggregation_weights(aggregation, lengths, longest=20)
    if aggregation == "token_mean":
        assert weights is None, "no column, so that nothing is multiplied"
        return
    weighted = sum(w * x.sum() for w, x in zip(weights, losses, strict=True)) / lengths.sum()
    full = [x for x in losses if len(x)]
    expected = {
        "sequence_token_mean": sum(sum(x) / len(x) for x in full) / 4,
        "sequence_token_sum": sum(sum(x) for x in full) / 4,
        "fixed": sum(sum(x) for x in full) / (4 * 20),
    }
    assert weighted == pytest.approx(expected[aggregation], rel=1e-12)


def test_weights_are_ones_for_equal_lengths_and_finite_without_tokens():
    np.testing.assert_allclose(aggregation_weights("sequence_token_mean", np.full(6, 9), 30), np.ones(6), rtol=1e-12)
    for aggregation in ("sequence_token_mean", "sequence_token_sum", "fixed"):
        assert not aggregation_weights(aggregation, np.zeros(2, int), 30).any()
    with pytest.raises(ValueError, match="no aggregation 'mean'"):
        aggregation_weights("mean", np.ones(2, int), 30)
