"""Estimates against closed forms, brute force and simulations with a known truth."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from retool_jax.errors import UserError
from retool_jax.evaluation.estimators import (
    EXACT_SAMPLES,
    Estimate,
    maj_at,
    mean_at_n,
    paired_difference,
    pass_at,
    pass_at_k,
    recipe_best_worst_maj,
)

# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_is_the_mean_over_problems_whatever_their_number_of_samples():
    estimate = mean_at_n([[True, False, False, False], [True], []])
    assert estimate.value == (0.25 + 1) / 2
    assert estimate.stderr == pytest.approx(0.375), "half the distance of two problems: their deviation over sqrt(2)"
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1


def test_the_standard_error_is_that_of_problems_not_of_samples():
    verdicts = [i % 3 == 0 for i in range(60)]
    once = mean_at_n([[right] for right in verdicts])
    assert once.stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 59)), "the binomial one, nearly"
    assert mean_at_n([[right] * 8 for right in verdicts]) == once, "answers that repeat each other add nothing"
    rng = np.random.default_rng(0)
    shares = np.linspace(0, 1, 60)
    several = mean_at_n([list(rng.random(8) < share) for share in shares])
    assert once.stderr > several.stderr > np.std(shares) / math.sqrt(60) * 0.9


def test_an_estimate_is_the_same_again_and_in_any_order_of_problems():
    rng = np.random.default_rng(1)
    problems = [list(rng.random(4) < share) for share in rng.random(50)]
    assert mean_at_n(problems) == mean_at_n(problems) == mean_at_n(problems[::-1])
    assert mean_at_n(problems, seed=1) != mean_at_n(problems), "the draws follow from the seed"


def test_problems_that_are_all_alike_leave_room_for_others():
    everything, nothing = mean_at_n([[True]] * 30), mean_at_n([[False] * 4] * 30)
    assert (everything.value, everything.stderr, everything.high) == (1, 0, 1)
    assert everything.low == pytest.approx(0.05 ** (1 / 30)), "the lowest accuracy that gives 30 of 30 in 5 % of cases"
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, pytest.approx(1 - everything.low))
    alone = mean_at_n([[True, False]])
    assert math.isnan(alone.stderr) and (alone.low, alone.high) == (pytest.approx(0.025), pytest.approx(0.975))


@pytest.mark.parametrize("problems", [[], [[]], [[], []]])
def test_nothing_is_estimated_from_no_samples(problems):
    with pytest.raises(UserError, match=r"the most that one has is 0; .*draw more samples"):
        mean_at_n(problems)


# --- pass@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 13))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample(n):
    subsets = np.arange(1 << n)
    sizes = np.array([int(subset).bit_count() for subset in subsets])
    for c in range(n + 1):
        having = subsets & ((1 << c) - 1) > 0  # the first c samples are right
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(having[sizes == k].mean(), abs=1e-12), (c, k)


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(10**6, 1, 1) == 1e-6
    assert pass_at_k(20_000, 1, 10_000) == 0.5, "of numbers with six thousand digits"
    assert pass_at_k(20_000, 2, 10_000) == pytest.approx(1 - 0.5 * 9_999 / 19_999, abs=1e-15)
    assert pass_at_k(30, 1, 30) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 2, 0), (0, 0, 1), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(UserError, match=f"pass@{k} of {n} samples with {c} right ones"):
        pass_at_k(n, c, k)


def test_pass_at_is_the_mean_over_problems_with_enough_samples():
    correct = [[True, False, False], [False] * 3, [True]]
    assert pass_at(correct, 1).value == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert pass_at(correct, 2).value == pytest.approx(2 / 3 / 2), "the problem with one sample is left out"
    assert pass_at(correct, 2) == pass_at(correct[:2], 2)
    for k in (0, 4):
        with pytest.raises(UserError, match=f"k={k} samples .* has is 3; choose k between 1 and that"):
            pass_at(correct, k)


# --- maj@k ------------------------------------------------------------------------------------------------------------

RIGHT = {"7", "14/2"}  # two answers that are right and do not look alike


def plurality(answers: Sequence[str | None]) -> float:
    """The chance of a right answer when these vote."""
    votes = Counter(answer for answer in answers if answer)
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(answer in RIGHT for answer in first) / len(first) if first else 0.0


@pytest.mark.parametrize("n", range(1, 7))
def test_maj_at_k_is_the_mean_over_all_subsets(n):
    for answers in itertools.combinations_with_replacement(["7", "14/2", "3", "4", None], n):
        correct = [answer in RIGHT for answer in answers]
        for k in range(1, n + 1):
            expected = np.mean([plurality(subset) for subset in itertools.combinations(answers, k)])
            found = maj_at([correct], [answers], k).value
            assert found == pytest.approx(expected, abs=1e-12), (answers, k)


def test_votes_are_for_values_and_not_for_spellings():
    answers = ["1,042", "x = 1042.", r"\text{1{,}042}", "5", "5"]
    assert maj_at([[True] * 3 + [False] * 2], [answers], 5).value == 1
    assert maj_at([[True] * 3 + [False] * 2], [["6", "7", "8", "5", "5"]], 5).value == 0


def test_an_empty_answer_never_wins():
    assert maj_at([[False, False, True]], [["", None, "7"]], 3).value == 1
    assert maj_at([[False, False, True]], [["", "$", "7"]], 1).value == pytest.approx(1 / 3), "a draw without a vote"
    assert maj_at([[False, False]], [[None, ""]], 2).value == 0


def test_ties_are_shared_whatever_the_order():
    correct, answers = [True, False, False, True], ["7", "3", "3", "7"]
    for order in itertools.permutations(range(4)):
        assert maj_at([[correct[i] for i in order]], [[answers[i] for i in order]], 4).value == 0.5


def test_an_answer_is_right_where_most_of_its_samples_were_judged_so():
    assert maj_at([[True, True, False]], [["7", "7", "7"]], 3).value == 1
    assert maj_at([[True, False, False]], [["7", "7", "7"]], 3).value == 0
    assert maj_at([[True, False]], [["7", "7"]], 2).value == 0, "in doubt it is wrong"


def test_maj_at_leaves_out_problems_with_fewer_samples():
    correct, answers = [[True, True], [False]], [["7", "7"], ["3"]]
    assert maj_at(correct, answers, 1).value == 0.5
    assert maj_at(correct, answers, 2).value == 1
    with pytest.raises(UserError, match="k=3 samples"):
        maj_at(correct, answers, 3)


def two_answers(right: int, wrong: int, k: int) -> float:
    """maj@k of two answers: hypergeometric probability of more right than wrong ones, plus half of that of a tie."""
    total = 0.0
    for drawn in range(max(0, k - wrong), min(right, k) + 1):
        ways = math.comb(right, drawn) * math.comb(wrong, k - drawn) / math.comb(right + wrong, k)
        total += ways * (0.5 if 2 * drawn == k else 2 * drawn > k)
    return total


def test_maj_at_k_of_many_samples():
    def two(right: int, wrong: int, k: int, problems: int = 1) -> float:
        correct, answers = [True] * right + [False] * wrong, ["7"] * right + ["3"] * wrong
        return maj_at([correct] * problems, [answers] * problems, k).value

    half = EXACT_SAMPLES // 2
    for k in (1, 2, 3, 16, EXACT_SAMPLES - 1, EXACT_SAMPLES):
        assert two(half + 3, half - 3, k) == pytest.approx(two_answers(half + 3, half - 3, k), abs=1e-12)
    assert two(60, 41, 101) == 1 and two(50, 51, 101) == 0 and two(60, 60, 120) == 0.5, "all of them: no draw"
    for k in (1, 2, 9):
        # The mean of 20 times 1,000 draws, within four standard errors.
        assert two(60, 41, k, problems=20) == pytest.approx(two_answers(60, 41, k), abs=4 * 0.5 / math.sqrt(20_000))
    assert two(60, 41, 9) == two(60, 41, 9), "the draws are seeded"
    assert maj_at([[False] * 80], [[None] * 80], 7).value == 0
    alone = maj_at([[True] + [False] * 79], [["7"] + [None] * 79], 1).value
    assert alone == pytest.approx(1 / 80, abs=4 * math.sqrt(1 / 80 / 1000)), "a draw without a vote is wrong"


# --- intervals --------------------------------------------------------------------------------------------------------

SIMULATIONS = 200


def coverage(estimate: Callable[[np.random.Generator], Estimate], truth: float) -> float:
    """The share of simulations whose interval has the truth in it."""
    rng = np.random.default_rng(14)
    estimates = [estimate(rng) for _ in range(SIMULATIONS)]
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


def drawn(rng: np.random.Generator, problems: int, samples: int, alpha: float, beta: float) -> list[list[bool]]:
    """Verdicts on problems whose chance of a right answer follows a beta distribution."""
    return (rng.random((problems, samples)) < rng.beta(alpha, beta, problems)[:, None]).tolist()


@pytest.mark.parametrize(
    ("estimate", "truth"),
    [
        (lambda rng: mean_at_n(drawn(rng, 30, 8, 0.5, 0.5)), 0.5),
        (lambda rng: mean_at_n(drawn(rng, 30, 1, 1.0, 9.0)), 0.1),
        (lambda rng: mean_at_n(drawn(rng, 60, 16, 0.4, 1.6)), 0.2),
        # E[(1-p)^4] of a beta(1, 3) is 3 / 7.
        (lambda rng: pass_at(drawn(rng, 60, 8, 1.0, 3.0), 4), 4 / 7),
    ],
    ids=["problems easy or hard", "one sample, few right", "skewed", "pass@4"],
)
def test_the_interval_has_the_truth_in_it_in_95_percent_of_cases(estimate, truth):
    assert 0.90 <= coverage(estimate, truth) <= 0.99


def test_the_interval_of_a_difference_has_the_truth_in_it_too():
    def difference(rng: np.random.Generator) -> Estimate:
        chances = rng.beta(0.7, 0.7, 40)[:, None]
        better = chances + 0.3 * (1 - chances)
        return paired_difference((rng.random((40, 4)) < better).tolist(), (rng.random((40, 4)) < chances).tolist())

    assert 0.90 <= coverage(difference, 0.15) <= 0.99


def test_the_interval_holds_where_nearly_everything_is_right():
    """29 of 30: a normal interval ends at 103 %, plain percentiles begin at 90 %."""
    nearly = mean_at_n([[True]] * 29 + [[False]])
    assert 0.75 < nearly.low < 0.85 and 0.99 < nearly.high <= 1
    for share in (0.9, 0.95, 0.98):
        by_count = [mean_at_n([[i < right] for i in range(30)]) for right in range(31)]
        chance = [math.comb(30, right) * share**right * (1 - share) ** (30 - right) for right in range(31)]
        covered = [c for c, e in zip(chance, by_count, strict=True) if e.low - 1e-9 <= share <= e.high + 1e-9]
        assert 0.93 < sum(covered) <= 1


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_paired_difference_is_that_of_each_problem():
    a = [[True, True], [True, False], [False], [True, True, False, False]]
    b = [[True, False], [False, False], [True], [True]]
    each = np.array([0.5, 0.5, -1.0, -0.5])
    found = paired_difference([*a, [True], []], [*b, [], [False]])
    assert found.value == pytest.approx(each.mean())
    assert found.stderr == pytest.approx(math.sqrt(((each - each.mean()) ** 2).sum() / 3 / 4))
    assert -1 <= found.low < found.value < found.high <= 1
    back = paired_difference(b, a)
    assert (back.value, back.stderr) == (pytest.approx(-found.value), pytest.approx(found.stderr))


def test_what_is_hard_for_both_is_no_noise():
    hard = [[i % 2 == 0] for i in range(100)]
    better = [[right or i % 10 == 1] for i, (right,) in enumerate(hard)]
    found = paired_difference(better, hard)
    assert found.value == pytest.approx(0.1) and found.stderr == pytest.approx(math.sqrt(0.1 * 0.9 / 99))
    assert found.stderr < 0.65 * math.hypot(mean_at_n(better).stderr, mean_at_n(hard).stderr)
    same = paired_difference(hard, hard)
    unseen = 1 - 0.05**0.01
    assert (same.value, same.stderr) == (0, 0)
    assert (same.low, same.high) == (pytest.approx(-unseen), pytest.approx(unseen))


def test_a_difference_needs_a_problem_that_both_have():
    with pytest.raises(UserError, match="no problem has samples of both runs"):
        paired_difference([[True], []], [[], [True]])
    with pytest.raises(ValueError):
        paired_difference([[True]], [[True], [False]])


# --- verl's ----------------------------------------------------------------------------------------------------------


def loop(correct: Sequence[bool], answers: Sequence[str | None], size: int) -> tuple[float, float, float]:
    """One problem's best@N, worst@N and maj@N, draw after draw, with votes in a dict."""
    rng = np.random.RandomState(42)
    best, worst, majority = [], [], []
    for _ in range(1000):
        chosen = [int(i) for i in rng.choice(len(correct), size=size, replace=True)]
        votes: dict[str, list[bool]] = {}
        for i in chosen:
            votes.setdefault(answers[i] or "", []).append(correct[i])
        best.append(max(correct[i] for i in chosen))
        worst.append(min(correct[i] for i in chosen))
        majority.append(votes[max(votes, key=lambda vote: len(votes[vote]))][0])
    return np.mean(best), np.mean(worst), np.mean(majority)


def test_the_recipes_numbers_are_those_of_a_plain_loop():
    correct = [[True, False, False, True, False, False], [False, True, True, True, False, True], [False] * 6]
    answers = [["7", "", None, "7", "3", ""], ["3", "07", "7", "7", "3", "07"], ["1", "2", "3", "4", "5", "6"]]
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    found = recipe_best_worst_maj(correct, answers)
    assert np.random.get_state()[1].tolist() == before, "the global generator is left alone"
    assert list(found) == [f"{name}@{size}" for size in (2, 4, 6) for name in ("best", "worst", "maj")]
    for size in (2, 4, 6):
        expected = np.mean([loop(c, a, size) for c, a in zip(correct, answers, strict=True)], axis=0)
        assert [found[f"{name}@{size}"] for name in ("best", "worst", "maj")] == pytest.approx(list(expected))


def test_the_recipe_counts_silence_as_a_vote_and_misses_the_only_right_sample():
    silent = [[True, False, False, False]], [["7", None, "", None]]
    assert recipe_best_worst_maj(*silent)["maj@4"] < 0.5 and maj_at(*silent, 4).value == 1
    one = [[True] + [False] * 29]
    found = recipe_best_worst_maj(one, [["7"] + ["3"] * 29])
    assert list(found)[::3] == ["best@2", "best@4", "best@8", "best@16", "best@30"]
    assert found["best@30"] == pytest.approx(0.613, abs=5e-4)
    assert pass_at(one, 30).value == 1.0
    assert recipe_best_worst_maj([[True], [False]], [["7"], ["3"]]) == {}, "verl has no best@1"


def test_the_recipe_takes_the_samples_that_there_are():
    whole = recipe_best_worst_maj([[True, True], [False]], [["7", "7"], ["3"]])
    assert whole == {"best@2": 0.5, "worst@2": 0.5, "maj@2": 0.5}
    assert recipe_best_worst_maj([[True, True], []], [["7", "7"], []])["best@2"] == 1.0
