"""How far a policy is from a reference, token by token."""

from typing import TypeVar

Array = TypeVar("Array")  # of numpy or jax


def divergence(logprobs: Array, reference: Array, estimator: str) -> Array:
    """Estimates of KL(policy || reference) from single tokens that the policy drew, in nats, shaped like `logprobs`.

        d = log p_policy - log p_reference;  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d

    k1 and k3 have the divergence as their mean, k1 with either sign; k2 is biased and its gradient is not
    (joschu.net/blog/kl-approx.html). The exponent stops at 20, so that k3 is finite.
    """
    off = logprobs - reference
    if estimator == "k1":
        return off
    if estimator == "k2":
        return off * off / 2
    if estimator == "k3":
        xp = logprobs.__array_namespace__()
        return xp.expm1(xp.minimum(-off, 20.0)) + off  # exp(x) - 1 would lose the digits of a small difference
    raise ValueError(f"there is no estimator {estimator!r} of a divergence; there are k1, k2 and k3")
