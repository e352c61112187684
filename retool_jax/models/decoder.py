"""The decoder of Qwen2, Qwen3 and Llama as Flax modules, and the two functions that run it: `forward` and `extend`.

Modules declare weights with logical axes, and how to compute with them. Everywhere else weights are a plain pytree,
`Params`, so that jit, grad, optax and orbax see only arrays. In `Params`, and in checkpoints, all weights of a layer
are in one flat dictionary, and the weights of all layers are stacked on a leading L axis.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retool_jax import mesh as meshes
from retool_jax.models import split
from retool_jax.models.attention import (
    Rotation,
    current_backend,
    packed_attention,
    paged_attention,
    resolve_cache_kernel,
    resolve_kernel,
    rotate,
    rotation,
)
from retool_jax.models.blocks import ATTENTION
from retool_jax.models.config import ModelConfig
from retool_jax.models.products import by_weight
from retool_jax.models.rows import Rows, row_attention

Params = nnx.State
Cache = jax.Array | Rows

NEVER = -1e30  # a logit with probability 0; finite at every temperature, so that 0 * log 0 is 0

INPUT = "input"  # the checkpoint name of a layer's input, for remat=offload
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENTION),
        ),
    ),
    "offload": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}


class Weight(nnx.Param):
    """A parameter with logical axes, one name per dimension (see `mesh.py`), in `weight.logical`."""


def _random(
    config: ModelConfig,
    rngs: nnx.Rngs,
    layers: int | None,
    shape: tuple[int, ...],
    logical: tuple[str, ...],
    std: float,
) -> Weight:
    """A normally distributed weight, or zeros if `std` is 0; with `layers`, a stack of that many."""
    shape, logical = _stacked(layers, shape, logical)
    values = jax.random.normal(rngs.params(), shape, config.param_dtype) * std if std else jnp.zeros(shape)
    return Weight(values.astype(config.param_dtype), logical=logical)


def _ones(config: ModelConfig, layers: int | None, size: int) -> Weight:
    """The scale of a norm; with `layers`, a stack of that many."""
    shape, logical = _stacked(layers, (size,), ("norm",))
    return Weight(jnp.ones(shape, config.param_dtype), logical=logical)


def _stacked(layers: int | None, shape: tuple[int, ...], logical: tuple[str, ...]) -> tuple[tuple, tuple]:
    return (shape, logical) if layers is None else ((layers, *shape), ("layers", *logical))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis (arXiv 1910.07467), normalised in fp32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nnx.Module):
    """The projections to queries, keys and values and back; the caller passes the attention itself."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layers: int | None = None) -> None:
        c, make, norm = config, partial(_random, config, rngs, layers), partial(_ones, config, layers)
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.config = config
        self.q = make((D, N, H), ("embed", "heads", "head_dim"), D**-0.5)
        self.k = make((D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        self.v = make((D, K, H), ("embed", "kv_heads", "head_dim"), D**-0.5)
        if c.qkv_bias:
            self.q_bias = make((N, H), ("heads", "head_dim"), 0.0)
            self.k_bias = make((K, H), ("kv_heads", "head_dim"), 0.0)
            self.v_bias = make((K, H), ("kv_heads", "head_dim"), 0.0)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(H), norm(H)
        self.o = make((N, H, D), ("heads", "head_dim", "embed"), (N * H) ** -0.5)

    def __call__(self, x_BTD: jax.Array, rope: Rotation, mix: Callable) -> tuple[jax.Array, Cache | None]:
        """`mix(q, k, v)` returns the attention [B,T,N,H] and the cache that it wrote, or None."""
        c, cast = self.config, _cast(self.config)
        q, k, v = (_product(x_BTD, cast(weight), *_axes(weight)) for weight in (self.q, self.k, self.v))
        if c.qkv_bias:
            q, k, v = q + cast(self.q_bias), k + cast(self.k_bias), v + cast(self.v_bias)
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.rms_norm_eps)
            k = rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        mixed_BTNH, cache = mix(rotate(q, rope), rotate(k, rope), v)
        return _product(mixed_BTNH, cast(self.o), *_axes(self.o)), cache


class MLP(nnx.Module):
    """The gated feed-forward network, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layers: int | None = None) -> None:
        make, D, F = partial(_random, config, rngs, layers), config.hidden_size, config.intermediate_size
        self.config = config
        self.gate = make((D, F), ("embed", "mlp"), D**-0.5)
        self.up = make((D, F), ("embed", "mlp"), D**-0.5)
        self.down = make((F, D), ("mlp", "embed"), F**-0.5)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cast = _cast(self.config)
        gate, up = (_product(x_BTD, cast(weight), *_axes(weight)) for weight in (self.gate, self.up))
        return _product(jax.nn.silu(gate) * up, cast(self.down), *_axes(self.down))


class Block(nnx.Module):
    """One layer: attention and feed-forward network, each with a norm before it and a residual connection."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layers: int | None = None) -> None:
        self.config = config
        self.attention_norm = _ones(config, layers, config.hidden_size)
        self.attention = Attention(config, rngs, layers)
        self.mlp_norm = _ones(config, layers, config.hidden_size)
        self.mlp = MLP(config, rngs, layers)

    def __call__(self, x_BTD: jax.Array, rope: Rotation, mix: Callable) -> tuple[jax.Array, Cache | None]:
        eps = self.config.rms_norm_eps
        mixed_BTD, cache = self.attention(rms_norm(x_BTD, self.attention_norm[...], eps), rope, mix)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.mlp(rms_norm(x_BTD, self.mlp_norm[...], eps)), cache


class Decoder(nnx.Module):
    """The whole model. `layers` is one block with stacked weights, or a list of blocks (see `unstack`).

    With `value_head` it is a critic, with one output instead of the vocabulary's. That output is initialised to 0.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, value_head: bool = False) -> None:
        c = config
        self.config = config
        self.embedding = _random(c, rngs, None, (c.vocab_size, c.hidden_size), ("vocab", "embed"), 0.02)
        self.layers = Block(c, rngs, c.num_layers)
        self.final_norm = _ones(c, None, c.hidden_size)
        if value_head:
            self.value = _random(c, rngs, None, (c.hidden_size,), ("embed",), 0.0)
            self.value_bias = _random(c, rngs, None, (), (), 0.0)
        elif not c.tie_embeddings:
            self.head = _random(c, rngs, None, (c.vocab_size, c.hidden_size), ("vocab", "embed"), 0.02)

    def __call__(
        self, tokens_BT: jax.Array, rope: Rotation, attend: Callable, rows: str, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """The final hidden states [B,T,D], and the cache.

        `attend(cache, layer, q, k, v)` returns the attention [B,T,N,H] and the cache that it wrote. `rows` is the
        logical name of the B axis.
        """
        c = self.config

        def pin(x_BTD: jax.Array) -> jax.Array:
            return meshes.constrain(x_BTD, rows, "length", "model")

        def run_layer(block: Block, carry: tuple, layer: jax.Array | int) -> tuple:
            x_BTD, cache = carry
            x_BTD, cache = block(checkpoint_name(x_BTD, INPUT), rope, partial(attend, cache, layer))
            return pin(x_BTD), cache

        carry = pin(_embed(self.embedding[...], tokens_BT, c.compute_dtype)), cache
        if isinstance(self.layers, nnx.List):
            carry = self._run_unstacked(run_layer, carry)
        else:
            graph, stacks = nnx.split(self.layers)

            def body(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
                weights, layer = scanned
                return run_layer(nnx.merge(graph, weights), carry, layer), None

            carry, _ = jax.lax.scan(REMAT[c.remat](body), carry, (stacks, jnp.arange(c.num_layers)))
        x_BTD, cache = carry
        return rms_norm(x_BTD, self.final_norm[...], c.rms_norm_eps), cache

    def _run_unstacked(self, run_layer: Callable, carry: tuple) -> tuple:
        """Run layers whose weights are not stacked. The first one is traced; the others call the same program."""
        graph = nnx.graphdef(self.layers[0])
        by_rows = isinstance(carry[1], Rows)

        def traced(weights: nnx.State, carry: tuple, layer: jax.Array | int) -> tuple:
            return run_layer(nnx.merge(graph, weights), carry, layer)

        call = jax.jit(traced, static_argnums=2 if by_rows else ())
        for layer, block in enumerate(self.layers):
            x_BTD, cache = carry
            if by_rows:
                x_BTD, own = call(nnx.state(block), (x_BTD, cache.only(layer)), 0)
                carry = x_BTD, cache.replaced(layer, own)
            else:
                carry = call(nnx.state(block), carry, layer)
        return carry


def _embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """The embeddings [B,T,D] of tokens, in the compute type."""
    if meshes.split_with_weights(tokens_BT.shape[0]):
        return split.rows_of(table_VD, tokens_BT, dtype)
    # If D stayed split, each device would look up its part of D for all rows.
    return meshes.constrain(table_VD, "vocab", "model")[tokens_BT].astype(dtype)


def _product(x: jax.Array, weight: jax.Array, *logical: str) -> jax.Array:
    """Activations [B,T,...] times a weight with these logical axes, which begins with the activations' inner axes.

    B and T are merged: for [B,T,D] XLA's CPU backend would make transposed copies for the gradient of the weight. The
    weight keeps its shape: if it were reshaped while its heads are split, the TPU's compiler would copy all layers'
    weights at every call.
    """
    B, T = x.shape[:2]
    if meshes.split_with_weights(B):
        return split.product(x, weight, *logical)
    one_device = jax.sharding.get_abstract_mesh().size <= 1
    flat = by_weight(x.reshape(B * T, *x.shape[2:]), weight, one_device and current_backend() == "cpu")
    return flat.reshape(B, T, *flat.shape[1:])


def _axes(weight: Weight) -> tuple[str, ...]:
    """The logical axes of one layer's weight, without the axis of a stack."""
    return tuple(name for name in weight.logical if name != "layers")


def _cast(config: ModelConfig) -> Callable[[Weight], jax.Array]:
    return lambda weight: weight[...].astype(config.compute_dtype)


@lru_cache
def _abstract(config: ModelConfig, value_head: bool) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), value_head)))


@lru_cache
def abstract_params(config: ModelConfig, value_head: bool = False) -> tuple[nnx.GraphDef, Params]:
    """The modules' structure, and the weights as shapes; nothing is allocated."""
    graph, weights = _abstract(config, value_head)
    return graph, _flatten_layers(weights)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random weights. Jit this with `out_shardings` to create a large model in shards."""
    return _flatten_layers(nnx.split(Decoder(config, nnx.Rngs(params=key)))[1])


def _flatten_layers(weights: nnx.State) -> Params:
    """The state of `nnx.split` without the level of modules inside a layer; their weights have different names."""
    layers = {path[-1]: weight for path, weight in nnx.to_flat_state(weights["layers"])}
    return nnx.State({name: layers if name == "layers" else weights[name] for name in weights})


@lru_cache
def _structure(config: ModelConfig, unstacked: bool, value_head: bool) -> tuple[nnx.GraphDef, tuple[tuple, ...]]:
    """The modules without their weights, and the path of each weight in them."""
    decoder = nnx.merge(*_abstract(config, value_head))
    if unstacked:
        graph, weights = nnx.split(decoder.layers)
        # With copies: otherwise all layers would share one variable.
        decoder.layers = nnx.List([nnx.merge(graph, weights, copy=True) for _ in range(config.num_layers)])
    graph, weights = nnx.split(decoder)
    return graph, nnx.to_flat_state(weights).paths


def _decoder(config: ModelConfig, params: Params | dict) -> Decoder:
    """The modules with these weights."""
    unstacked = isinstance(params["layers"], tuple)
    graph, paths = _structure(config, unstacked, "value" in params)

    def find(path: tuple) -> Weight:
        if path[0] != "layers":
            return params[path[0]]
        layers = params["layers"]
        return (layers[path[1]] if unstacked else layers)[path[-1]]

    return nnx.merge(graph, nnx.from_flat_state({path: find(path) for path in paths}))


def forward(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """The final hidden states [B,T,D] of packed rows; `segments` numbers the sequences of a row.

    Positions count from 0 in each segment, or continue those of a prefix before it if the kernel `shares_prefixes`.
    """
    attention = packed_attention(resolve_kernel(config, current_backend()), segments_BT, positions_BT)

    def attend(_: None, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return attention(q, k, v), None

    return _decoder(config, params)(tokens_BT, rotation(config, positions_BT), attend, "batch")[0]


def extend(
    config: ModelConfig,
    params: Params | dict,
    cache: Cache,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    table_BP: jax.Array | None = None,
    rope_table: Rotation | None = None,
) -> tuple[Cache, jax.Array]:
    """Append `count` tokens to rows that hold `start` tokens; prefill, append and decode all call this.

    They differ only in T. The cache is a pool of pages with a table of each row's pages, or, with unstacked weights and
    one token per row, the dense copy of rows (see `rows.py`). Tokens beyond `count` are padding. `rope_table` may hold
    the rotation of positions 0, 1, ... as a batch of one row. With it a decode loop does not compute sines at every
    step, which a CPU does for each head.

    Returns the cache and the hidden state [B,D] of each row's last token, from which the next token is sampled.
    """
    if isinstance(cache, Rows):
        attend = row_attention(start_B, count_B)
    else:
        kernel = resolve_cache_kernel(config, current_backend())
        attend = paged_attention(kernel, config.num_layers, table_BP, start_B, count_B)
    positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1])
    if rope_table is None:
        rope = rotation(config, positions_BT)
    else:
        rope = Rotation(*(jnp.take(part[0], positions_BT, axis=0, mode="clip") for part in rope_table))
    hidden_BTD, cache = _decoder(config, params)(tokens_BT, rope, attend, "rows", cache)
    last_B = jnp.maximum(count_B - 1, 0)
    return cache, jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]


def logits(config: ModelConfig, params: Params | dict, hidden: jax.Array) -> jax.Array:
    """Unnormalised log-probabilities [..., V] in fp32 for hidden states [..., D]."""
    return logits_of(config, head_weight(config, params), hidden)


def head_name(config: ModelConfig) -> str:
    """The name in `Params` of the output matrix."""
    return "embedding" if config.tie_embeddings else "head"


def weight_dtype(config: ModelConfig, name: str) -> str:
    """The type in which the weight `name` of `Params` is used in computations."""
    return "float32" if config.fp32_head and name == head_name(config) else config.compute_dtype


def head_weight(config: ModelConfig, params: Params | dict) -> jax.Array:
    """The output matrix [V,D] in its compute type."""
    name = head_name(config)
    return params[name][...].astype(weight_dtype(config, name))


def head_precision(config: ModelConfig) -> jax.lax.Precision | None:
    """The precision of the head's products. By default a TPU would round fp32 factors to bf16."""
    return jax.lax.Precision.HIGHEST if config.fp32_head else None


def logits_of(config: ModelConfig, weight_VD: jax.Array, hidden: jax.Array) -> jax.Array:
    """`logits` with the head's weight already cast. Engine and trainer both call this, so they share its mask.

    Checkpoints pad the vocabulary: ids from `config.real_vocab` on stand for no text, so they get probability 0.
    """
    if config.fp32_head:
        hidden = hidden.astype(jnp.float32)
    precision = head_precision(config)
    result = jnp.einsum("...D,VD->...V", hidden, weight_VD, precision=precision, preferred_element_type=jnp.float32)
    if 0 < config.real_vocab < config.vocab_size:
        result = jnp.where(jnp.arange(config.vocab_size) < config.real_vocab, result, NEVER)
    return result


def values(params: Params, hidden: jax.Array) -> jax.Array:
    """A critic's values [...] for hidden states [..., D], computed in fp32."""
    # Replicated, so that the hidden states need not move.
    weight_D = meshes.constrain(params["value"][...], "model").astype(jnp.float32)
    return jnp.sum(hidden.astype(jnp.float32) * weight_D, axis=-1) + params["value_bias"][...].astype(jnp.float32)


def unstack(params: Params) -> dict:
    """The same weights with a tuple of layers in place of the stack, so that layers are unrolled instead of scanned.

    A scan slices each weight out of its stack at each layer, which XLA's CPU backend does by copying. Unrolling avoids
    that, but the program grows with the number of layers.
    """
    stack = params["layers"]
    layers = len(jax.tree.leaves(stack)[0])
    split = tuple(jax.tree.map(lambda x: x[index], stack) for index in range(layers))  # noqa: B023
    return {name: params[name] for name in params if name != "layers"} | {"layers": split}
