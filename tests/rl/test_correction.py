"""Corrections compared with loops over tokens, at their bounds, and their metrics."""

import math

import numpy as np
import pytest

from retool_jax.rl.correction import correction, correction_numbers

PRESETS = ("none", "token_tis", "sequence_mask", "band", "geometric")


def trajectories(scale: float = 0.5, n: int = 60) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(old, engine, sampled) of each trajectory: some nearly equal, some very different, with tool outputs between."""
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate(rng.integers(3, 30, n)):
        sampled = rng.random(length) < 0.6
        sampled[:2] = False, True
        engine = rng.uniform(-4, 0, length)
        old = engine + rng.normal(0, scale if index % 2 else 0.005, length)
        made.append((old.astype(np.float32), engine.astype(np.float32), sampled))
    return made


def by_hand(preset: str, old: np.ndarray, engine: np.ndarray, sampled: np.ndarray) -> list[float]:
    ratios = [math.exp(float(o) - float(e)) for o, e, at in zip(old, engine, sampled, strict=True) if at]
    product = math.prod(ratios)
    mean = product ** (1 / len(ratios))
    weights = []
    for ratio in ratios:
        weights.append(
            {
                "none": 1.0,
                "token_tis": 2.0 if ratio > 2.0 else ratio,
                "sequence_mask": 0.0 if product > 3.0 else product,
                "band": ratio if 0.5 <= ratio <= 5.0 else 0.0,
                "geometric": 1.0 if 0.99 <= mean <= 1.01 else 0.0,
            }[preset]
        )
    return weights


@pytest.mark.parametrize("preset", PRESETS)
def test_a_weight_is_its_formula(preset):
    ours, theirs = [], []
    for old, engine, sampled in trajectories():
        weights = correction(preset, old, engine, sampled)
        assert weights.dtype == np.float32 and weights.shape == old.shape and not weights[~sampled].any()
        ours.append(weights[sampled])
        theirs.append(by_hand(preset, old, engine, sampled))
    np.testing.assert_allclose(np.concatenate(ours), np.concatenate(theirs), rtol=1e-6)
    share = np.mean(np.concatenate(ours) == {"none": 1.0, "token_tis": 2.0}.get(preset, 0.0))
    assert share == 1.0 if preset == "none" else 0.02 < share < 0.9, "both sides of the bound were met"


@pytest.mark.parametrize(
    ("preset", "ratio", "weight"),
    [
        *[("token_tis", 1.999, 1.999), ("token_tis", 2.001, 2.0), ("token_tis", 0.01, 0.01)],
        *[("sequence_mask", 2.999, 2.999), ("sequence_mask", 3.001, 0.0), ("sequence_mask", 0.01, 0.01)],
        *[("band", 0.501, 0.501), ("band", 0.499, 0.0), ("band", 4.999, 4.999), ("band", 5.001, 0.0)],
        *[("geometric", 1.0099, 1.0), ("geometric", 1.0101, 0.0), ("geometric", 0.9901, 1.0)],
        *[("geometric", 0.9899, 0.0), ("none", 100.0, 1.0)],
    ],
)
def test_bounds(preset, ratio, weight):
    old = np.array([5.0, math.log(ratio), -3.0])  # of one sampled token
    sampled = np.array([False, True, False])
    np.testing.assert_allclose(correction(preset, old, np.zeros(3), sampled), [0.0, weight, 0.0], rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_was_not_sampled_has_no_part_in_it(preset):
    for old, engine, sampled in trajectories(n=8):
        noisy = [np.where(sampled, x, noise) for x, noise in ((old, np.nan), (engine, 1e30))]
        np.testing.assert_array_equal(correction(preset, *noisy, sampled), correction(preset, old, engine, sampled))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_ratio_beyond_floating_point_is_a_number(preset):
    old, engine, sampled = np.array([0.0, -900.0]), np.array([-900.0, 0.0]), np.ones(2, bool)
    assert np.isfinite(correction(preset, old, engine, sampled)).all()
    assert np.isfinite(correction(preset, old, old, np.zeros(2, bool))).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_count_what_was_cut_and_what_is_left(preset):
    made = trajectories()
    weights = np.concatenate([by_hand(preset, *one) for one in made])
    numbers = correction_numbers(preset, *zip(*made, strict=True))
    cut = weights == (2.0 if preset == "token_tis" else 0.0)
    assert numbers["correction_share"] == pytest.approx(np.mean(cut))
    size = weights.sum() ** 2 / (len(weights) * (weights**2).sum())
    assert numbers["correction_ess"] == pytest.approx(size, rel=1e-5)
    assert (numbers["correction_share"] == 0) == (preset == "none") == (numbers["correction_ess"] == 1)


def test_numbers_of_nothing_and_of_nothing_left():
    assert correction_numbers("band", [], [], []) == {"correction_share": 0.0, "correction_ess": 0.0}
    apart = [np.array([9.0])], [np.array([0.0])], [np.array([True])]
    assert correction_numbers("band", *apart) == {"correction_share": 1.0, "correction_ess": 0.0}


def test_an_unknown_preset_is_an_error():
    with pytest.raises(ValueError, match="no correction 'icepop'"):
        correction("icepop", np.zeros(1), np.zeros(1), np.ones(1, bool))
