"""How well a policy does, from several samples of each problem: accuracy, pass@k and maj@k, each with its interval.

Problems are what a set has drawn from all that could be asked, and the samples of one problem are alike. So every
number is a mean over problems of a number of each, its standard error is that of P independent problems whatever the
number of samples (clustered by problem, arXiv 2411.00640), and its interval comes from drawing problems.

All functions take, for each problem, the verdicts of its samples and, where answers vote, the answers beside them.
Samples that the machinery dropped are left out beforehand, so problems may have different numbers of samples. Where a
number takes k samples, problems with fewer are left out: to be dropped says nothing about a problem, and with less
than k samples there is no unbiased estimate. The formulas stand in `docs/evaluation.md`.
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

DRAWS, BLOCK = 4_000, 100  # draws of all problems for one interval, and how many of them are in memory at once
LEVEL = 0.95
EXACT_SAMPLES = 64  # samples of a problem up to which maj@k is exact: about a millisecond for all k
SUBSETS = 1_000  # drawn for maj@k above that
RECIPE_DRAWS, RECIPE_SEED = 1_000, 42

_spelled = lru_cache(maxsize=65536)(normalise)


@dataclass(frozen=True)
class Estimate:
    """A number with what is known of it.

    Attributes:
        value: the mean over problems.
        stderr: its standard error; NaN from a single problem, which does not show how problems differ.
        low, high: the ends of the 95 % interval.
    """

    value: float
    stderr: float
    low: float
    high: float


def mean_at_n(correct: Sequence[Sequence[bool]], seed: int = 0) -> Estimate:
    """Accuracy: the mean over problems of the share of right samples. Problems without samples are left out.

    With one sample a problem the standard error is the binomial one but for P - 1 in the place of P,
    sqrt(p (1 - p) / (P - 1)).

    Raises:
        UserError: no problem has a sample.
    """
    return _over_problems([np.mean(correct[i]) for i in _having(correct, 1)], seed)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples have a right one among them, when c are right: 1 - C(n-c, k) / C(n, k).

    Unbiased for a new draw of k samples (arXiv 2107.03374, equation 1). Whole numbers up to the last division, so it
    is exact to the last bit for any n.

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
    return _over_problems([pass_at_k(len(correct[i]), sum(correct[i]), k) for i in _having(correct, k)], seed)


def maj_at(
    correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]], k: int, seed: int = 0
) -> Estimate:
    """The chance that most of k samples agree on a right answer, over the problems with at least k samples.

    k of a problem's samples are drawn without replacement, and the answer that most of them gave is taken; of several
    with equally many votes each is taken with the same chance. Answers that are equal after `answers.normalise` are
    one; it is right when more than half of its samples were judged so. Equal answers get equal verdicts unless a
    comparison ran out of time; an answer in such doubt is wrong. A sample without an answer (None, or nothing left
    after `normalise`) takes part in the draw and has no vote, and without any vote the problem is wrong.

    The chance is exact for up to `EXACT_SAMPLES` samples, and for k equal to n; else it is the mean of `SUBSETS` seeded
    draws, off by less than 0.016 for one problem (a standard error).

    Raises:
        UserError: no problem has k samples.
    """
    rng = np.random.default_rng(seed)
    return _over_problems([_majority(correct[i], answers[i], k, rng) for i in _having(correct, k)], seed)


def paired_difference(a: Sequence[Sequence[bool]], b: Sequence[Sequence[bool]], seed: int = 0) -> Estimate:
    """How much better `a` did than `b` on the same problems: the mean of the differences in their shares of right ones.

    That problems are hard for both cancels, so the standard error is less than that of two independent means
    (arXiv 2411.00640). Problems where one has no samples are left out.

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

    For N = 2, 4, 8, ... and n, the most samples of a problem, each problem's samples are drawn N at a time WITH
    replacement, 1,000 times with seed 42. best@N is the share of draws with a right sample, worst@N that of draws
    without a wrong one; maj@N takes the verdict of the first sample whose answer has the most votes. Answers are
    compared as they are given, and no answer (None or empty) votes like any other. verl seeds NumPy's global generator
    for each problem and N; the same numbers are drawn here from one of their own. A problem with fewer than n samples
    counts with those that it has.

    It is biased: a draw with replacement misses samples, so with one right sample of 30 best@30 is 0.613 where
    pass@30 is 1. Use `pass_at` and `maj_at` for anything but a comparison.
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


def _having(correct: Sequence[Sequence[bool]], k: int) -> list[int]:
    """Which problems have at least k samples; a UserError where none has."""
    most = max(map(len, correct), default=0)
    if not 1 <= k <= most:
        raise UserError(
            f"k={k} samples of a problem are asked for, where the most that one has is {most}; choose k between 1 and"
            " that, or draw more samples of each problem"
        )
    return [i for i, samples in enumerate(correct) if len(samples) >= k]


def _over_problems(of_each: Sequence[float], seed: int, least: float = 0.0, most: float = 1.0) -> Estimate:
    """The mean of a number of each problem, which lies between `least` and `most`."""
    values = np.sort(np.asarray(of_each, np.float64))  # so that the order of the problems changes nothing
    mean = float(values.mean())
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(mean, stderr, *_interval(values, mean, seed, least, most))


def _interval(values: np.ndarray, mean: float, seed: int, least: float, most: float) -> tuple[float, float]:
    """The 95 % interval of the mean of `values` (sorted): BCa bootstrap over problems.

    Percentiles of the resampled means, at levels that correct for skewness (Efron 1987, "Better bootstrap confidence
    intervals"); for a mean both of its constants are the skewness of the mean over 6. With few problems, of which
    nearly all or nearly none are solved, plain percentiles and the normal interval are far too short
    (arXiv 2503.01747).

    Where all values are equal nothing can be resampled. Then other values have at most the chance q of
    (1 - q)^P = 0.05, and all of that may lie at either end: [v - q (v - least), v + q (most - v)].
    """
    count = len(values)
    if values[-1] - values[0] < 1e-9:
        unseen = 1 - (1 - LEVEL) ** (1 / count)
        return mean - unseen * (mean - least), mean + unseen * (most - mean)
    rng = np.random.default_rng(seed)
    blocks = [values[rng.integers(0, count, (BLOCK, count), np.int32)].mean(1) for _ in range(DRAWS // BLOCK)]
    spread = values - mean
    skew = (spread**3).sum() / (spread**2).sum() ** 1.5 / 6  # at most 1/6, so what divides below is above 0.6
    normal = NormalDist()
    ends = [skew + normal.inv_cdf(level) for level in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    low, high = np.quantile(np.concatenate(blocks), [normal.cdf(skew + end / (1 - skew * end)) for end in ends])
    return float(low), float(high)


# --- votes ------------------------------------------------------------------------------------------------------------


def _majority(correct: Sequence[bool], answers: Sequence[str | None], k: int, rng: np.random.Generator) -> float:
    """The chance that the answer with the most votes of k samples is right (`maj_at`)."""
    verdicts: dict[str, list[bool]] = {}
    for is_right, answer in zip(correct, answers, strict=True):
        if answer and (spelled := _spelled(answer)):
            verdicts.setdefault(spelled, []).append(is_right)
    right, wrong = [], []  # how many samples gave each answer
    for votes in verdicts.values():
        (right if 2 * sum(votes) > len(votes) else wrong).append(len(votes))
    silent = len(correct) - sum(right) - sum(wrong)
    if len(correct) <= EXACT_SAMPLES:
        return float(_majority_by_k(tuple(sorted(right)), tuple(sorted(wrong)), silent)[k])
    votes = rng.multivariate_hypergeometric([*right, *wrong, silent], k, size=SUBSETS)[:, :-1]
    ahead = (votes > 0) & (votes == votes.max(axis=1, keepdims=True, initial=0))
    return float(np.mean(ahead[:, : len(right)].sum(axis=1) / np.maximum(ahead.sum(axis=1), 1)))


@lru_cache(maxsize=4096)
def _majority_by_k(right: tuple[int, ...], wrong: tuple[int, ...], silent: int) -> np.ndarray:
    """[n + 1], for each k the chance that a right answer has the most votes of k samples, ties shared.

    Args:
        right, wrong: how many samples gave each answer.
        silent: how many gave none.

    A right answer of `size` samples wins with `top` votes where no other has more, and then shares with the `tied`
    others that have as many. The ways to choose z samples of the others so are coefficients of z in a product of
    polynomials, one for each answer; those with fewer than `top` samples cannot reach it and are free.
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
    """[size, draws] of indices below `count`: those of every problem with so many samples, as verl seeds for each."""
    rng = np.random.RandomState(RECIPE_SEED)
    return np.ascontiguousarray(rng.choice(count, size=(RECIPE_DRAWS, size), replace=True).T)


def _numbered(answers: Sequence[str | None]) -> tuple[int, ...]:
    """Each answer as a number that equal ones share; no answer (None or empty) has one too."""
    numbers = {answer: number for number, answer in enumerate(dict.fromkeys(answer or "" for answer in answers))}
    return tuple(numbers[answer or ""] for answer in answers)


@lru_cache(maxsize=4096)  # many problems of an evaluation are alike: all samples right, with one answer
def _recipe_shares(correct: tuple[bool, ...], answers: tuple[int, ...], size: int) -> tuple[float, float, float]:
    """Of one problem's draws of `size` samples: the shares with a right one, without a wrong one, with a right vote."""
    drawn, draws = _recipe_draws(len(correct), size), np.arange(RECIPE_DRAWS)
    verdicts = np.asarray(correct)[drawn]
    votes = np.array(answers)[drawn] + (max(answers) + 1) * draws
    first = np.bincount(votes.ravel())[votes].argmax(axis=0)  # where a draw first has the answer with the most votes
    return verdicts.any(axis=0).mean(), verdicts.all(axis=0).mean(), verdicts[first, draws].mean()
