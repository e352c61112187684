"""Group-relative advantages against their formula."""

import numpy as np
import pytest

from retool_jax.rl.advantage import group_relative


def test_is_the_centred_reward_over_the_population_deviation():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0, -0.5])
    mean = rewards.sum() / 6
    deviation = np.sqrt(((rewards - mean) ** 2).sum() / 6)
    np.testing.assert_allclose(group_relative(rewards), (rewards - mean) / (deviation + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(group_relative(np.array([1.0, -1.0]), eps=1.0), [0.5, -0.5])


@pytest.mark.parametrize("rewards", [[0.1] * 3, [1.0] * 8, [-1.0], [0.0, 0.0]])
def test_equal_rewards_say_nothing(rewards):
    np.testing.assert_allclose(group_relative(np.array(rewards)), 0.0, atol=1e-9)


def test_shift_and_scale_of_rewards_do_not_matter():
    rewards = np.random.default_rng(0).normal(size=8)
    np.testing.assert_allclose(group_relative(3.0 * rewards + 7.0), group_relative(rewards), atol=1e-5)
