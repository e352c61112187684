"""The optimiser's schedule, decay and clip, and the initial train state."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retool_jax.errors import UserError
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import (
    TrainState,
    begin_from,
    init_state,
    learning_rate,
    make_optimizer,
    state_shardings,
)
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import Params, Weight
from retool_jax.run.load import load

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, max_grad_norm=1e9, weight_decay=0.1)


def first_moment(state: TrainState) -> Params:
    (adam,) = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(x)]
    return adam.mu


def is_adam(x: object) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def test_weights_that_training_begins_from_are_there_once(model, params, alive):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tp=2))
    copied = jax.tree.map(np.array, params)  # do not donate the weights of other tests
    given = jax.device_put(copied, state_shardings(model, OPTIMIZER, mesh).params)
    size, before = sum(x.nbytes for x in jax.tree.leaves(given)), alive()
    state = begin_from(given, model, OPTIMIZER, mesh)  # the caller still needs them
    assert 2 * size <= alive() - before < 2.01 * size, "two moments, and no second copy of the weights"
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


def test_weight_decay_acts_on_matrices_and_on_nothing_else(params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.1))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(zeros, params)
    decayed = set()

    def check(path: tuple, weight: Weight, update: Weight) -> None:
        name = path[-1].key
        if np.asarray(update[...]).any():
            decayed.add(name)
            np.testing.assert_allclose(update[...], -0.05 * weight[...], rtol=1e-5)

    jax.tree_util.tree_map_with_path(check, params, updates, is_leaf=lambda x: isinstance(x, Weight))
    assert decayed == {"embedding", "q", "k", "v", "o", "gate", "up", "down"}


def test_the_gradient_is_clipped_by_its_global_norm(params):
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=0.5))
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))
    for size in (0.01, 10.0):
        gradient = jax.tree.map(lambda x: x * size / optax.tree.norm(params), params)  # noqa: B023
        _, opt_state = update(gradient, params)
        norm = optax.tree.norm(first_moment(TrainState(0, params, opt_state))) / (1 - OptimizerConfig.b1)
        np.testing.assert_allclose(norm, min(size, 0.5), rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (OptimizerConfig(2.0), {0: 2.0, 1: 2.0, 1000: 2.0}),
        (OptimizerConfig(2.0, warmup_steps=1), {0: 2.0, 1: 2.0}),
        (OptimizerConfig(2.0, warmup_steps=4), {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 99: 2.0}),
        (OptimizerConfig(2.0, decay_steps=10), {0: 2.0, 5: 1.1, 10: 0.2, 11: 0.2}),
        (
            OptimizerConfig(2.0, warmup_steps=4, decay_steps=10, final_fraction=0.5),
            {0: 0.5, 3: 2.0, 4: 2.0, 9: 1.5, 14: 1.0, 500: 1.0},
        ),
    ],
)
def test_learning_rate_at_its_edges(config, values):
    schedule = learning_rate(config)
    np.testing.assert_allclose([schedule(step) for step in values], list(values.values()), rtol=1e-6)


def plain_adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """What the optimiser is in optax's own words; its moments are of the weights' type."""
    matrices = {"embedding", "q", "k", "v", "o", "gate", "up", "down"}

    def mask(params: Params) -> Params:
        def is_matrix(path: tuple, weight: Weight) -> Weight:
            return weight.replace(path[-1].key in matrices)

        return jax.tree_util.tree_map_with_path(is_matrix, params, is_leaf=lambda x: isinstance(x, Weight))

    adamw = optax.adamw(learning_rate(config), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def two_updates(optimizer: optax.GradientTransformation, params: Params) -> tuple[Params, optax.OptState]:
    rng = np.random.default_rng(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(2):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_moments_in_fp32_are_those_of_plain_adamw_bit_by_bit(params):
    ours, theirs = (two_updates(make(OPTIMIZER), params) for make in (make_optimizer, plain_adamw))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_are_kept_in_their_own_type(params, weights, dtype):
    config = dataclasses.replace(OPTIMIZER, moment_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(weights), params)
    optimizer = make_optimizer(config)
    state = jax.eval_shape(optimizer.init, params)
    _, after = jax.eval_shape(optimizer.update, params, state, params)
    floats = [x.dtype.name for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats == [dtype] * 2 * len(jax.tree.leaves(params))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(after)]
    assert jax.tree.structure(state) == jax.tree.structure(after)


def test_moments_in_bf16_lead_to_nearly_the_same_weights(params):
    ours, theirs = (
        two_updates(make_optimizer(dataclasses.replace(OPTIMIZER, moment_dtype=dtype)), params)[0]
        for dtype in ("bfloat16", "float32")
    )
    for x, y, before in zip(*map(jax.tree.leaves, (ours, theirs, params)), strict=True):
        np.testing.assert_allclose(x - before, y - before, rtol=0.03, atol=2e-5)


def test_a_state_with_moments_in_bf16_lies_on_a_mesh(model):
    config, mesh = dataclasses.replace(OPTIMIZER, moment_dtype="bfloat16"), make_mesh(MeshConfig(1, 4, 2))
    state = jax.eval_shape(lambda: init_state(model, config, mesh, 0))
    shardings = state_shardings(model, config, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    assert jax.tree.leaves(shardings) == jax.tree.leaves(state_shardings(model, OPTIMIZER, mesh))


@pytest.mark.parametrize("name", ["gradient_dtype", "moment_dtype"])
def test_a_type_that_is_none_is_refused(name):
    with pytest.raises(UserError, match=rf"sft.optimizer.{name}=float16 is not one of: float32, bfloat16"):
        load(["config=sft", f"sft.optimizer.{name}=float16"])


def test_what_a_run_may_set_of_it_is_known_without_jax():
    code = "import sys, retool_jax.learn.config; sys.exit(bool({'jax', 'optax'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


MUON = OptimizerConfig(learning_rate=0.5, weight_decay=0.0, max_grad_norm=1e9, name="muon")
SIDES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # leading axes of a layer's rows


def gradient_like(params: Params) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


def matrices_of(name: str, weight: jax.Array) -> np.ndarray:
    """A layer's weights as matrices [L,rows,columns]; heads and head_dim are one side."""
    rows = int(np.prod(weight.shape[1 : 1 + SIDES[name]]))
    return np.asarray(weight).reshape(weight.shape[0], rows, -1)


def test_muon_changes_matrices_of_layers_as_optax_does_one_by_one(params):
    optimizer, gradient = make_optimizer(MUON), gradient_like(params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    alone = optax.contrib.muon(MUON.learning_rate, consistent_rms=0.2)
    for name in SIDES:
        given = [jnp.asarray(x) for x in matrices_of(name, gradient["layers"][name][...])]
        wanted, _ = jax.jit(alone.update)(given, alone.init(given), given)
        ours = matrices_of(name, updates["layers"][name][...])
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)
        singular = np.linalg.svd(ours, compute_uv=False) / (0.5 * 0.2 * max(ours.shape[1:]) ** 0.5)
        assert (singular < 1.3).all() and (singular > 0.5).mean() > 0.9, "about one, but where the gradient has nothing"


def test_muon_leaves_everything_else_to_adam_with_nesterovs_momentum(params):
    adam = optax.nadamw(MUON.learning_rate, b1=MUON.b1, b2=MUON.b2, weight_decay=0.0)
    gradient = gradient_like(params)
    ours, theirs = (
        jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]
        for optimizer in (make_optimizer(MUON), adam)
    )
    same = set()

    def check(path: tuple, x: Weight, y: Weight) -> None:
        if np.allclose(x[...], y[...], rtol=1e-4):
            same.add(path[-1].key)

    jax.tree_util.tree_map_with_path(check, ours, theirs, is_leaf=lambda x: isinstance(x, Weight))
    names = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert same == names - SIDES.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_keeps_one_moment_of_a_matrix(params, dtype):
    state = jax.eval_shape(make_optimizer(dataclasses.replace(MUON, moment_dtype=dtype)).init, params)
    weights = sum(x.size for x in jax.tree.leaves(params))
    matrices = sum(params["layers"][name][...].size for name in SIDES)
    moments = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating) and x.shape != (3,)]
    assert sum(x.size for x in moments) == 2 * weights - matrices
    assert {x.dtype.name for x in moments} == {dtype}
    assert [x.dtype for x in jax.tree.leaves(state) if x.shape == (3,)] == [jnp.float32], "Newton-Schulz's coefficients"


def test_muon_on_a_mesh_is_muon_on_one_device(model, params):
    gradient, optimizer = gradient_like(params), make_optimizer(MUON)
    alone, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    shardings = state_shardings(model, MUON, make_mesh(MeshConfig(1, 4, 2)))

    def place(weights: Params, like: Params) -> Params:
        return jax.device_put(jax.tree.map(np.array, weights), like)

    state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(place(params, shardings.params))
    split, after = jax.jit(optimizer.update)(place(gradient, shardings.params), state, place(params, shardings.params))
    assert jax.tree.structure(after) == jax.tree.structure(shardings.opt_state)
    for x, y in zip(*map(jax.tree.leaves, (split, alone)), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=1e-6)


def test_an_optimiser_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"sft.optimizer.name=lion is not one of: adamw, muon"):
        load(["config=sft", "sft.optimizer.name=lion"])
