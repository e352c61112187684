"""Questions that are in two sets are found by their words, with and without small changes."""

import json

import pytest

from retool_jax.data.instructions import INSTRUCTION
from retool_jax.data.overlap import overlaps
from retool_jax.data.problems import load_problems

LONG = "Find the number of ways to place a digit in each cell of a 2x3 grid so that the sum is $999$ in all."
BOILERPLATE = "The probability is m over n where m and n are relatively prime positive integers. Find m + n"


def test_overlap_goes_by_words_and_finds_parts():
    references = [
        f"Jen draws a card from a deck of {n} cards, puts it back, shuffles all and draws again. {BOILERPLATE}."
        for n in range(3)
    ] + [LONG, "2 + 2?"]
    reworded = LONG.upper().replace("$999$", r"\(999\)").replace(" 2x3", "\n2 x 3")
    questions = [
        reworded,
        f"Once upon a time: {LONG} What is it?",
        f"Two trains leave a town at noon on one track, and each is late by an hour or not at all. {BOILERPLATE}",
        "2+2",
        "2 + 3?",
        "求满足 $x^2+y^2=25$ 的整数对的个数。",
        "",
        references[2] + f"\n\n{INSTRUCTION}",
    ]
    found = {overlap.index: (overlap.reference, overlap.share) for overlap in overlaps(questions, references)}
    assert found == {0: (3, 1.0), 1: (3, 1.0), 3: (4, 1.0), 7: (2, 1.0)}
    (part,) = overlaps([LONG.replace("digit", "letter")], [LONG])
    assert 0.5 < part.share < 1
    assert overlaps(["求满足方程的整数对的个数是多少"], ["求满足方程的整数对的个数是几呢"])[0].share == pytest.approx(
        6 / 8
    )


# Two competitions as the AIME files have them; problems of both end in the same words.
FRACTION = r"can be written as $\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. Find $m+n$."
COMPETITIONS = [
    [
        ("A ferry goes $18$ kilometers at $9$ kilometers per hour. How many minutes does that take?", "120"),
        (f"Two of the cards $1$ to $10$ are drawn. The probability that both are even {FRACTION}", "11"),
        (r"Let $x, y > 1$ satisfy \[\log_2 x + \log_2 y = 7, \qquad \log_2 x - \log_2 y = 1.\] Find $x + y$.", "24"),
        (f"A die is rolled until a six appears. The probability of an odd number of rolls {FRACTION}", "17"),
        ("How many three-digit integers have digits that increase strictly from left to right?", "84"),
        (r"Find the greatest three-digit multiple of \(7\).", "994"),
    ],
    [
        (r"Find the sum of all positive divisors of \(48\).", "124"),
        (f"A square has a random point. The probability that no vertex is nearer than the center {FRACTION}", "3"),
        (r"Points \(D, E\) cut \(\overline{A B}\) in equal thirds. Find \([A B C]\) if \([C D E]=14\).", "42"),
        ("Five friends each order tea, coffee or water. In how many ways does every drink have an order?", "150"),
        (f"Two of the integers $1$ to $6$ are chosen. The probability that their sum is prime {FRACTION}", "22"),
        ("Find the number of rectangles, whatever their size, in a $3$ by $3$ grid of unit squares.", "36"),
    ],
]


def test_competition_files_are_read_and_told_apart(tmp_path):
    asked = []
    for year, pairs in enumerate(COMPETITIONS):
        rows = [{"input": question, "output": answer} for question, answer in pairs]
        path = tmp_path / f"year{year}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        problems = load_problems(str(path))
        assert [problem.ground_truth for problem in problems] == [answer for _, answer in pairs]
        asked.append([problem.question for problem in problems])
        found = [(overlap.index, overlap.reference, overlap.share) for overlap in overlaps(asked[-1], asked[-1])]
        assert found == [(index, index, 1.0) for index in range(len(pairs))]
    assert not overlaps(*asked)
    assert overlaps(*asked, least=0.3), "the words that they share are not far from counting as an overlap"
