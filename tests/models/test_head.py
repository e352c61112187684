"""Log-probs and entropies in chunks equal the plain ones, need less memory, and mask the same ids as the engine."""

import dataclasses
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from retool_jax.errors import UserError
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, init_params, logits
from retool_jax.models.head import given_logprobs

ROWS, LENGTH, TEMPERATURE = 4, 37, 0.7
MODEL = ModelConfig(vocab_size=96, hidden_size=16, intermediate_size=8, num_heads=2, num_kv_heads=2, head_dim=8)


def case(model: ModelConfig) -> tuple[Params, jax.Array, jax.Array, jax.Array]:
    """Weights with logits of several units, hidden states, targets, and a gradient for each log-probability."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x * 30, init_params(model, jax.random.key(0)))
    hidden, seen = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((ROWS, LENGTH, 16), (ROWS, LENGTH)))
    return params, hidden.astype(model.compute_dtype), jnp.asarray(rng.integers(0, 80, (ROWS, LENGTH))), seen


def values_and_gradients(
    model: ModelConfig,
    params: Params,
    hidden: jax.Array,
    *rest: jax.Array,
    entropy_gradient: bool = False,
    entropy_weight: float = 100.0,
    wanted_BT: jax.Array | None = None,
) -> tuple:
    """Log-probs, entropies, and the gradients for the head's weight and the hidden states of a weighted sum."""
    targets, seen = rest
    name = "embedding" if model.tie_embeddings else "head"

    def loss(params: Params, hidden: jax.Array) -> tuple[jax.Array, tuple]:
        logprobs, entropy = given_logprobs(model, params, hidden, targets, TEMPERATURE, entropy_gradient, wanted_BT)
        return jnp.sum(logprobs * seen) + entropy_weight * jnp.sum(entropy), (logprobs, entropy)

    (_, values), (weights, states) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, hidden)
    return jax.device_get((*values, weights[name][...], states))


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_plain_form_is_the_formula_and_entropy_has_a_gradient_if_asked_for(entropy_gradient):
    params, hidden, targets, seen = case(MODEL)
    ours = values_and_gradients(MODEL, params, hidden, targets, seen, entropy_gradient=entropy_gradient)
    weight = np.asarray(params["embedding"][...], np.float64)
    scaled = np.asarray(hidden, np.float64) @ weight.T / TEMPERATURE
    p = np.exp(scaled - scaled.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.eye(96)[targets]
    entropy = -(p * np.log(p)).sum(-1)
    slope = (chosen - p) * np.asarray(seen)[..., None] / TEMPERATURE
    if entropy_gradient:
        slope -= 100 * p * (np.log(p) + entropy[..., None]) / TEMPERATURE
    expected = (
        np.log((p * chosen).sum(-1)),
        entropy,
        np.einsum("BTV,BTD->VD", slope, hidden),
        slope @ weight,
    )
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3 if entropy_gradient else 1e-4)


@pytest.mark.parametrize(("tied", "chunk"), [(True, 1), (True, 147), (False, 40)])  # 1, 36 and 10 of 37 positions
def test_chunks_change_neither_values_nor_gradients(tied, chunk):
    """Ids that do not exist leave the gradient of the entropy finite."""
    model = dataclasses.replace(MODEL, tie_embeddings=tied, real_vocab=90)
    plain = values_and_gradients(model, *case(model), entropy_gradient=not tied)
    ours = values_and_gradients(dataclasses.replace(model, head_chunk=chunk), *case(model), entropy_gradient=not tied)
    for x, y in zip(ours, plain, strict=True):
        assert np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1.0)


def test_chunks_on_a_mesh_change_nothing():
    plain = values_and_gradients(MODEL, *case(MODEL))
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        ours = values_and_gradients(dataclasses.replace(MODEL, head_chunk=10), *case(MODEL))
    for x, y in zip(ours, plain, strict=True):
        assert np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1.0)


def wanted_case(share: float) -> jax.Array:
    """Which tokens are wanted: very different numbers in the rows, none in the last one."""
    wanted = np.random.default_rng(1).random((ROWS, LENGTH)) < share * np.array([1.5, 0.2, 1.0, 0.0])[:, None]
    return jnp.asarray(wanted)


@pytest.mark.parametrize(("sizes", "share", "chunk"), [((), 0.5, 1024), ((), 0.5, 7), ((2, 2, 2), 0.3, 7)])
def test_only_what_is_wanted_has_values_and_a_gradient(sizes, share, chunk):
    """As if all were computed and the rest masked; the devices of a mesh have different numbers of wanted tokens."""
    params, hidden, targets, seen = case(MODEL)
    wanted = wanted_case(share)
    *values, weight, states = values_and_gradients(MODEL, params, hidden, targets, seen * wanted, entropy_weight=0.0)
    expected = *(np.where(wanted, x, 0.0) for x in values), weight, states
    model = dataclasses.replace(MODEL, head_chunk=chunk)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))) if sizes else nullcontext():
        ours = values_and_gradients(model, params, hidden, targets, seen * wanted, entropy_weight=0.0, wanted_BT=wanted)
    for x, y in zip(ours, expected, strict=True):
        assert np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1.0)


def test_what_is_not_wanted_is_not_visited():
    """20 tokens in two chunks of 10; all others have NaN as hidden states."""
    params, hidden, targets, seen = case(MODEL)
    wanted = np.zeros((ROWS, LENGTH), bool)
    wanted.reshape(-1)[np.random.default_rng(2).permutation(ROWS * LENGTH)[:20]] = True
    hidden = jnp.where(wanted[..., None], hidden, jnp.nan)
    model = dataclasses.replace(MODEL, head_chunk=10)
    ours = values_and_gradients(model, params, hidden, targets, seen * wanted, wanted_BT=jnp.asarray(wanted))
    assert all(np.isfinite(x).all() for x in ours)
    assert np.asarray(ours[0] != 0).sum() == 20 and not ours[3][~wanted].any()


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_the_padding_of_the_last_chunk_adds_nothing_however_large_its_logits_are(entropy_gradient):
    """The padding is the first token, which is not wanted and whose exp(logit) overflows."""
    params, hidden, targets, seen = case(MODEL)
    hidden = hidden.at[0, 0].multiply(100)
    assert float(jnp.max(logits(MODEL, params, hidden[0, 0])) / TEMPERATURE) > 100
    wanted = jnp.ones((ROWS, LENGTH), bool).at[0, 0].set(False)
    rest, plain = {"entropy_gradient": entropy_gradient, "wanted_BT": wanted}, dataclasses.replace(MODEL, head_chunk=1)
    ours = values_and_gradients(MODEL, params, hidden, targets, seen, **rest)
    for x, y in zip(ours, values_and_gradients(plain, params, hidden, targets, seen, **rest), strict=True):
        assert np.isfinite(x).all() and np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1.0)


def test_where_nothing_is_wanted_all_is_0():
    ours = values_and_gradients(MODEL, *case(MODEL), wanted_BT=jnp.zeros((ROWS, LENGTH), bool))
    assert not any(np.asarray(x).any() for x in ours)


def test_in_bfloat16_the_chunks_gradients_add_up_in_fp32():
    """37 chunks of one position each: if their sum were rounded at every step, the error would be larger."""
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    params, hidden, targets, seen = case(model)
    seen = jnp.abs(seen)
    exact = values_and_gradients(MODEL, params, hidden.astype(jnp.float32), targets, seen)[2]
    errors = {}
    for chunk in (1024, 1):
        ours = values_and_gradients(dataclasses.replace(model, head_chunk=chunk), params, hidden, targets, seen)[2]
        errors[chunk] = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert errors[1] <= 1.2 * errors[1024]


def test_ids_without_a_token_have_no_probability_and_no_gradient():
    model = dataclasses.replace(MODEL, real_vocab=90)
    params, hidden, targets, seen = case(model)
    params["embedding"][...] = params["embedding"][...].at[90:].mul(10)  # unmasked, they would be drawn nearly always
    values = jax.nn.softmax(logits(model, params, hidden))
    assert not np.asarray(values[..., 90:]).any()
    small = dataclasses.replace(MODEL, vocab_size=90)
    cut = init_params(small, jax.random.key(0))
    cut["embedding"][...] = params["embedding"][...][:90]
    for chunk in (1024, 8):
        ours = values_and_gradients(dataclasses.replace(model, head_chunk=chunk), params, hidden, targets, seen)
        assert not ours[2][90:].any() and all(np.isfinite(x).all() for x in ours)
        expected = values_and_gradients(small, cut, hidden, targets, seen)
        for x, y in zip((*ours[:2], ours[2][:90], ours[3]), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"real_vocab": 97}, "model.real_vocab=97 must be between 0 .* model.vocab_size=96"),
        ({"real_vocab": -1}, "model.real_vocab=-1"),
        ({"head_chunk": 0}, r"head_chunk\s.*greater than or equal to 1"),
    ],
)
def test_limits_are_refused_by_name(change, message):
    with pytest.raises((UserError, ValidationError), match=message):
        dataclasses.replace(MODEL, **change)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_fp32_is_not_rounded(tied):
    """In a bf16 model the output matrix keeps its fp32 digits, also in chunks, and so do its gradients."""
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16", tie_embeddings=tied)
    params, hidden, targets, seen = case(model)
    exact = dataclasses.replace(MODEL, tie_embeddings=tied)
    exact = values_and_gradients(exact, params, hidden.astype(jnp.float32), targets, seen)
    rounded = values_and_gradients(model, params, hidden, targets, seen)
    assert np.abs(rounded[0] - exact[0]).max() > 1e-2
    for chunk in (1024, 40):
        whole = dataclasses.replace(model, fp32_head=True, head_chunk=chunk)
        ours = values_and_gradients(whole, params, hidden, targets, seen)
        assert ours[3].dtype == hidden.dtype
        for x, y in zip(ours[:3], exact[:3], strict=True):
            assert np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1.0)


def test_memory_does_not_grow_with_the_length():
    """By the compiler's own count of the memory of value and gradient, beside inputs and outputs."""
    model = dataclasses.replace(MODEL, vocab_size=4096, head_chunk=64)
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))

    def temporary(model: ModelConfig, length: int) -> int:
        shapes = jax.ShapeDtypeStruct((1, length, 16), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(params: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
            return given_logprobs(model, params, hidden, targets, 1.0)[0].sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, *shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(model, 256), temporary(model, 2048)
    assert long < 1.2 * short
    assert long < 4 * 4096 * 2048 / 8  # of the bytes of all logits
    assert long < temporary(dataclasses.replace(model, head_chunk=4096), 2048) / 3
