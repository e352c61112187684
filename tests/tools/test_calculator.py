"""Exact arithmetic; no text of a policy costs much or raises an exception."""

import asyncio
import time
from fractions import Fraction

import pytest

from retool_jax.tools.calculator import Calculator, Refused, compute, written


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2*3", 7),
        ("(1+2)*3", 9),
        ("-2**2", -4),
        ("2**3**2", 512),
        ("2^10", 1024),
        ("10-2-3", 5),
        ("2**-1", Fraction(1, 2)),
        ("2*-3+4", -2),
        ("2**-1**2", Fraction(1, 2)),
        ("--3", 3),
        ("7//2 + -7%3", 5),
        ("12 \u00d7 3 \u00f7 4 \u2212 1", 8),
        ("2/3 + .5", Fraction(7, 6)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("0**0 + (-1)**99999999999", 0),
        ("999999999999 * 999999999999", 999999999998000000000001),
    ],
)
def test_values_are_exact(expression, value):
    assert compute(expression) == value


def test_a_fraction_is_written_with_its_decimal():
    assert [written(compute(e)) for e in ("42", "1/3", "-7/2")] == [
        "42",
        "1/3 (about 0.333333333333)",
        "-7/2 (about -3.5)",
    ]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "a number is missing at the end"),
        ("1 +", "a number is missing at the end"),
        ("* 3", r"a number is missing before '\*' at character 1"),
        ("(1", "a parenthesis is not closed"),
        ("1)", "the parenthesis at character 2 was never opened"),
        ("1 2", "an operator is missing before '2' at character 3"),
        ("sin(1)", r"cannot read 's' at character 1; there are numbers, \+ - \* / // % \*\* and parentheses"),
        ("1e5", "cannot read 'e' at character 2"),
        ("__import__('os')", "cannot read '_' at character 1"),
        ("\u0663", "cannot read '\u0663' at character 1"),
        ("\ud800", r"cannot read '\\ud800' at character 1"),
        ("1/0", "a division by zero"),
        ("1 % (2 - 2)", "a division by zero"),
        ("0**-1", "a division by zero"),
        ("2**0.5", "the power 1/2 is not a whole number"),
        ("9**9**9", "a result would have more than about 3600 digits"),
        ("2**99999999999999999999999", "more than about 3600 digits"),
        ("(1/2)**99999999999999999999999", "more than about 3600 digits"),
        ("9" * 501, "the expression has 501 characters, the limit is 500"),
    ],
)
def test_what_is_not_computed_is_told_why(expression, reason):
    with pytest.raises(Refused, match=reason):
        compute(expression)


@pytest.mark.parametrize(
    "expression",
    ["9" * 500, "(" * 250 + ")" * 250, "-" * 499 + "1", "2**11000*" * 55 + "1", "+".join(["(1/3)**3500"] * 38)],
    ids=["digits", "brackets", "signs", "products", "sums"],
)
def test_the_dearest_expressions_take_no_time(expression):
    began = time.process_time()
    output = asyncio.run(Calculator().call({"expression": expression}, None))
    assert time.process_time() - began < 1.0 and output.text and output.fault in ("none", "program")


def test_the_policy_is_told_in_words():
    ask = Calculator().call
    assert asyncio.run(ask({"expression": "6*7"}, None)).text == "42"
    refused = asyncio.run(ask({"expression": "1/0"}, None))
    assert (refused.text, refused.fault, refused.status) == (
        "not computed: a division by zero",
        "program",
        "user_error",
    )
