"""Advantages compared with their formulas as loops over trajectories and tokens, with gaps between sampled tokens."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool_jax.rl.advantage import Scored, gae, group_relative, teacher_coefficient, whitened
from retool_jax.rl.algorithms import ALGORITHMS
from retool_jax.rl.config import KLConfig, RLConfig, TeacherConfig

MODELS = ("old_logprobs", "values", "teacher_logprobs", "reference_logprobs")
PLAIN = RLConfig()
PPO = RLConfig(discount=0.97, gae_lambda=0.9)


def step(seed: int = 0) -> Scored:
    """Groups of 4, 1, 3 and 5 samples, the third with equal rewards; prompts, tool outputs, one single token."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([7, 2, 5, 0], [4, 1, 3, 5])
    rewards = rng.normal(size=len(groups))
    rewards[groups == 5] = 0.1
    sampled = []
    for length in rng.integers(5, 25, len(groups)):
        mask = rng.random(length) < 0.6
        mask[:2], mask[2] = False, True
        sampled.append(mask)
    sampled[0][3:] = False
    sampled[1][-1], sampled[2][-1] = True, False
    columns = {
        name: [np.where(mask, rng.normal(-1, 1, len(mask)), 0).astype(np.float32) for mask in sampled]
        for name in MODELS
    }
    return Scored(rewards, groups, sampled, columns)


def compare(ours: list[np.ndarray], theirs: list[list[float]], rtol: float = 1e-6) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == np.float32 and x.shape == (len(y),)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7)


def of_answer(name: str, scored: Scored) -> list[float]:
    """The expected advantages of an algorithm, one trajectory at a time."""
    values = []
    for reward, group in zip(scored.rewards, scored.groups, strict=True):
        mine = [r for r, g in zip(scored.rewards, scored.groups, strict=True) if g == group]
        mean = sum(mine) / len(mine)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in mine) / len(mine))
        if len(mine) == 1:
            values.append(0.0)
        elif name == "rloo":
            values.append(reward - (sum(mine) - reward) / (len(mine) - 1))
        else:
            values.append((reward - mean) / (1.0 if name == "dr_grpo" else deviation + 1e-6))
    return values


def estimate(off: float, estimator: str) -> float:
    return {"k1": off, "k2": off**2 / 2, "k3": math.exp(-off) - 1 + off}[estimator]


def test_is_the_centred_reward_over_the_population_deviation():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 1.0, -0.5])
    mean = rewards.sum() / 6
    deviation = np.sqrt(((rewards - mean) ** 2).sum() / 6)
    np.testing.assert_allclose(group_relative(rewards), (rewards - mean) / (deviation + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(group_relative(np.array([1.0, -1.0]), eps=1.0), [0.5, -0.5])


def test_shift_and_scale_of_rewards_do_not_matter():
    rewards = np.random.default_rng(0).normal(size=8)
    np.testing.assert_allclose(group_relative(3.0 * rewards + 7.0), group_relative(rewards), atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gspo", "cispo"])
def test_samples_of_a_prompt_are_compared_with_one_another(name):
    scored = step()
    (advantages,) = ALGORITHMS[name].advantage(scored, PLAIN).values()
    compare(
        advantages,
        [
            [value if at else 0.0 for at in mask]
            for value, mask in zip(of_answer(name, scored), scored.sampled, strict=True)
        ],
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1.0] * 8, [-1.0], [0.0, 0.0], [0.7] * 6])
def test_equal_rewards_say_nothing(name, rewards):
    masks = [np.array([False, True])] * len(rewards)
    scored = Scored(np.array(rewards), np.zeros(len(rewards), int), masks, {})
    for advantages in ALGORITHMS[name].advantage(scored, PLAIN)["advantages"]:
        assert not advantages.any(), "exact zeros, so that such a group is left out"


def test_tokens_have_the_bits_of_their_groups_advantage():
    scored = step()
    for group in np.unique(scored.groups):
        members = np.flatnonzero(scored.groups == group)
        expected = group_relative(scored.rewards[members])
        advantages = ALGORITHMS["grpo"].advantage(scored, PLAIN)["advantages"]
        for i, value in zip(members, expected, strict=True):
            assert set(advantages[i][scored.sampled[i]].tolist()) == {float(np.float32(float(value)))}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_in_the_reward_is_paid_by_its_own_token(estimator):
    scored = step()
    rl = RLConfig(kl=KLConfig(coefficient=0.3, estimator=estimator, place="reward"))
    expected = []
    for i, value in enumerate(of_answer("grpo", scored)):
        old, reference = (scored.columns[name][i].astype(float) for name in ("old_logprobs", "reference_logprobs"))
        expected.append(
            [
                value - 0.3 * estimate(old[t] - reference[t], estimator) if at else 0.0
                for t, at in enumerate(scored.sampled[i])
            ]
        )
    advantages = ALGORITHMS["grpo"].advantage(scored, rl)["advantages"]
    compare(advantages, expected)
    assert len(set(advantages[1][scored.sampled[1]].tolist())) > 1, "truly per token"
    in_loss = dataclasses.replace(rl, kl=dataclasses.replace(rl.kl, place="loss"))
    plain = ALGORITHMS["grpo"].advantage(scored, PLAIN)["advantages"]
    for ours, theirs in zip(ALGORITHMS["grpo"].advantage(scored, in_loss)["advantages"], plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "teacher",
    [
        TeacherConfig(coefficient=0.7),
        TeacherConfig(form="gated"),
        TeacherConfig(form="gated", gate_low=0.1, gate_high=0.9, gate_slope=3.0),
    ],
)
def test_a_teacher_counts_in_every_token_by_its_coefficient(teacher):
    scored = step()
    expected = []
    for i, value in enumerate(of_answer("grpo", scored)):
        share = 1 / (1 + math.exp(teacher.gate_slope * value))
        gated = teacher.gate_low + (teacher.gate_high - teacher.gate_low) * share
        c = gated if teacher.form == "gated" else teacher.coefficient
        assert teacher_coefficient(teacher, value) == pytest.approx(c, rel=1e-12)
        said, old = (scored.columns[name][i].astype(float) for name in ("teacher_logprobs", "old_logprobs"))
        expected.append([value + c * (said[t] - old[t]) if at else 0.0 for t, at in enumerate(scored.sampled[i])])
    rl = RLConfig(teacher=teacher)
    compare(ALGORITHMS["opd"].advantage(scored, rl)["advantages"], expected)

    costs = []
    for old, reference in zip(scored.columns["old_logprobs"], scored.columns["reference_logprobs"], strict=True):
        costs.append([0.3 * (float(o) - float(r)) for o, r in zip(old, reference, strict=True)])
    rl = dataclasses.replace(rl, kl=KLConfig(0.3, "k1", "reward"))
    costly = [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(expected, costs, strict=True)]
    compare(ALGORITHMS["opd"].advantage(scored, rl)["advantages"], costly, rtol=1e-5)


def test_the_gated_teacher_counts_more_for_wrong_answers():
    teacher = TeacherConfig(form="gated", gate_low=0.0, gate_high=0.05, gate_slope=1.0)
    assert teacher_coefficient(teacher, 0.0) == 0.025
    assert teacher_coefficient(teacher, -2.0) > 0.04 > 0.01 > teacher_coefficient(teacher, 2.0)
    steep = dataclasses.replace(teacher, gate_slope=1e6)
    assert teacher_coefficient(steep, 3.0) == 0.0 and teacher_coefficient(steep, -3.0) == 0.05


def gae_by_hand(rewards: list, values: list, sampled: list, gamma: float, lam: float) -> tuple[list, list]:
    """A loop from the last token to the first; tokens that were not sampled keep the running values."""
    value_next, running = 0.0, 0.0
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        if sampled[t]:
            delta = rewards[t] + gamma * value_next - values[t]
            running = delta + gamma * lam * running
            value_next = values[t]
            advantages[t], returns[t] = running, running + values[t]
    return advantages, returns


@pytest.mark.parametrize("coefficient", [0.0, 0.2])
def test_ppo_estimates_over_sampled_tokens_only_and_whitens_over_the_step(coefficient):
    scored = step()
    rl = dataclasses.replace(PPO, kl=KLConfig(coefficient, "k3", "reward") if coefficient else KLConfig())
    pairs = []
    for i, sampled in enumerate(scored.sampled):
        old, reference, values = (
            scored.columns[name][i].astype(float) for name in ("old_logprobs", "reference_logprobs", "values")
        )
        rewards = [-coefficient * estimate(off, "k3") for off in old - reference]
        rewards[max(t for t, at in enumerate(sampled) if at)] += scored.rewards[i]
        pairs.append(gae_by_hand(rewards, values, sampled, 0.97, 0.9))
    columns = ALGORITHMS["ppo"].advantage(scored, rl)
    assert columns.keys() == {"advantages", "returns"}
    compare(columns["returns"], [returns for _, returns in pairs])

    pooled = [row[t] for (row, _), mask in zip(pairs, scored.sampled, strict=True) for t in np.flatnonzero(mask)]
    mean = sum(pooled) / len(pooled)
    variance = sum((x - mean) ** 2 for x in pooled) / (len(pooled) - 1)
    white = [
        [(row[t] - mean) / math.sqrt(variance + 1e-8) if at else 0.0 for t, at in enumerate(mask)]
        for (row, _), mask in zip(pairs, scored.sampled, strict=True)
    ]
    compare(columns["advantages"], white, rtol=1e-5)


def test_a_tools_output_takes_no_part_in_an_estimate():
    """The advantages of sampled tokens do not depend on them or on their values."""
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=6), rng.normal(size=6)
    short = gae(rewards, values, np.ones(6, bool), 0.9, 0.8)
    at = np.array([1, 2, 5, 6, 7, 10])
    sampled, long_rewards, long_values = np.zeros(12, bool), np.full(12, 9.0), np.full(12, -9.0)
    sampled[at], long_rewards[at], long_values[at] = True, rewards, values
    np.testing.assert_array_equal(gae(long_rewards, long_values, sampled, 0.9, 0.8)[at], short)


def test_without_discount_a_return_is_the_reward():
    scored = step()
    for i, returns in enumerate(ALGORITHMS["ppo"].advantage(scored, PLAIN)["returns"]):
        np.testing.assert_allclose(returns, np.where(scored.sampled[i], scored.rewards[i], 0.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counts", [(), (0, 0), (1, 0)])
def test_too_few_tokens_to_whiten_are_zeros(counts):
    masks = [np.arange(3) < count for count in counts]
    white = whitened([np.full(3, 5.0) for _ in counts], masks)
    assert len(white) == len(counts) and not np.any(white)


def test_a_trajectory_without_a_sampled_token_has_no_effect():
    scored = step()
    empty = Scored(
        np.append(scored.rewards, 1.0),
        np.append(scored.groups, 99),
        [*scored.sampled, np.zeros(4, bool)],
        {name: [*column, np.zeros(4, np.float32)] for name, column in scored.columns.items()},
    )
    for name, algorithm in ALGORITHMS.items():
        rl = dataclasses.replace(PPO, algorithm=name)
        for column, larger in zip(
            algorithm.advantage(scored, rl).values(), algorithm.advantage(empty, rl).values(), strict=True
        ):
            assert not larger[-1].any()
            for x, y in zip(column, larger, strict=False):
                np.testing.assert_array_equal(x, y)


NOISE = st.sampled_from([0.0, -1.0, 1e30, np.nan, np.inf])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.filterwarnings("error")
@given(seed=st.integers(0, 2**16), noise=st.fixed_dictionaries({model: NOISE for model in MODELS}))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_columns_of_tokens_that_were_not_sampled_have_no_effect(name, seed, noise):
    scored = step(seed)
    columns = {
        model: [np.where(mask, x, np.float32(noise[model])) for x, mask in zip(column, scored.sampled, strict=True)]
        for model, column in scored.columns.items()
    }
    rl = dataclasses.replace(PPO, kl=KLConfig(0.2, "k3", "reward"), teacher=TeacherConfig(form="gated"))
    ours = ALGORITHMS[name].advantage(scored._replace(columns=columns), rl)
    for column, others in ALGORITHMS[name].advantage(scored, rl).items():
        for x, y, mask in zip(ours[column], others, scored.sampled, strict=True):
            np.testing.assert_array_equal(x, y)
            assert not x[~mask].any()
