"""Accuracy, pass@k and maj@k from several samples of each problem, each with its confidence interval.

The problems of a set are a random draw from all possible problems, and the samples of one problem are similar. So every
number is a mean over problems of one value for each problem. Its standard error is that of P independent problems,
whatever the number of samples (clustered by problem, arXiv 2411.00640). Its interval comes from resampling problems.

All functions take the verdicts of each problem's samples and, if answers vote, also the answers. Samples that the
machinery dropped are left out beforehand, so problems may have different numbers of samples. If a number needs k
samples, problems with fewer are left out: a dropped sample says nothing about its problem, and with fewer than k
samples there is no unbiased estimate. `docs/evaluation.md` has the formulas.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from retool_jax.answers.normalise import normalise
from retool_jax.errors import UserError

DRAWS, BLOCK = 4_000, 100  # resamples of the problems for one interval, and how many are in memory at the same time
LEVEL = 0.95
EXACT_SAMPLES = 64  # samples of a problem up to which maj@k is exact: about a millisecond for all k
SUBSETS = 1_000  # random subsets for maj@k above that
RECIPE_DRAWS, RECIPE_SEED = 1_000, 42

_normalised = lru_cache(maxsize=65536)(normalise)


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: the mean over problems.
        stderr: its standard error; NaN for a single problem, which does not show how problems differ.
        low, high: the ends of the 95 % interval.
    """

    value: float
    stderr: float
    low: float
    high: float


def mean_at_n(correct: Sequence[Sequence[bool]], seed: int = 0) -> Estimate:
    """Accuracy: the mean over problems of the share of right samples. Problems without samples are left out.

    With one sample for each problem the standard error is the binomial one with P - 1 instead of P,
    sqrt(p (1 - p) / (P - 1)).

    Raises:
        UserError: no problem has a sample.
    """
    return _over_problems([np.mean(correct[i]) for i in _with_samples(correct, 1)], seed)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that k of n samples contain a right one, if c of the n are right: 1 - C(n-c, k) / C(n, k).

    Unbiased for a new draw of k samples (arXiv 2107.03374, equation 1). Computed in integers up to the last division,
    so it is exact to the last bit for any n.

    Raises:
        UserError: k is not between 1 and n, or c not between 0 and n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise UserError(f"pass@{k} of {n} samples with {c} right ones: choose k from 1 to n, and c from 0 to n")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def pass_at(correct: Sequence[Sequence[bool]], k: int, seed: int = 0) -> Estimate:
    """The mean of `pass_at_k` over the problems with at least k samples.

    Raises:
        UserError: none has so many.
    """
    return _over_problems([pass_at_k(len(correct[i]), sum(correct[i]), k) for i in _with_samples(correct, k)], seed)


def maj_at(
    correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]], k: int, seed: int = 0
) -> Estimate:
    """The probability that the majority answer of k samples is right, over the problems with at least k samples.

    k of a problem's samples are drawn without replacement, and the answer that most of them gave is taken. Among
    answers with equally many votes, each is taken with the same probability. Answers that are equal after
    `answers.normalise` count as one answer. It is right if more than half of its samples were judged right. Equal
    answers get equal verdicts unless a comparison ran out of time; an undecided answer is wrong. A sample without an
    answer (None, or empty after `normalise`) takes part in the draw but has no vote. Without any vote the problem
    counts as wrong.

    The probability is exact for up to `EXACT_SAMPLES` samples, and for k equal to n. Otherwise it is the mean of
    `SUBSETS` seeded draws, with a standard error below 0.016 for one problem.

    Raises:
        UserError: no problem has k samples.
    """
    rng = np.random.default_rng(seed)
    return _over_problems([_majority(correct[i], answers[i], k, rng) for i in _with_samples(correct, k)], seed)


def paired_difference(a: Sequence[Sequence[bool]], b: Sequence[Sequence[bool]], seed: int = 0) -> Estimate:
    """How much better `a` is than `b` on the same problems: the mean difference of their shares of right samples.

    What makes a problem hard for both cancels out, so the standard error is below that of two independent means
    (arXiv 2411.00640). Problems for which one of them has no samples are left out.

    Raises:
        UserError: no problem has samples of both.
    """
    both = [(ours, theirs) for ours, theirs in zip(a, b, strict=True) if len(ours) and len(theirs)]
    if not both:
        raise UserError("no problem has samples of both runs, so there is no difference; compare runs of one set")
    return _over_problems([np.mean(ours) - np.mean(theirs) for ours, theirs in both], seed, least=-1.0)


def recipe_best_worst_maj(
    correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]]
) -> dict[str, float]:
    """`best@N`, `worst@N` and `maj@N` by verl's rule (`process_validation_metrics`), to compare with its logs.

    N is 2, 4, 8, ... and n, the largest number of samples of a problem. N of each problem's samples are drawn WITH
    replacement, 1,000 times with seed 42. best@N is the share of draws with a right sample, worst@N the share of draws
    without a wrong sample; maj@N takes the verdict of the first sample whose answer has the most votes. Answers are
    compared as strings, and a missing answer (None or empty) votes like any other. verl seeds NumPy's global generator
    for each problem and N; here a separate generator draws the same numbers. A problem with fewer than n samples is
    drawn from those that it has.

    The result is biased: a draw with replacement misses samples, so with one right sample of 30 best@30 is 0.613 while
    pass@30 is 1. Use it only for that comparison, and `pass_at` and `maj_at` for everything else.
    """
    most = max(map(len, correct), default=0)
    sizes = [*(2**i for i in range(1, most.bit_length()) if 2**i < most), most] if most > 1 else []
    found = {}
    for size in sizes:
        shares = [_recipe_shares(tuple(c), _numbered(a), size) for c, a in zip(correct, answers, strict=True) if len(c)]
        best, worst, majority = np.mean(shares, axis=0).tolist()
        found |= {f"best@{size}": best, f"worst@{size}": worst, f"maj@{size}": majority}
    return found


# --- over problems ----------------------------------------------------------------------------------------------------


def _with_samples(correct: Sequence[Sequence[bool]], k: int) -> list[int]:
    """The indices of the problems with at least k samples; a UserError if there are none."""
    most = max(map(len, correct), default=0)
    if not 1 <= k <= most:
        raise UserError(
            f"k={k} samples of a problem are asked for, but the most that one has is {most}; choose k between 1 and"
            " that, or draw more samples of each problem"
        )
    return [i for i, samples in enumerate(correct) if len(samples) >= k]


def _over_problems(of_each: Sequence[float], seed: int, least: float = 0.0, most: float = 1.0) -> Estimate:
    """The mean over problems of one value for each, all between `least` and `most`."""
    values = np.sort(np.asarray(of_each, np.float64))  # so that the result does not depend on the problems' order
    mean = float(values.mean())
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(mean, stderr, *_interval(values, mean, seed, least, most))


def _interval(values: np.ndarray, mean: float, seed: int, least: float, most: float) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (sorted): BCa bootstrap over problems.

    The ends are percentiles of the resampled means, at levels that correct for skewness (Efron 1987, "Better bootstrap
    confidence intervals"); for a mean both of its constants are the skewness of the mean over 6. With few problems, of
    which nearly all or nearly none are solved, plain percentiles and the normal interval are far too short
    (arXiv 2503.01747).

    If all values are equal to v, resampling shows no spread. Then other values have at most the probability q with
    (1 - q)^P = 0.05, and in the worst case all of them lie at one end: [v - q (v - least), v + q (most - v)].
    """
    count = len(values)
    if values[-1] - values[0] < 1e-9:
        unseen = 1 - (1 - LEVEL) ** (1 / count)
        return mean - unseen * (mean - least), mean + unseen * (most - mean)
    rng = np.random.default_rng(seed)
    blocks = [values[rng.integers(0, count, (BLOCK, count), np.int32)].mean(1) for _ in range(DRAWS // BLOCK)]
    spread = values - mean
    skew = (spread**3).sum() / (spread**2).sum() ** 1.5 / 6  # at most 1/6, so the divisor below is above 0.6
    normal = NormalDist()
    ends = [skew + normal.inv_cdf(level) for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    low, high = np.quantile(np.concatenate(blocks), [normal.cdf(skew + end / (1 - skew * end)) for end in ends])
    return float(low), float(high)


# --- votes ------------------------------------------------------------------------------------------------------------


def _majority(correct: Sequence[bool], answers: Sequence[str | None], k: int, rng: np.random.Generator) -> float:
    """The probability that the answer with the most votes of k samples is right (`maj_at`)."""
    verdicts: dict[str, list[bool]] = {}
    for is_right, answer in zip(correct, answers, strict=True):
        if answer and (normalised := _normalised(answer)):
            verdicts.setdefault(normalised, []).append(is_right)
    right, wrong = [], []  # the number of samples with each answer
    for votes in verdicts.values():
        (right if 2 * sum(votes) > len(votes) else wrong).append(len(votes))
    silent = len(correct) - sum(right) - sum(wrong)
    if len(correct) <= EXACT_SAMPLES:
        return float(_majority_by_k(tuple(sorted(right)), tuple(sorted(wrong)), silent)[k])
    votes = rng.multivariate_hypergeometric([*right, *wrong, silent], k, size=SUBSETS)[:, :-1]
    winners = (votes > 0) & (votes == votes.max(axis=1, keepdims=True, initial=0))
    return float(np.mean(winners[:, : len(right)].sum(axis=1) / np.maximum(winners.sum(axis=1), 1)))


@lru_cache(maxsize=4096)
def _majority_by_k(right: tuple[int, ...], wrong: tuple[int, ...], silent: int) -> np.ndarray:
    """[n + 1]: for each k, the probability that a right answer has the most votes of k samples; ties share equally.

    Args:
        right, wrong: the number of samples with each right and each wrong answer.
        silent: the number of samples without an answer.

    A right answer with `size` samples wins with `top` votes if no other has more; it shares the win with the `tied`
    others that have as many. The number of ways to choose z of the other samples is the coefficient of z in a product
    of polynomials, one for each rival. Answers with fewer than `top` samples cannot reach `top`, so any number of
    their samples (`free`) may be chosen.
    """
    n = sum(right) + sum(wrong) + silent
    found = np.zeros(n + 1)
    for size, answers in Counter(right).items():
        others = Counter(right + wrong)
        others[size] -= 1
        rest = n - size
        for top in range(1, size + 1):
            rivals = [other for other in others.elements() if other >= top]
            free = rest - sum(rivals)
            ways = np.zeros((len(rivals) + 1, rest + 1))  # [tied, z]
            ways[0, : free + 1] = [math.comb(free, z) for z in range(free + 1)]
            for rival in rivals:
                grown = np.zeros_like(ways)
                for votes in range(top):
                    grown[:, votes:] += math.comb(rival, votes) * ways[:, : rest + 1 - votes]
                grown[1:, top:] += math.comb(rival, top) * ways[:-1, : rest + 1 - top]
                ways = grown
            shared = (ways / np.arange(1, len(rivals) + 2)[:, None]).sum(axis=0)
            found[top : top + rest + 1] += answers * math.comb(size, top) * shared
    return np.minimum(found / [math.comb(n, k) for k in range(n + 1)], 1.0)


@lru_cache(maxsize=16)
def _recipe_draws(count: int, size: int) -> np.ndarray:
    """[size, draws] of indices below `count`: the same for every problem with `count` samples, as verl seeds each."""
    rng = np.random.RandomState(RECIPE_SEED)
    return np.ascontiguousarray(rng.choice(count, size=(RECIPE_DRAWS, size), replace=True).T)


def _numbered(answers: Sequence[str | None]) -> tuple[int, ...]:
    """A number for each answer; equal answers have the same one, and all missing answers (None or empty) too."""
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(answer or "" for answer in answers))}
    return tuple(numbers[answer or ""] for answer in answers)


@lru_cache(maxsize=4096)  # many problems of an evaluation are alike: all samples right, with one answer
def _recipe_shares(correct: tuple[bool, ...], answers: tuple[int, ...], size: int) -> tuple[float, float, float]:
    """The shares of one problem's draws of `size` samples with a right one, without a wrong one, with a right vote."""
    drawn, draws = _recipe_draws(len(correct), size), np.arange(RECIPE_DRAWS)
    verdicts = np.asarray(correct)[drawn]
    votes = np.array(answers)[drawn] + (max(answers) + 1) * draws
    first = np.bincount(votes.ravel())[votes].argmax(axis=0)  # the first sample of a draw with the majority answer
    return verdicts.any(axis=0).mean(), verdicts.all(axis=0).mean(), verdicts[first, draws].mean()
