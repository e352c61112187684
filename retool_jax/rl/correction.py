"""Corrections for the mismatch of engine and trainer: a weight of each sampled token in the policy's loss.

The engine computes in another order than the trainer, and often in another type, so its tokens are samples of a
slightly different policy. The importance weight w = p_trainer / p_engine corrects that, but its variance is large, so
every preset bounds it.
"""

from collections.abc import Sequence

import numpy as np

TIS_CAP = 2.0
SEQUENCE_CAP = 3.0
BAND = (0.5, 5.0)
GEOMETRIC = (0.99, 1.01)
EXPONENT = 20.0  # limit of a log ratio


def correction(preset: str, old: np.ndarray, engine: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """The weights of one trajectory's tokens, [T] float32, 0 where not sampled.

    `old` are the trainer's log-probabilities and `engine` the engine's, [T] each; r = exp(old - engine).

    - none: 1.
    - token_tis: min(r, 2), truncated importance sampling token by token (fengyao.notion.site/off-policy-rl; the cap of
      2 is the default of slime's --use-tis and verl's rollout_correction).
    - sequence_mask: the product of r over the sequence if it is at most 3, else 0, for all of its tokens (TRL's
      vllm_importance_sampling_mode=sequence_mask with its default cap; richardli.xyz/rl-collapse).
    - band: r if it is within [0.5, 5], else 0 (IcePop, arXiv 2510.18855).
    - geometric: 1 if the geometric mean of r over the sequence is within [0.99, 1.01], else 0, for all of its tokens
      (rejection by verl's rollout_correction preset geo_rs and SkyRL's geometric sequence mask, with the latter's
      bounds; richardli.xyz/rl-collapse-3).
    """
    log_ratio = np.where(sampled, np.subtract(old, engine, dtype=np.float64), 0.0)
    ratio = _exp(log_ratio)
    if preset == "none":
        weights = np.ones(len(ratio))
    elif preset == "token_tis":
        weights = np.minimum(ratio, TIS_CAP)
    elif preset == "sequence_mask":
        product = _exp(log_ratio.sum())
        weights = np.full(len(ratio), product if product <= SEQUENCE_CAP else 0.0)
    elif preset == "band":
        weights = np.where(_within(ratio, BAND), ratio, 0.0)
    elif preset == "geometric":
        mean = _exp(log_ratio.sum() / max(np.count_nonzero(sampled), 1))
        weights = np.full(len(ratio), float(_within(mean, GEOMETRIC)))
    else:
        raise ValueError(f"there is no correction {preset!r}")
    return np.where(sampled, weights, 0.0).astype(np.float32)


def correction_numbers(
    preset: str, old: Sequence[np.ndarray], engine: Sequence[np.ndarray], sampled: Sequence[np.ndarray]
) -> dict[str, float]:
    """Metrics of a preset over the sampled tokens of all trajectories of a step.

    `correction_share` is the share of tokens whose weight was cut (token_tis) or set to 0 (the other presets).
    `correction_ess` is the remaining effective sample size, as a share of the tokens: (sum w)^2 / (n sum w^2)
    (Kish, 1965); 0 if every weight is 0.
    """
    cut, total, squares, tokens = 0, 0.0, 0.0, 0
    for old_i, engine_i, sampled_i in zip(old, engine, sampled, strict=True):
        weights = correction(preset, old_i, engine_i, sampled_i)[sampled_i].astype(np.float64)
        cut += np.count_nonzero(weights == 0.0)
        if preset == "token_tis":
            cut += np.count_nonzero(np.subtract(old_i, engine_i, dtype=np.float64)[sampled_i] > np.log(TIS_CAP))
        total, squares, tokens = total + weights.sum(), squares + (weights**2).sum(), tokens + len(weights)
    size = total**2 / (tokens * squares) if squares else 0.0
    return {"correction_share": cut / max(tokens, 1), "correction_ess": float(size)}


def _exp(log_ratio: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(log_ratio, -EXPONENT, EXPONENT))


def _within(ratio: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return (bounds[0] <= ratio) & (ratio <= bounds[1])
