"""The loss is a global token mean over sampled tokens alone: packing, micro-batches and meshes do not change it."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState, fresh_state, make_optimizer, state_shardings
from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.learn.step import Columns, Outputs, TokenTerms, loss_and_gradient, make_step, token_logprobs
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.rl.loss import ClipConfig, policy_token_loss

CLIP = ClipConfig(dual=1.5)
LOSS = policy_token_loss(CLIP)
TEMPERATURE = 0.7
# What XLA says when it can change a layout only by giving every device the whole array.
REMATERIALIZATION = "Involuntary full rematerialization"
# No clipping, so that Adam's first moment after one step is (1 - b1) x the gradient.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, max_grad_norm=1e9, weight_decay=0.1)


@pytest.fixture(scope="module")
def examples(model, fresh_logits) -> list[Example]:
    """Trajectories of prompt, turn, tool output, turn; one begins with a sampled token, one has none at all."""
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate(rng.integers(6, 30, 12)):
        sampled = np.ones(length, bool)
        sampled[:3] = sampled[length // 2 : length // 2 + 2] = False
        sampled[0] = index == 3
        sampled &= index != 5
        ids = rng.integers(0, model.vocab_size, length)
        (values,) = fresh_logits([ids.tolist()])
        # Old log-probabilities near the new ones, so that some ratios are inside the bounds and some beyond.
        new = np.asarray(jax.nn.log_softmax(values[:-1] / TEMPERATURE))[np.arange(length - 1), ids[1:]]
        old = np.r_[0.0, new] + rng.normal(0, 0.3, length)
        columns = {"old_logprobs": np.where(sampled, old, 0.0), "advantages": float(rng.normal())}
        made.append(Example(ids.tolist(), sampled, columns))
    return made


def gradients(model: ModelConfig, loss: Callable = LOSS) -> Callable:
    return jax.jit(partial(loss_and_gradient, Outputs(model, temperature=TEMPERATURE), loss))


@pytest.fixture(scope="module")
def compute(model) -> Callable:
    return gradients(model)


@pytest.fixture(scope="module")
def batch(examples) -> Batch:
    """8 rows of one micro-batch: what every mesh of 8 devices can split."""
    return pack(examples, 48, 8, 1)


@pytest.fixture(scope="module")
def expected(compute, params, batch) -> tuple[Params, dict[str, jax.Array]]:
    return compute(params, batch)


def largest_difference(ours: Params, theirs: Params) -> float:
    """Of all weights, each one's |ours - theirs| / |theirs|."""

    def relative(x: jax.Array, y: jax.Array) -> float:
        x, y = np.asarray(x), np.asarray(y)
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    return max(jax.tree.leaves(jax.tree.map(relative, ours, theirs)))


def assert_same_metrics(ours: dict, theirs: dict, rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(value, theirs[key], rtol=rtol, atol=1e-7, err_msg=key)


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """What the process writes to file descriptor 2, XLA's own messages included."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode(errors="replace"))[1]
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def test_the_loss_is_the_sum_over_sampled_tokens_over_their_number(examples, expected, fresh_logits):
    """By hand in numpy, one trajectory at a time."""
    total = {"loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0, "logprob_diff_mean": 0.0}
    tokens = 0
    for example, values in zip(examples, fresh_logits([e.ids for e in examples]), strict=True):
        scaled = values.astype(np.float64) / TEMPERATURE
        logs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        for t in np.flatnonzero(example.sampled):
            tokens += 1
            new = logs[t - 1, example.ids[t]] if t else 0.0  # nothing predicts a first token
            ratio, A = np.exp(new - example.columns["old_logprobs"][t]), example.columns["advantages"]
            bound = np.clip(ratio, 1 - CLIP.low, 1 + CLIP.high)
            loss = max(-ratio * A, -bound * A)
            loss = min(loss, -CLIP.dual * A) if A < 0 else loss
            total["loss"] += loss
            total["entropy"] += -(np.exp(logs[t - 1]) * logs[t - 1]).sum() if t else 0.0
            total["clip_fraction"] += not np.isclose(loss, -ratio * A)
            total["logprob_diff_mean"] += abs(new - example.columns["old_logprobs"][t])
    assert 0.05 < total["clip_fraction"] / tokens < 0.95
    assert_same_metrics({key: value / tokens for key, value in total.items()}, expected[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("row_length", "rows_per_micro", "micro_batches", "remat"),
    [(48, 1, None, "none"), (96, 3, 5, "dots"), (30, 4, None, "full")],
)
def test_packing_and_micro_batches_do_not_change_the_gradient(
    model, params, examples, compute, expected, row_length, rows_per_micro, micro_batches, remat
):
    order = np.random.default_rng(row_length).permutation(len(examples))
    batch = pack([examples[i] for i in order], row_length, rows_per_micro, micro_batches)
    run = compute if remat == "none" else gradients(dataclasses.replace(model, remat=remat))
    gradient, metrics = run(params, batch)
    difference = largest_difference(gradient, expected[0])
    assert difference <= 1e-5
    assert_same_metrics(metrics, expected[1])
    print(f"largest relative difference {difference:.1e}")


def test_tokens_that_were_not_sampled_have_no_effect(model, params, batch, compute, expected):
    """Whatever stands beside them, and whatever the loss makes of them: gradient and metrics are the same bits."""
    results = []
    for noise in ({"old_logprobs": np.nan, "advantages": 1e30}, {"old_logprobs": 0.0, "advantages": np.nan}):
        columns = {name: np.where(batch.sampled, x, np.float32(noise[name])) for name, x in batch.columns.items()}
        results.append(compute(params, batch._replace(columns=columns)))
    for gradient, metrics in results:
        jax.tree.map(np.testing.assert_array_equal, gradient, expected[0])
        jax.tree.map(np.testing.assert_array_equal, metrics, expected[1])

    def loud(outputs: Columns, batch: Batch) -> TokenTerms:
        terms = LOSS(outputs, batch)
        noise = jnp.where(batch.sampled, 1.0, jnp.nan)
        return TokenTerms(terms.loss * noise, {key: x * noise for key, x in terms.metrics.items()})

    gradient, metrics = gradients(model, loud)(params, batch)
    assert largest_difference(gradient, expected[0]) <= 1e-6
    assert_same_metrics(metrics, expected[1], rtol=1e-6)


def test_a_batch_without_sampled_tokens_is_a_gradient_of_zero(params, batch, compute):
    gradient, metrics = compute(params, batch._replace(sampled=np.zeros_like(batch.sampled)))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((gradient, metrics)))


def test_logprobs_of_a_segment_do_not_see_the_one_before(model, params, examples):
    batch = pack(examples, 96, 4, 1)
    rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    for values in token_logprobs(model, params, rows, 1.0):
        first = (rows.positions == 0) | (rows.segments == 0)
        assert not np.asarray(values)[first].any() and np.asarray(values)[~first].all()


@pytest.fixture(scope="module")
def one_step(model, params, mesh, batch) -> tuple[Callable, TrainState, dict[str, jax.Array]]:
    update, state, metrics = step_on(mesh, model, params, batch)
    return update, jax.device_get(state), metrics


def step_on(mesh: Mesh, model: ModelConfig, params: Params, batch: Batch) -> tuple:
    """One update on a mesh; returns the update, the new state and the metrics."""
    state = place(fresh_state(params, OPTIMIZER), model, mesh)
    update = make_step(Outputs(model, temperature=TEMPERATURE), LOSS, OPTIMIZER, mesh)
    return update, *update(state, batch)


def place(state: TrainState, model: ModelConfig, mesh: Mesh) -> TrainState:
    """A copy on this mesh, for an update to consume."""
    return jax.device_put(jax.tree.map(np.array, state), state_shardings(model, OPTIMIZER, mesh))


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


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=["fsdp8", "data2-fsdp2-tp2"])
def test_a_mesh_changes_nothing(model, params, batch, expected, one_step, sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with captured_stderr() as stderr:
        _, state, metrics = step_on(mesh, model, params, batch)
        assert REMATERIALIZATION not in stderr()
    split = [x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(state.params)]
    assert sum(split) >= 8  # it was a mesh indeed
    gradient = jax.tree.map(lambda x: x / (1 - OPTIMIZER.b1), first_moment(state))
    difference = largest_difference(gradient, expected[0])
    assert difference <= 1e-5
    assert_same_metrics(metrics, one_step[2])
    # Adam divides by the gradient's size, so an entry that is all rounding may move by some of a step.
    moved = jax.tree.map(
        lambda ours, theirs, old: np.asarray(ours - old) - np.asarray(theirs - old),
        *(jax.device_get(x) for x in (state.params, one_step[1].params, params)),
    )
    step = float(metrics["learning_rate"])
    apart = max(np.abs(x).max() for x in jax.tree.leaves(moved)) / step
    assert apart <= 1e-2
    print(f"gradient {difference:.1e} relative, parameters {apart:.1e} of a step")


def test_an_update_is_one_optimiser_step_and_compiles_once(model, params, mesh, batch, expected, one_step, compiles):
    update, state, metrics = one_step
    assert int(state.step) == 1
    # The gradient of `loss_and_gradient`, put through the optimiser by hand.
    optimizer = make_optimizer(OPTIMIZER)
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(expected[0], params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), state.params, optax.apply_updates(params, updates))
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(expected[0]), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 5e-4, rtol=1e-6)
    for key, value in expected[1].items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)

    old = place(state, model, mesh)
    known = len(compiles)
    columns = batch.columns | {"advantages": -batch.columns["advantages"]}
    state, metrics = update(old, batch._replace(columns=columns))
    assert len(compiles) == known
    assert int(state.step) == 2 and jax.tree.leaves(old.params)[0].is_deleted()
    np.testing.assert_allclose(metrics["learning_rate"], 1e-3, rtol=1e-6)


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def test_a_step_can_be_lowered_without_weights_or_tokens(model, params, mesh, batch, one_step):
    step, state, metrics = one_step
    shapes = jax.tree.map(abstract, fresh_state(params, OPTIMIZER)), jax.tree.map(abstract, batch)
    compiled = step.lower(*shapes).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > sum(x.nbytes for x in jax.tree.leaves(state))
    _, ours = compiled(place(fresh_state(params, OPTIMIZER), model, mesh), batch)
    assert_same_metrics(ours, metrics)


def test_outputs_are_the_ones_that_were_asked_for(model, params, batch):
    def watch(outputs: Columns, batch: Batch) -> TokenTerms:
        assert outputs.keys() == {"logprobs"}
        return TokenTerms(-outputs["logprobs"], {})

    outputs = Outputs(model, ("logprobs",))
    _, metrics = jax.eval_shape(partial(loss_and_gradient, outputs, watch), params, batch)
    assert metrics.keys() == {"loss"}
    with pytest.raises(ValueError, match=r"\['values'\] are not known; there are: logprobs, entropy"):
        Outputs(model, ("logprobs", "values"))


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_is_of_its_own_type(model, params, batch, weights, dtype):
    params = jax.tree.map(lambda x: x.astype(weights), params)
    compute = partial(loss_and_gradient, Outputs(model, temperature=TEMPERATURE), LOSS, dtype=dtype)
    gradient, metrics = jax.eval_shape(compute, params, batch)
    assert {x.dtype.name for x in jax.tree.leaves(gradient)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(metrics)} == {"float32"}


def test_a_gradient_in_bf16_is_that_in_fp32_to_its_precision(model, params, examples, expected):
    compute = partial(loss_and_gradient, Outputs(model, temperature=TEMPERATURE), LOSS, dtype="bfloat16")
    gradient, metrics = jax.jit(compute)(params, pack(examples, 48, 1))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), gradient)
    assert 1e-5 < largest_difference(rounded, expected[0]) < 0.02
    assert_same_metrics(metrics, expected[1])
