"""What training asks of the vocabulary: log-probability and entropy of given tokens, without logits of whole rows."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from retool_jax import mesh as meshes
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, head_weight, logits_of


def given_logprobs(
    config: ModelConfig,
    params: Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    temperature: float,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the targets under softmax(logits / temperature), and its entropies; both [B,T] fp32.

    No more than `config.head_chunk` tokens of a device have logits at any time, forwards or backwards: longer rows are
    visited in chunks of positions and their logits computed again for the gradient. Entropies carry a gradient only
    where that is asked for.
    """
    weight_VD = head_weight(config, params)
    chunk = _positions_at_a_time(config, *targets_BT.shape)
    if chunk >= targets_BT.shape[1]:
        return _given(config, weight_VD, hidden_BTD, targets_BT, temperature, entropy_gradient)
    # Gathered once instead of in every chunk, and widened so that the chunks' gradients are added up in fp32.
    dtype, weight_VD = weight_VD.dtype, meshes.constrain(weight_VD, "vocab", "model").astype(jnp.float32)

    @partial(jax.checkpoint, prevent_cse=False)
    def visit(weight_VD: jax.Array, hidden_BcD: jax.Array, targets_Bc: jax.Array) -> tuple[jax.Array, jax.Array]:
        # As one list of tokens: XLA's CPU gather from a batch of logits takes five more copies of them.
        flat = hidden_BcD.reshape(-1, hidden_BcD.shape[-1]), targets_Bc.reshape(-1)
        results = _given(config, weight_VD.astype(dtype), *flat, temperature, entropy_gradient)
        return tuple(x.reshape(targets_Bc.shape) for x in results)

    def chunks(x: jax.Array) -> jax.Array:
        """[B,T,...] to [T/c,B,c,...], padded behind."""
        B, T = x.shape[:2]
        x = jnp.pad(x, ((0, 0), (0, -T % chunk), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    _, results = jax.lax.scan(
        lambda _, part: (None, visit(weight_VD, *part)), None, (chunks(hidden_BTD), chunks(targets_BT))
    )
    B, T = targets_BT.shape
    logprobs, entropy = (jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in results)
    return logprobs, entropy


def _positions_at_a_time(config: ModelConfig, rows: int, length: int) -> int:
    """Positions of every row that make `head_chunk` tokens on each device that holds rows."""
    mesh, axes = jax.sharding.get_abstract_mesh(), meshes.RULES["batch"]
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
    return min(length, max(1, config.head_chunk * parts // rows))


def _given(
    config: ModelConfig,
    weight_VD: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float,
    entropy_gradient: bool,
) -> tuple[jax.Array, jax.Array]:
    """The plain form, of hidden states [..., D] and targets [...]."""
    logprobs = jax.nn.log_softmax(logits_of(config, weight_VD, hidden) / temperature, axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    every = logprobs if entropy_gradient else jax.lax.stop_gradient(logprobs)
    return chosen, -jnp.sum(jnp.exp(every) * every, axis=-1)
