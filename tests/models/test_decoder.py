"""Parts of the decoder: norms, packed rows, extending a cache, rematerialisation."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from retool_jax.mesh import RULES
from retool_jax.models.cache import init_cache
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import (
    Params,
    Weight,
    abstract_params,
    extend,
    forward,
    init_params,
    logits,
    rms_norm,
    unstack,
)


def test_rms_norm_is_the_formula():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(3, 16)) * 5, rng.normal(size=16)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale), 1e-6), expected, atol=1e-5)


def test_every_weight_names_each_of_its_axes():
    for tied in (True, False):
        _, abstract = abstract_params(ModelConfig(tie_embeddings=tied))
        weights = jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, Weight))
        assert all(len(weight.logical) == len(weight.shape) and set(weight.logical) <= set(RULES) for weight in weights)


def test_weights_have_the_names_that_checkpoints_know():
    """Whatever module holds them: with a new name no existing checkpoint could be read."""
    layer = {"attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"}
    cases = {
        ModelConfig(): (set(), {"q_bias", "k_bias", "v_bias"}),
        ModelConfig(qkv_bias=False, qk_norm=True, tie_embeddings=False): ({"head"}, {"q_norm", "k_norm"}),
    }
    for config, (top, more) in cases.items():
        for weights in (abstract_params(config)[1], init_params(config, jax.random.key(0))):
            assert set(weights) == {"embedding", "layers", "final_norm"} | top
            assert set(weights["layers"]) == layer | more


def test_random_weights_are_drawn_one_after_another():
    """The order must not change, since a seed must reproduce a run."""
    config = ModelConfig(num_layers=3, tie_embeddings=False)
    key, params = jax.random.key(7), init_params(config, jax.random.key(7))
    drawn = {
        **{"embedding": 0.02, "q": 128**-0.5, "k": 128**-0.5, "v": 128**-0.5, "o": 128**-0.5},
        **{"gate": 128**-0.5, "up": 128**-0.5, "down": 256**-0.5, "head": 0.02},
    }
    for count, (name, std) in enumerate(drawn.items()):
        weight = params[name] if name in params else params["layers"][name]
        expected = jax.random.normal(jax.random.fold_in(key, count), weight.shape) * std
        np.testing.assert_array_equal(weight[...], expected, err_msg=name)


def test_unstacked_layers_compute_what_the_stack_does(model, params):
    """With more than ten layers, so that sorting their numbers as text would show."""
    many = dataclasses.replace(model, num_layers=12)
    stacks = jax.tree.map(lambda x: jnp.concatenate([x] * 6), params["layers"])
    scale = stacks["attention_norm"]
    scale[...] = scale[...] * jnp.linspace(0.5, 2, 12)[:, None]
    params = {name: params[name] for name in params} | {"layers": stacks}
    arguments = init_cache(many, 4, 4), np.array([[1, 2, 3]]), np.array([0]), np.array([3]), np.array([[2, 0]])
    results = [jax.jit(partial(extend, many))(weights, *arguments) for weights in (params, unstack(params))]
    for stacked, unstacked in zip(*results, strict=True):
        np.testing.assert_allclose(stacked, unstacked, atol=1e-5)


def test_packed_rows_equal_separate_rows(model, params, fresh_logits):
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, model.vocab_size, n).tolist() for n in (9, 1, 17, 5)]
    # 96 wide like the oracle, with padding between and after the segments, which must not be seen.
    tokens, positions, segments = (np.zeros((1, 96), np.int32) for _ in range(3))
    starts = (3, 12, 20, 50)
    tokens[:] = 7
    for segment, (at, ids) in enumerate(zip(starts, lists, strict=True), start=1):
        span = slice(at, at + len(ids))
        tokens[0, span], positions[0, span], segments[0, span] = ids, np.arange(len(ids)), segment
    packed = np.asarray(
        jax.jit(lambda *args: logits(model, params, forward(model, params, *args)))(tokens, positions, segments)
    )
    for at, ids, expected in zip(starts, lists, fresh_logits(lists), strict=True):
        np.testing.assert_allclose(packed[0, at : at + len(ids)], expected, atol=1e-4)


def test_extend_ignores_padding_tokens_and_padding_rows(model, params):
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), init_cache(model, 8, 4))
    run = jax.jit(partial(extend, model, params))
    start, count = np.array([6, 0]), np.array([3, 0])
    table = np.array([[5, 2, 7], [0, 1, 3]])
    results = []
    for filler in (0, 9):
        tokens = np.full((2, 8), filler, np.int32)
        tokens[0, :3] = [1, 2, 3]
        results.append(run(cache, tokens, start, count, table))
    (first, hidden), (second, other) = results
    np.testing.assert_array_equal(hidden[0], other[0])
    np.testing.assert_array_equal(first, second)
    changed = (np.asarray(cache) != np.asarray(first)).reshape(model.num_layers, 8, 4, -1).any((0, 3))
    assert np.argwhere(changed).tolist() == [[2, 2], [2, 3], [7, 0]]


def test_append_costs_what_it_appends(model, params):
    """By the compiler's own count, for a row of 512: 16 tokens cost a 32nd of a prefill of 512, with any prefix."""
    cache = jax.eval_shape(lambda: init_cache(model, 64, 32))

    def flops(T: int) -> float:
        ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        args = (params, cache, ints((2, T)), ints((2,)), ints((2,)), ints((2, 16)))
        return jax.jit(partial(extend, model)).lower(*args).compile().cost_analysis()["flops"]

    assert flops(16) < flops(512) / 32 * 1.1


def test_remat_policies_keep_what_they_say_and_change_no_gradient(model, params):
    """The gradient is the same; `full` recomputes the layers' matrix products, `dots` none of them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (2, 96))
    positions, segments = np.broadcast_to(np.arange(96), tokens.shape), np.ones_like(tokens)
    gradients, flops = {}, {}
    for remat in ("none", "dots", "full", "offload"):
        config = dataclasses.replace(model, remat=remat)

        def loss(params: Params) -> jax.Array:
            return jnp.sum(forward(config, params, tokens, positions, segments) ** 3)  # noqa: B023

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        gradients[remat], flops[remat] = compiled(params), compiled.cost_analysis()["flops"]
    for remat in ("dots", "full", "offload"):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), gradients[remat], gradients["none"])
    assert flops["full"] > 1.15 * flops["none"]
    assert flops["none"] < flops["dots"] < 0.95 * flops["full"]
    assert flops["offload"] == pytest.approx(flops["full"], rel=0.01)


def test_offloaded_inputs_of_layers_wait_in_the_hosts_memory(model):
    """In the program for a TPU only a layer's input is copied to the host, and back for the gradient."""
    ints, shapes = jax.ShapeDtypeStruct((2, 96), jnp.int32), abstract_params(model)[1]

    def moves(remat: str) -> list[str]:
        def loss(params: Params, tokens: jax.Array) -> jax.Array:
            return jnp.sum(forward(dataclasses.replace(model, remat=remat), params, tokens, tokens, tokens) ** 3)

        program = jax.jit(jax.grad(loss)).trace(shapes, ints).lower(lowering_platforms=("tpu",)).as_text()
        return re.findall(r"annotate_device_placement.*_xla_buffer_placement = \"(\w+)\".*-> (tensor<\w+>)", program)

    inputs = f"tensor<2x96x{model.hidden_size}xf32>"
    assert moves("offload") == [("pinned_host", inputs), ("device", inputs)]
    assert moves("full") == []


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValidationError, match=r"remat\s.*'none', 'full', 'dots' or 'offload'"):
        ModelConfig(remat=True)
