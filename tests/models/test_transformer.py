"""The decoder equals transformers' Qwen2, packed or not, and growing a cache equals a forward over the whole list."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from retool_jax.mesh import RULES
from retool_jax.models.cache import init_cache
from retool_jax.models.config import ModelConfig, config_from_hf
from retool_jax.models.transformer import (
    Params,
    Weight,
    abstract_params,
    extend,
    forward,
    init_params,
    logits,
    rms_norm,
)


def torch_model(heads: int, kv_heads: int, tied: bool) -> Qwen2ForCausalLM:
    """A tiny random Qwen2 with every parameter random, norms and biases too."""
    torch.manual_seed(heads + kv_heads)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def copied_weights(config: ModelConfig, theirs: Qwen2ForCausalLM) -> Params:
    """Their tensors in our layout: Linear weights are [out,in], ours [in,out] with heads split."""
    c, tensors = config, {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    N, K, H, D = c.num_heads, c.num_kv_heads, c.head_dim, c.hidden_size

    def stack(name: str, shape: tuple[int, ...], transpose: bool = False) -> np.ndarray:
        layers = [tensors[f"model.layers.{i}.{name}"] for i in range(c.num_layers)]
        return np.stack([(x.T if transpose else x).reshape(shape) for x in layers])

    ours = jax.jit(partial(init_params, c))(jax.random.key(0))
    ours["embedding"][...] = tensors["model.embed_tokens.weight"]
    ours["final_norm"][...] = tensors["model.norm.weight"]
    if not c.tie_embeddings:
        ours["head"][...] = tensors["lm_head.weight"]
    new = {
        "attention_norm": stack("input_layernorm.weight", (D,)),
        "mlp_norm": stack("post_attention_layernorm.weight", (D,)),
        "q": stack("self_attn.q_proj.weight", (D, N, H), True),
        "k": stack("self_attn.k_proj.weight", (D, K, H), True),
        "v": stack("self_attn.v_proj.weight", (D, K, H), True),
        "q_bias": stack("self_attn.q_proj.bias", (N, H)),
        "k_bias": stack("self_attn.k_proj.bias", (K, H)),
        "v_bias": stack("self_attn.v_proj.bias", (K, H)),
        "o": stack("self_attn.o_proj.weight", (N, H, D), True),
        "gate": stack("mlp.gate_proj.weight", (D, c.intermediate_size), True),
        "up": stack("mlp.up_proj.weight", (D, c.intermediate_size), True),
        "down": stack("mlp.down_proj.weight", (c.intermediate_size, D), True),
    }
    assert set(new) == set(ours["layers"])
    for name, value in new.items():
        ours["layers"][name][...] = value
    return ours


@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 4, True), (4, 2, False), (4, 2, True), (4, 1, False)])
def test_logits_equal_those_of_transformers(tmp_path, heads, kv_heads, tied):
    theirs = torch_model(heads, kv_heads, tied)
    theirs.config.save_pretrained(tmp_path)
    config = config_from_hf(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    positions = np.broadcast_to(np.arange(24), (2, 24))
    params = copied_weights(config, theirs)
    compute = jax.jit(lambda *args: logits(config, params, forward(config, params, *args)))
    ours = compute(tokens, positions, np.ones_like(tokens))
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(ours, expected, atol=1e-4)


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


def test_packed_rows_equal_separate_rows(model, params, fresh_logits):
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, model.vocab_size, n).tolist() for n in (9, 1, 17, 5)]
    # 96 wide like the oracle, with padding between and behind: neither may be seen.
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
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), init_cache(model, 4, 32))
    run = jax.jit(partial(extend, model, params))
    start, count, rows = np.array([5, 0, 30]), np.array([3, 0, 2]), np.array([2, 0, 4])  # row 4 does not exist
    results = []
    for filler in (0, 9):
        tokens = np.full((3, 8), filler, np.int32)
        tokens[0, :3] = [1, 2, 3]
        results.append(run(cache, tokens, start, count, rows))
    (first, hidden), (second, other) = results
    np.testing.assert_array_equal(hidden[0], other[0])
    for before, after, again in zip(cache, first, second, strict=True):
        np.testing.assert_array_equal(after, again)
        changed = np.argwhere((np.asarray(before) != np.asarray(after)).any((0, 3, 4)))
        assert changed.tolist() == [[2, 5], [2, 6], [2, 7]]


def test_append_costs_what_it_appends(model, params):
    """By the compiler's own count, for a row of 512: 16 tokens cost a 32nd of a prefill of 512, live prefix or not."""
    cache = jax.eval_shape(lambda: init_cache(model, 4, 512))

    def flops(T: int) -> float:
        ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        args = (params, cache, ints((2, T)), ints((2,)), ints((2,)), ints((2,)))
        return jax.jit(partial(extend, model)).lower(*args).compile().cost_analysis()["flops"]

    assert flops(16) < flops(512) / 32 * 1.1
