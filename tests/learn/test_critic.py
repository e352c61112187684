"""A critic begins as a copy of the policy with values of 0, learns returns, and reports its explained variance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.critic import (
    begin_critic,
    clipped_value_loss,
    critic_params,
    explained_variance,
    make_critic_step,
)
from retool_jax.learn.optimizer import abstract_state
from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.learn.step import Outputs, token_values
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import Params, forward, init_params
from retool_jax.models.sharding import param_shardings

OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)


@pytest.fixture(scope="module")
def examples(model) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for length in rng.integers(6, 24, 12):
        sampled = np.arange(length) > 2
        sampled[length // 2] = False
        columns = {"returns": rng.normal(0.5, 1.0, length), "old_values": rng.normal(size=length)}
        made.append(Example(rng.integers(0, model.vocab_size, length).tolist(), sampled, columns))
    return made


@pytest.fixture(scope="module")
def batch(examples) -> Batch:
    return pack(examples, 48, 2, 4)


def buffers(params: Params) -> set[int]:
    """The memory addresses of the first device's weights."""
    return {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}


def test_a_critic_begins_as_a_copy_of_the_policy_with_a_value_of_zero(model):
    """It has no vocabulary head, and the shardings that a checkpoint is restored into."""
    model = dataclasses.replace(model, tie_embeddings=False)
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    policy = jax.device_put(init_params(model, jax.random.key(0)), param_shardings(model, mesh))
    state = begin_critic(policy, model, OPTIMIZER, mesh)
    assert state.params.keys() == policy.keys() - {"head"} | {"value", "value_bias"}
    assert not state.params["value"][...].any() and state.params["value_bias"][...] == 0
    for name in ("embedding", "layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], policy[name])
    abstract = abstract_state(model, OPTIMIZER, mesh, value_head=True)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
    assert state.params["value"][...].sharding.shard_shape((model.hidden_size,)) == (model.hidden_size // 2,)
    for params in (state.params, critic_params(model, policy)):
        assert not buffers(params) & buffers(policy), "the update that consumes a critic leaves the policy its weights"


def test_a_value_depends_on_the_prefix_of_its_token(model, params, examples):
    """From the hidden state of the token before it, however rows are packed."""
    params = critic_params(model, params)
    rng = np.random.default_rng(1)
    params["value"][...], params["value_bias"][...] = jnp.asarray(rng.normal(size=model.hidden_size), "f4"), 0.25
    batch = pack(examples, 48, 8, 1)
    rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    values = np.asarray(token_values(model, params, rows))
    hidden = np.asarray(forward(model, params, rows.tokens, rows.positions, rows.segments))
    expected = hidden @ np.asarray(params["value"][...]) + 0.25
    first = rows.positions == 0
    assert not values[first].any()
    np.testing.assert_allclose(values[:, 1:][~first[:, 1:]], expected[:, :-1][~first[:, 1:]], rtol=1e-4, atol=1e-5)
    # The token itself and later tokens have no effect.
    row, at = 0, 5
    rows.tokens[row, at:] = (rows.tokens[row, at:] + 1) % model.vocab_size
    changed = np.asarray(token_values(model, params, rows))
    np.testing.assert_allclose(changed[row, : at + 1], values[row, : at + 1], atol=1e-6)
    assert abs(changed[row, at + 1] - values[row, at + 1]) > 1e-3


@pytest.mark.parametrize(
    ("value", "old", "returns", "clip", "loss", "clipped"),
    [
        (1.0, 0.9, 3.0, 0.5, 2.0, False),  # within the bound
        (2.0, 0.0, 3.0, 0.5, 0.5 * 2.5**2, True),  # moved closer by more than the bound: no further gain
        (-2.0, 0.0, 3.0, 0.5, 0.5 * 5**2, False),  # moved away: the larger error counts
        (2.0, 0.0, 3.0, 0.0, 0.5, False),  # without a bound
    ],
)
def test_the_value_loss_case_by_case(value, old, returns, clip, loss, clipped):
    def compute(value: jax.Array) -> tuple[jax.Array, jax.Array]:
        return clipped_value_loss(value, jnp.float32(old), jnp.float32(returns), clip)

    (ours, active), slope = jax.value_and_grad(compute, has_aux=True)(jnp.float32(value))
    assert (float(ours), bool(active)) == (pytest.approx(loss), clipped)
    assert float(slope) == pytest.approx(0.0 if clipped else value - returns)


def by_hand(values: np.ndarray, batch: Batch, clip: float) -> dict[str, float]:
    """The metrics of a step over all sampled tokens of a batch, in NumPy."""
    v, R, old = (
        x[batch.sampled].astype(float) for x in (values, batch.columns["returns"], batch.columns["old_values"])
    )
    plain, bounded = (v - R) ** 2, (np.clip(v, old - clip, old + clip) - R) ** 2
    return {
        "critic/value_loss": 0.5 * np.maximum(plain, bounded).mean(),
        "critic/value_clip_fraction": (bounded > plain).mean(),
        "critic/values_mean": v.mean(),
        "critic/returns_mean": R.mean(),
        "critic/explained_variance": 1 - np.var(R - v) / np.var(R),
    }


def test_a_critic_learns_and_says_how_much_it_explains(model, params, mesh, batch):
    """The metrics of a step are over all micro-batches together."""
    step, state = make_critic_step(model, 0.5, OPTIMIZER, mesh), begin_critic(params, model, OPTIMIZER, mesh)
    history, weights = [], []
    for _ in range(12):
        weights.append(jax.tree.map(np.array, state.params))
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    assert history[0]["critic/explained_variance"] == 0 == history[0]["critic/values_mean"]
    assert history[-1]["critic/explained_variance"] > 0.2
    assert history[-1]["critic/value_loss"] < 0.9 * history[0]["critic/value_loss"]

    compute = jax.jit(Outputs(model, ("values",)).of)
    rows = [jax.tree.map(lambda x: x[micro] if x.ndim else x, batch) for micro in range(4)]  # noqa: B023
    expected = by_hand(np.stack([compute(weights[-1], each)["values"] for each in rows]), batch, 0.5)
    assert 0.05 < expected["critic/value_clip_fraction"] < 0.95
    assert history[-1].keys() == expected.keys() | {"critic/grad_norm", "critic/learning_rate", "critic/update_skipped"}
    for name, value in expected.items():
        np.testing.assert_allclose(history[-1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_returns_that_are_all_the_same_leave_nothing_to_explain():
    assert explained_variance(jnp.float32(0.1), jnp.float32(1e-7)) == 0
    assert explained_variance(jnp.float32(0.5), jnp.float32(1.0)) == 0.75
