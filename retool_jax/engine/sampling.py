"""Draw the next token, with the log-probability of the draw."""

import jax
import jax.numpy as jnp


def row_keys(run_key: jax.Array, requests_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """One key per row from (run, request, position of the token in its trajectory), and from nothing else.

    So a draw does not depend on the slot, on its neighbours, on when tools answered or on how many steps are fused.
    """
    return jax.vmap(lambda request, position: jax.random.fold_in(jax.random.fold_in(run_key, request), position))(
        requests_B, positions_B
    )


def sample(logits_BV: jax.Array, keys_B: jax.Array, temperature_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [B] and their log-probabilities [B] (fp32) under softmax(logits / temperature).

    Drawn as argmax(logits + Gumbel noise), which needs no normalisation and reduces over a sharded vocabulary.
    Temperature 0 is greedy; its log-probability is that of temperature 1.
    """
    greedy_B = temperature_B <= 0.0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    tokens_B = jnp.argmax(scaled_BV + jnp.where(greedy_B[:, None], 0.0, noise_BV), axis=-1).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, chosen_B - jax.nn.logsumexp(scaled_BV, axis=-1)
