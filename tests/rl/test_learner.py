"""Which trajectories of a step an update learns from."""

import jax
import numpy as np
import pytest

from retool_jax.data.problems import Problem
from retool_jax.mesh import make_mesh
from retool_jax.mesh_config import MeshConfig
from retool_jax.models.decoder import init_params
from retool_jax.rl.config import KLConfig, RLConfig
from retool_jax.rl.learner import learn
from retool_jax.rl.loss import acts_on_all_tokens
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.run.learner import first_state, make_learner
from retool_jax.run.load import load

RUN = load(
    [
        *("config=grpo", "model.num_layers=1", "model.hidden_size=16", "model.intermediate_size=16"),
        *("model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=8", "model.vocab_size=128"),
        *("engine.max_length=32", "rollout.max_prompt_tokens=8", "rl.row_length=32", "rl.rows_per_micro=4"),
        *("rl.prompts_per_step=2", "rl.group_size=2", "rl.minibatches=1", "rl.entropy_coefficient=0.1"),
    ]
)


def group(rewards: tuple[float, float]) -> list[Trajectory]:
    rng, made = np.random.default_rng(0), []
    for reward in rewards:
        one = Trajectory("p/0", Problem("p", (), "6"), end=End.ANSWERED, reward=reward)
        one.add("prompt", [1, 2, 3])
        one.add("policy", rng.integers(4, 128, 7).tolist(), [-4.85] * 7)
        made.append(one)
    return made


def test_an_entropy_bonus_acts_on_groups_of_equal_rewards_too():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    learner = make_learner(RUN, mesh, lambda: init_params(RUN.model, jax.random.key(0)))
    mixed, solved = group((1.0, -1.0)), group((1.0, 1.0))

    def step(trajectories: list[Trajectory]) -> dict[str, float]:
        return learn(
            learner, first_state(RUN, init_params(RUN.model, jax.random.key(0)), mesh), trajectories, 1
        ).metrics

    one, both, none = step(mixed), step(mixed + solved), step(solved + solved)
    assert [found["groups_used"] for found in (one, both, none)] == [1, 1, 0]
    # The groups have the same tokens, so the entropy is the same, and half of the policy's term is 0 in `both`.
    assert none["entropy"] == pytest.approx(one["entropy"], rel=1e-5) and none["grad_norm"] > 0
    assert none["loss"] == pytest.approx(-0.1 * none["entropy"], rel=1e-5)
    assert both["loss"] == pytest.approx((one["loss"] + none["loss"]) / 2, rel=1e-5)


@pytest.mark.parametrize(("place", "acts"), [("loss", True), ("reward", False)])
def test_so_does_a_divergence_that_is_in_the_loss(place, acts):
    assert acts_on_all_tokens(RLConfig(kl=KLConfig(coefficient=0.1, place=place))) == acts
    assert not acts_on_all_tokens(RLConfig())
