"""How far a policy is from a reference, token by token."""

from typing import TypeVar

Array = TypeVar("Array")  # of numpy or jax


def divergence(logprobs: Array, reference: Array, estimator: str) -> Array:
    """Estimates of KL(policy || reference) from single tokens that the policy sampled, in nats, shaped like `logprobs`.

        d = log p_policy - log p_reference;  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d

    The mean of k1 and of k3 is the divergence; a single k1 may be negative. k2 is biased, but its gradient is not
    (joschu.net/blog/kl-approx.html). The exponent is limited to 20, so that k3 is finite. Which one has a gradient
    depends on its place (`tests/rl/test_divergence.py`): as a term of the loss k2, whose mean gradient is that of
    KL(policy || reference), and k3, whose is that of KL(reference || policy); k1's is 0. As a penalty of a token's
    advantage only k1 has the gradient of the divergence; the others have about 0 near the reference.
    """
    d = logprobs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    if estimator == "k3":
        xp = logprobs.__array_namespace__()
        x = xp.minimum(-d, 20.0)  # in both terms: with only the first one limited, the gradient would change its sign
        return xp.expm1(x) - x  # exp(x) - 1 would lose the digits of a small difference
    raise ValueError(f"there is no estimator {estimator!r} of a divergence; there are k1, k2 and k3")
