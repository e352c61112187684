"""The loss is a mean over all sampled tokens only: packing, micro-batches and meshes do not change it."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.critic import critic_params, value_token_loss
from retool_jax.learn.optimizer import TrainState, fresh_state, make_optimizer, state_shardings
from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.learn.step import (
    Columns,
    Outputs,
    TokenLoss,
    TokenTerms,
    loss_and_gradient,
    make_step,
    skipped,
    spread_of,
    token_logprobs,
    token_values,
)
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import Params, init_params
from retool_jax.rl.config import ClipConfig, RLConfig
from retool_jax.rl.loss import clipped_loss

CLIP = ClipConfig(dual=1.5)
TEMPERATURE = 0.7
# XLA's message when it can change a sharding only by replicating the whole array.
REMATERIALIZATION = "Involuntary full rematerialization"
# No clipping, so that Adam's first moment after one step is (1 - b1) x the gradient.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, max_grad_norm=1e9, weight_decay=0.1)


policy_loss = partial(clipped_loss, rl=RLConfig(clip=CLIP))


class Kind(NamedTuple):
    """What a step trains, the policy or a critic."""

    outputs: Outputs
    loss: TokenLoss
    params: Params

    def gradients(self, loss: TokenLoss | None = None, **numerics) -> Callable:
        outputs = dataclasses.replace(self.outputs, model=dataclasses.replace(self.outputs.model, **numerics))
        return jax.jit(partial(loss_and_gradient, outputs, loss or self.loss))


@pytest.fixture(scope="module")
def mild(model, params) -> Params:
    """Weights closer to the initialisation than in other tests, so that fp32 gradients are exact to 1e-6."""
    fresh = init_params(model, jax.random.key(1))
    return jax.jit(partial(jax.tree.map, lambda x, y: 0.1 * x + 0.9 * y))(params, fresh)


@pytest.fixture(scope="module")
def policy(model, mild) -> Kind:
    return Kind(Outputs(model, temperature=TEMPERATURE), policy_loss, mild)


@pytest.fixture(scope="module")
def critic(model, mild) -> Kind:
    params, rng = critic_params(model, mild), np.random.default_rng(2)
    params["value"][...], params["value_bias"][...] = rng.normal(0, 0.03, model.hidden_size).astype("f4"), 0.5
    return Kind(Outputs(model, ("values",)), value_token_loss(0.5), jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module", params=["policy", "critic"])
def kind(request) -> Kind:
    return request.getfixturevalue(request.param)


policy_alone = pytest.mark.parametrize("kind", ["policy"], indirect=True)


@pytest.fixture(scope="module")
def examples(model, mild, fresh_logits) -> list[Example]:
    """Trajectories of prompt, turn, tool output, turn; one begins with a sampled token, one has none at all.

    Their columns are for both kinds, with a weight for each token.
    """
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate(rng.integers(6, 30, 12)):
        sampled = np.ones(length, bool)
        sampled[:3] = sampled[length // 2 : length // 2 + 2] = False
        sampled[0] = index == 3
        sampled &= index != 5
        ids = rng.integers(0, model.vocab_size, length)
        (values,) = fresh_logits([ids.tolist()], mild)
        # Old log-probabilities near the new ones, so that some ratios are inside the bounds and some beyond. In NumPy,
        # like everything that is done once: JAX would compile a program for each operation and each length.
        scaled = values[:-1] / np.float32(TEMPERATURE)
        new = (scaled - np.log(np.exp(scaled).sum(-1, keepdims=True)))[np.arange(length - 1), ids[1:]]
        old = np.r_[0.0, new] + rng.normal(0, 0.3, length)
        columns = {"old_logprobs": np.where(sampled, old, 0.0), "advantages": float(rng.normal())}
        columns |= {"weights": rng.uniform(0, 2, length)}
        columns |= {"returns": rng.normal(size=length), "old_values": rng.normal(size=length)}
        made.append(Example(ids.tolist(), sampled, columns))
    return made


@pytest.fixture(scope="module")
def compute(kind) -> Callable:
    return kind.gradients()


@pytest.fixture(scope="module")
def batch(examples) -> Batch:
    """8 rows of one micro-batch, which every mesh of 8 devices can split."""
    return pack(examples, 48, 8, 1)


@pytest.fixture(scope="module")
def expected(kind, compute, batch) -> tuple[Params, dict[str, jax.Array]]:
    return compute(kind.params, batch)


def largest_difference(ours: Params, theirs: Params) -> float:
    """For each weight |ours - theirs| / |theirs|."""

    def relative(x: jax.Array, y: jax.Array) -> float:
        x, y = np.asarray(x), np.asarray(y)
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return max(jax.tree.leaves(jax.tree.map(relative, ours, theirs)))


def assert_same_gradient(ours: Params, theirs: Params) -> None:
    """Equal to fp32 precision: every entry to 1e-6, relative to the largest if that is above 1, and each norm."""
    pairs = list(zip(*(jax.tree.leaves(jax.device_get(x)) for x in (ours, theirs)), strict=True))
    entry = max(np.abs(x - y).max() for x, y in pairs) / max(1.0, *(np.abs(y).max() for _, y in pairs))
    weight = largest_difference(ours, theirs)
    assert entry <= 1e-6 and weight <= 5e-6
    print(f"gradients differ by {entry:.1e} in an entry, and by {weight:.1e} of a weight's norm")


def assert_same_metrics(ours: dict, theirs: dict, rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=rtol, atol=1e-7, err_msg=key)


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """The text that the process writes to file descriptor 2, which includes XLA's own messages."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode(errors="replace"))[1]
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@policy_alone
def test_the_loss_is_the_sum_over_sampled_tokens_over_their_number(examples, mild, expected, fresh_logits):
    """Computed in NumPy, one trajectory at a time; a token's weight multiplies only its loss."""
    total = {"loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0}
    off = []
    for example, values in zip(examples, fresh_logits([e.ids for e in examples], mild), strict=True):
        scaled = values.astype(np.float64) / TEMPERATURE
        logs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        for t in np.flatnonzero(example.sampled):
            new = logs[t - 1, example.ids[t]] if t else 0.0  # a first token has no prediction
            ratio, A = np.exp(new - example.columns["old_logprobs"][t]), example.columns["advantages"]
            bound = np.clip(ratio, 1 - CLIP.low, 1 + CLIP.high)
            loss = max(-ratio * A, -bound * A)
            loss = min(loss, -CLIP.dual * A) if A < 0 else loss
            total["loss"] += loss * example.columns["weights"][t]
            total["entropy"] += -(np.exp(logs[t - 1]) * logs[t - 1]).sum() if t else 0.0
            total["clip_fraction"] += not np.isclose(loss, -ratio * A)
            off.append(abs(new - example.columns["old_logprobs"][t]))
    means = {key: value / len(off) for key, value in total.items()}
    assert 0.05 < means["clip_fraction"] < 0.95
    spread = {"mean": np.mean(off), "std": np.std(off), "p99": np.quantile(off, 0.99), "max": max(off)}
    spread = {f"logprob_diff_{name}": value for name, value in spread.items()}
    told = {name: value for name, value in expected[1].items() if not name.startswith("mismatch_")}
    assert_same_metrics(means | spread, told, rtol=1e-4)


def one_a_row(examples: list[Example], row_length: int, rows_per_micro: int) -> Batch:
    """Each example in its own padded row."""

    def stack(*rows: np.ndarray) -> np.ndarray:
        count = len(examples) // rows_per_micro
        return np.concatenate(rows).reshape(count, rows_per_micro, row_length) if rows[0].ndim else np.int32(count)

    return jax.tree.map(stack, *(pack([example], row_length, 1) for example in examples))


@pytest.mark.parametrize(
    ("rows_per_micro", "row_length", "micro_batches", "remat"),
    [(1, 48, None, "none"), (2, 96, 5, "dots"), (4, 30, "padded", "full")],
)
def test_packing_and_micro_batches_do_not_change_the_gradient(
    kind, examples, compute, expected, rows_per_micro, row_length, micro_batches, remat
):
    """Compared with one micro-batch of 8 packed rows."""
    order = np.random.default_rng(row_length).permutation(len(examples))
    examples = [examples[i] for i in order]
    if micro_batches == "padded":
        batch = one_a_row(examples, row_length, rows_per_micro)
    else:
        batch = pack(examples, row_length, rows_per_micro, micro_batches)
    run = compute if remat == "none" else kind.gradients(remat=remat)
    gradient, metrics = run(kind.params, batch)
    assert_same_gradient(gradient, expected[0])
    assert_same_metrics(metrics, expected[1], rtol=2e-6)


def test_a_prompt_that_samples_share_does_not_change_the_gradient(kind, examples, compute):
    """Three prompts with four samples each: prompts shared in a row, compared with a prompt for each sample."""
    prompts = np.random.default_rng(1).integers(0, kind.outputs.model.vocab_size, (3, 12))
    samples = []
    for index, example in enumerate(examples):
        columns = {name: np.r_[np.zeros(9), x] if np.ndim(x) else x for name, x in example.columns.items()}
        sampled = np.r_[np.zeros(12, bool), example.sampled[3:]]
        samples.append(Example([*prompts[index % 3], *example.ids[3:]], sampled, columns))
    apart, shared = (pack(samples, 48, 8, 1, share) for share in (False, True))
    assert [(x.segments > 0).any(-1).sum() for x in (apart, shared)] == [8, 7]
    gradient, metrics = compute(kind.params, apart)
    ours, told = compute(kind.params, shared)
    assert_same_gradient(ours, gradient)
    assert_same_metrics(told, metrics, rtol=2e-6)


def test_tokens_that_were_not_sampled_have_no_effect(kind, batch, compute, expected):
    """Whatever their values in any column, gradient and metrics have the same bits."""
    for noise in (np.nan, 1e30):
        columns = {name: np.where(batch.sampled, x, np.float32(noise)) for name, x in batch.columns.items()}
        gradient, metrics = compute(kind.params, batch._replace(columns=columns))
        jax.tree.map(np.testing.assert_array_equal, gradient, expected[0])
        jax.tree.map(np.testing.assert_array_equal, metrics, expected[1])


def test_the_loss_of_tokens_that_were_not_sampled_has_no_effect(kind, batch, expected):
    def loud(outputs: Columns, batch: Batch) -> TokenTerms:
        noise = jnp.where(batch.sampled, 1.0, jnp.nan)
        return TokenTerms(*jax.tree.map(lambda x: x * noise, tuple(kind.loss(outputs, batch))))

    gradient, metrics = kind.gradients(loud)(kind.params, batch)
    assert largest_difference(gradient, expected[0]) <= 1e-6
    assert_same_metrics(metrics, expected[1], rtol=1e-6)


def test_a_batch_without_sampled_tokens_is_a_gradient_of_zero(kind, batch, compute):
    gradient, metrics = compute(kind.params, batch._replace(sampled=np.zeros_like(batch.sampled)))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((gradient, metrics)))


@pytest.mark.parametrize("n", [1, 2, 99, 101, 102, 500])
def test_a_spread_is_that_of_numpy(n):
    rng = np.random.default_rng(n)
    values, sampled = rng.normal(size=(3, 4, 50)).astype("f4"), np.zeros((3, 4, 50), bool)
    sampled.reshape(-1)[rng.permutation(sampled.size)[:n]] = True
    kept = values[sampled]
    expected = {"mean": kept.mean(), "std": kept.std(), "p99": np.quantile(kept, 0.99), "max": kept.max()}
    assert_same_metrics(spread_of(np.where(sampled, values, np.nan), sampled), expected)
    values[np.nonzero(sampled)[0][0], :, :] = np.nan
    assert np.isnan(list(spread_of(values, sampled).values())).all()


def test_outputs_of_a_segment_do_not_see_the_one_before(model, params, critic, examples):
    batch = pack(examples, 96, 4, 1)
    rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    there = (rows.positions > 0) & (rows.segments > 0)
    for values in jax.jit(partial(token_logprobs, model), static_argnums=2)(params, rows, 1.0):
        np.testing.assert_array_equal(np.asarray(values) != 0, there & rows.sampled)
    values = jax.jit(partial(token_values, model))(critic.params, rows)
    np.testing.assert_array_equal(np.asarray(values) != 0, there)


@pytest.fixture(scope="module")
def one_step(kind, mesh, batch) -> tuple[Callable, TrainState, dict[str, jax.Array]]:
    update, state, metrics = step_on(mesh, kind, batch)
    return update, jax.device_get(state), metrics


def step_on(mesh: Mesh, kind: Kind, batch: Batch) -> tuple:
    """One update on a mesh; returns the update, the new state and the metrics."""
    state = place(fresh_state(kind.params, OPTIMIZER), kind, mesh)
    update = make_step(kind.outputs, kind.loss, OPTIMIZER, mesh)
    return update, *update(state, batch)


def place(state: TrainState, kind: Kind, mesh: Mesh) -> TrainState:
    """A copy on this mesh, for an update to donate."""
    shardings = state_shardings(kind.outputs.model, OPTIMIZER, mesh, kind.outputs.value_head)
    return jax.device_put(jax.tree.map(np.array, state), shardings)


def first_moment(state: TrainState) -> Params:
    (adam,) = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(x)]
    return adam.mu


def is_adam(x: object) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def test_a_rematerialization_would_be_seen():
    mesh = make_mesh(MeshConfig(2, 2, 2))

    def awkward(x: jax.Array) -> jax.Array:
        for spec in (PartitionSpec(("tp", "fsdp", "data")), PartitionSpec(None, None, ("tp", "data"))):
            x = jnp.sin(jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)))
        return x

    with captured_stderr() as stderr:
        jax.jit(awkward).lower(jnp.zeros((8, 4, 8))).compile()
        assert REMATERIALIZATION in stderr()


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 2)], ids=["fsdp2-tp2", "data2-fsdp2-tp2"])
def test_a_mesh_changes_nothing(kind, batch, expected, one_step, sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with captured_stderr() as stderr:
        _, state, metrics = step_on(mesh, kind, batch)
        assert REMATERIALIZATION not in stderr()
    split = [x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(state.params)]
    assert sum(split) >= 8  # the mesh was really used
    gradient = jax.tree.map(lambda x: x / (1 - OPTIMIZER.b1), jax.device_get(first_moment(state)))
    assert_same_gradient(gradient, expected[0])
    assert_same_metrics(metrics, one_step[2], rtol=2e-6)
    # Adam divides by the gradient's size, so an entry that is only rounding error may move by part of a step.
    moved = jax.tree.map(
        lambda ours, theirs, old: np.asarray(ours - old) - np.asarray(theirs - old),
        *(jax.device_get(x) for x in (state.params, one_step[1].params, kind.params)),
    )
    step = float(metrics["learning_rate"])
    apart = max(np.abs(x).max() for x in jax.tree.leaves(moved)) / step
    assert apart <= 5e-2
    print(f"parameters {apart:.1e} of a step apart")


@policy_alone
def test_an_update_is_one_optimiser_step_and_compiles_once(kind, mesh, batch, expected, one_step, compiles):
    update, state, metrics = one_step
    assert int(state.step) == 1
    # The gradient of `loss_and_gradient`, put through the optimiser by hand.
    optimizer = make_optimizer(OPTIMIZER)

    @jax.jit
    def by_hand(gradient: Params, params: Params) -> tuple[Params, jax.Array]:
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates), optax.tree.norm(gradient)

    params, norm = by_hand(expected[0], kind.params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), state.params, params)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 5e-4, rtol=1e-6)
    for key, value in expected[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)

    old = place(state, kind, mesh)
    known = len(compiles)
    columns = batch.columns | {"advantages": -batch.columns["advantages"]}
    state, metrics = update(old, batch._replace(columns=columns))
    assert len(compiles) == known
    assert int(state.step) == 2 and jax.tree.leaves(old.params)[0].is_deleted()
    np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, mesh, batch, one_step, value):
    """The next step gives the same result as without it."""
    update, first, metrics = one_step
    assert float(metrics["update_skipped"]) == 0.0 and skipped(metrics) == ""
    name = "returns" if kind.outputs.value_head else "advantages"
    broken = np.where(batch.sampled & (np.cumsum(batch.sampled).reshape(batch.sampled.shape) == 7), value, 0.0)
    begun = place(fresh_state(kind.params, OPTIMIZER), kind, mesh)
    columns = batch.columns | {name: np.float32(batch.columns[name] + broken)}
    same, metrics = update(begun, batch._replace(columns=columns))
    assert not np.isfinite(metrics["grad_norm"]) and float(metrics["update_skipped"]) == 1.0
    assert skipped(metrics) == "100% of its updates were left out, as their gradient was not finite"
    after, metrics = update(same, batch)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(x, y)


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@policy_alone
def test_a_step_can_be_lowered_without_weights_or_tokens(kind, mesh, batch, one_step):
    step, state, metrics = one_step
    shapes = jax.tree.map(abstract, fresh_state(kind.params, OPTIMIZER)), jax.tree.map(abstract, batch)
    compiled = step.lower(*shapes).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > sum(x.nbytes for x in jax.tree.leaves(state))
    _, ours = compiled(place(fresh_state(kind.params, OPTIMIZER), kind, mesh), batch)
    assert_same_metrics(ours, metrics)


def test_outputs_are_the_ones_that_were_asked_for(model, params, batch):
    def watch(outputs: Columns, batch: Batch) -> TokenTerms:
        assert outputs.keys() == {"logprobs"}
        return TokenTerms(-outputs["logprobs"], {})

    outputs = Outputs(model, ("logprobs",))
    _, metrics = jax.eval_shape(partial(loss_and_gradient, outputs, watch), params, batch)
    assert metrics.keys() == {"loss"}
    with pytest.raises(ValueError, match=r"\['logits'\] are not known; there are: logprobs, entropy, values"):
        Outputs(model, ("logprobs", "logits"))
    with pytest.raises(ValueError, match="logprobs, values are of two models"):
        Outputs(model, ("logprobs", "values"))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_is_of_its_own_type(policy, batch, weights, dtype):
    params = jax.tree.map(lambda x: x.astype(weights), policy.params)
    compute = partial(loss_and_gradient, policy.outputs, policy.loss, dtype=dtype)
    gradient, metrics = jax.eval_shape(compute, params, batch)
    assert {x.dtype.name for x in jax.tree.leaves(gradient)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(metrics)} == {"float32"}


@policy_alone
def test_a_gradient_in_bf16_is_that_in_fp32_to_its_precision(kind, examples, expected):
    compute = partial(loss_and_gradient, kind.outputs, kind.loss, dtype="bfloat16")
    gradient, metrics = jax.jit(compute)(kind.params, pack(examples, 48, 1))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), gradient)
    assert 1e-5 < largest_difference(rounded, expected[0]) < 0.02
    assert_same_metrics(metrics, expected[1])
