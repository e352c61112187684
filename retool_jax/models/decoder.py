"""The Qwen2 and Qwen3 decoder: embeddings, L scanned layers, final norm, head.

Modules declare weights with logical axis names and say how one layer computes; the functions below them are what
the rest of the project calls. They take the weights as a pytree (an `nnx.State`), so that jit, grad, optax and
orbax see arrays and nothing else.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx

from retool_jax import mesh as meshes
from retool_jax.models.attention import (
    Rotation,
    current_backend,
    packed_attention,
    paged_attention,
    resolve_cache_kernel,
    resolve_kernel,
    rotate,
    rotation,
    row_attention,
)
from retool_jax.models.cache import Rows
from retool_jax.models.config import ModelConfig

Params = nnx.State
Cache = jax.Array | Rows

NEVER = -1e30  # a logit without probability; finite under any temperature, so that 0 * log 0 is 0

REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


class Weight(nnx.Param):
    """A parameter that knows its logical axes, one name per dimension (see `mesh.py`)."""


def _weight(
    config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, ...], logical: tuple[str, ...], std: float
) -> Weight:
    values = jax.random.normal(rngs.params(), shape, config.param_dtype) * std if std else jnp.zeros(shape)
    return Weight(values.astype(config.param_dtype), logical=logical)


def _norm(config: ModelConfig, shape: tuple[int, ...], logical: tuple[str, ...]) -> Weight:
    return Weight(jnp.ones(shape, config.param_dtype), logical=logical)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis (arXiv 1910.07467), normalised in fp32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Layers(nnx.Module):
    """The weights of all layers, stacked on a leading L axis; inside the scan, of one layer without it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        c, L = config, config.num_layers
        D, F, N, K, H = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads, c.head_dim
        make = partial(_weight, c, rngs)
        self.config = config
        self.attention_norm = _norm(c, (L, D), ("layers", "norm"))
        self.q = make((L, D, N, H), ("layers", "embed", "heads", "head_dim"), D**-0.5)
        self.k = make((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), D**-0.5)
        self.v = make((L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), D**-0.5)
        if c.qkv_bias:
            self.q_bias = make((L, N, H), ("layers", "heads", "head_dim"), 0.0)
            self.k_bias = make((L, K, H), ("layers", "kv_heads", "head_dim"), 0.0)
            self.v_bias = make((L, K, H), ("layers", "kv_heads", "head_dim"), 0.0)
        if c.qk_norm:
            self.q_norm = _norm(c, (L, H), ("layers", "norm"))
            self.k_norm = _norm(c, (L, H), ("layers", "norm"))
        self.o = make((L, N, H, D), ("layers", "heads", "head_dim", "embed"), (N * H) ** -0.5)
        self.mlp_norm = _norm(c, (L, D), ("layers", "norm"))
        self.gate = make((L, D, F), ("layers", "embed", "mlp"), D**-0.5)
        self.up = make((L, D, F), ("layers", "embed", "mlp"), D**-0.5)
        self.down = make((L, F, D), ("layers", "mlp", "embed"), F**-0.5)

    def __call__(self, x_BTD: jax.Array, turn: Rotation, mix: Callable) -> tuple[jax.Array, Cache | None]:
        """One layer; `mix(q, k, v)` returns the attention's [B,T,N,H] and whatever cache it wrote."""
        c = self.config

        def cast(weight: Weight) -> jax.Array:
            return weight[...].astype(c.compute_dtype)

        h = rms_norm(x_BTD, self.attention_norm[...], c.rms_norm_eps)
        q = jnp.einsum("BTD,DNH->BTNH", h, cast(self.q))
        k = jnp.einsum("BTD,DKH->BTKH", h, cast(self.k))
        v = jnp.einsum("BTD,DKH->BTKH", h, cast(self.v))
        if c.qkv_bias:
            q, k, v = q + cast(self.q_bias), k + cast(self.k_bias), v + cast(self.v_bias)
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        mixed, cache = mix(rotate(q, turn), rotate(k, turn), v)
        x_BTD = x_BTD + jnp.einsum("BTNH,NHD->BTD", mixed, cast(self.o))
        h = rms_norm(x_BTD, self.mlp_norm[...], c.rms_norm_eps)
        h = jax.nn.silu(h @ cast(self.gate)) * (h @ cast(self.up))
        return x_BTD + h @ cast(self.down), cache


class Decoder(nnx.Module):
    """All weights of the model."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        c = config
        self.embedding = _weight(c, rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), 0.02)
        self.layers = Layers(c, rngs)
        self.final_norm = _norm(c, (c.hidden_size,), ("norm",))
        if not c.tie_embeddings:
            self.head = _weight(c, rngs, (c.vocab_size, c.hidden_size), ("vocab", "embed"), 0.02)


@lru_cache
def abstract_params(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The module's structure and its weights as shapes; nothing is allocated."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


@lru_cache
def _layer_graph(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.merge(*abstract_params(config)).layers)[0]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random weights. Jit this with `out_shardings` to create a large model in shards."""
    return nnx.split(Decoder(config, nnx.Rngs(params=key)))[1]


def forward(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Final hidden states [B,T,D] of packed rows: `segments` tells the sequences of a row apart."""
    turn = rotation(config, positions_BT)
    attention = packed_attention(resolve_kernel(config, current_backend()), segments_BT)

    def layer(x_BTD: jax.Array, layers: Layers, index: jax.Array) -> jax.Array:
        return layers(x_BTD, turn, lambda q, k, v: (attention(q, k, v), None))[0]

    return _scan_layers(config, params, tokens_BT, "batch", layer)


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    table_BP: jax.Array | None = None,
) -> tuple[Cache, jax.Array]:
    """Put `count` tokens behind the first `start` entries of rows; the model call of all decoding.

    Prefill, append and decode differ only in T. The cache is a pool of pages with the table that says which are each
    row's, or, with unstacked weights, the dense copy of rows for one token each (see `cache.py`). Tokens beyond `count`
    are padding.

    Returns the cache and the hidden state [B,D] after each row's last token, from which the next is sampled.
    """
    turn = rotation(config, start_B[:, None] + jnp.arange(tokens_BT.shape[1]))
    if isinstance(cache, Rows):
        attention = row_attention(start_B, count_B)
    else:
        kernel = resolve_cache_kernel(config, current_backend())
        attention = paged_attention(kernel, config.num_layers, table_BP, start_B, count_B)

    def layer(carry: tuple[jax.Array, Cache], layers: Layers, index: jax.Array | int) -> tuple[jax.Array, Cache]:
        x_BTD, cache = carry
        return layers(x_BTD, turn, lambda q, k, v: attention(cache, index, q, k, v))

    hidden_BTD, cache = _scan_layers(config, params, tokens_BT, "rows", layer, cache)
    last_B = jnp.maximum(count_B - 1, 0)
    return cache, jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]


def logits(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Unnormalised log-probabilities [..., V] in fp32 for hidden states [..., D]."""
    return logits_of(config, head_weight(config, params), hidden)


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
    """The output matrix [V,D] in the compute dtype."""
    return params["embedding" if config.tie_embeddings else "head"][...].astype(config.compute_dtype)


def logits_of(config: ModelConfig, weight_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """`logits` with the head's weight in hand; engine and trainer both end here, so they share its mask.

    Checkpoints pad the vocabulary: ids from `config.real_vocab` on stand for no text, so they are never drawn and take
    no probability.
    """
    result = jnp.einsum("...D,VD->...V", hidden, weight_VD, preferred_element_type=jnp.float32)
    if 0 < config.real_vocab < config.vocab_size:
        result = jnp.where(jnp.arange(config.vocab_size) < config.real_vocab, result, NEVER)
    return result


def unstack(params: Params) -> dict:
    """The same weights with a tuple of layers in place of the stack: those are visited one by one instead of scanned.

    A program that repeats a small model many times spares the slice of each weight at each visit, which XLA's CPU
    backend makes a copy; the price is a program that grows with the layers.
    """
    stack = params["layers"]
    layers = len(jax.tree.leaves(stack)[0])
    split = tuple(jax.tree.map(lambda x: x[index], stack) for index in range(layers))  # noqa: B023
    return {name: params[name] for name in params if name != "layers"} | {"layers": split}


def _scan_layers(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, rows: str, layer: Callable, cache: Cache | None = None
):
    """`rows` is the logical name of the B axis, see `mesh.py`."""

    def pin(x_BTD: jax.Array) -> jax.Array:
        return meshes.constrain(x_BTD, rows, "length", "model")

    layer_graph = _layer_graph(config)

    def body(carry, scanned):
        weights, index = scanned
        carry = layer(carry, nnx.merge(layer_graph, weights), index)
        return pin(carry) if cache is None else (pin(carry[0]), carry[1]), None

    x_BTD = pin(params["embedding"][...][tokens_BT].astype(config.compute_dtype))
    carry = x_BTD if cache is None else (x_BTD, cache)
    if isinstance(params["layers"], tuple):
        for index, weights in enumerate(params["layers"]):
            carry, _ = body(carry, (weights, index))
    else:
        indices = jnp.arange(config.num_layers)
        carry, _ = jax.lax.scan(REMAT[config.remat](body), carry, (params["layers"], indices))
    x_BTD, cache = (carry, None) if cache is None else carry
    hidden = rms_norm(x_BTD, params["final_norm"][...], config.rms_norm_eps)
    return hidden if cache is None else (hidden, cache)
