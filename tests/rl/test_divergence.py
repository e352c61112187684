"""Which estimator of a divergence has the gradient of the divergence, as a term of the loss and as a penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.errors import UserError
from retool_jax.rl.algorithms import algorithm_of
from retool_jax.rl.config import KLConfig, RLConfig
from retool_jax.rl.divergence import divergence

rng = np.random.default_rng(0)
LOGITS = jnp.asarray(rng.normal(size=32))
REFERENCE = jax.nn.log_softmax(LOGITS + 0.1 * rng.normal(size=32))  # near the policy, as in a run


def expected_gradient(kl: KLConfig) -> jax.Array:
    """The mean gradient over a token that the policy samples, by summing over all tokens."""
    policy = jax.nn.log_softmax(LOGITS)

    def mean_loss(logits: jax.Array) -> jax.Array:
        new = jax.nn.log_softmax(logits)
        if kl.place == "loss":
            terms = divergence(new, REFERENCE, kl.estimator)
        else:  # the loss of a token with this advantage, for one update
            terms = divergence(policy, REFERENCE, kl.estimator) * jnp.exp(new - policy)
        return jnp.sum(jnp.exp(policy) * terms)

    return jax.grad(mean_loss)(LOGITS)


def true_gradient() -> jax.Array:
    def kl(logits: jax.Array) -> jax.Array:
        new = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(new) * (new - REFERENCE))

    return jax.grad(kl)(LOGITS)


@pytest.mark.parametrize("place", ["loss", "reward"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_run_takes_an_estimator_only_where_its_gradient_is_that_of_the_divergence(place, estimator):
    kl, true = KLConfig(0.1, estimator, place), true_gradient()
    error = jnp.linalg.norm(expected_gradient(kl) - true) / jnp.linalg.norm(true)
    try:
        algorithm_of(RLConfig(kl=kl))
    except UserError as refused:
        assert f"rl.kl.estimator={estimator}" in str(refused) and f"rl.kl.place={place}" in str(refused)
        assert error > 0.85
    else:
        assert error < 0.15


def test_k3_never_pushes_a_token_away_from_the_reference():
    below = jnp.array([-0.1, -5.0, -19.0, -21.0, -80.0])  # the policy's log-probability minus the reference's
    slopes = jax.vmap(jax.grad(lambda d: divergence(d, jnp.zeros(()), "k3")))(below)
    assert np.all(slopes <= 0) and np.all(np.isfinite(slopes))
