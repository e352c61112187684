"""Exact arithmetic without a sandbox: integers, decimals and fractions, with a parser written here.

The length of an expression and the digits of each result are limited before anything is computed. So `9**9**9` is
refused in a microsecond, and the longest allowed computation takes milliseconds.
"""

import math
import operator
import re
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, ClassVar

from retool_jax.tools.tool import Output, Tool

MAX_LENGTH = 500  # characters of an expression
MAX_BITS = 12_000  # of a numerator or denominator, 3612 digits; Python prints at most 4300 digits
DIGITS = 12  # of the decimal value shown after a fraction

_SPELLINGS = str.maketrans({"\N{MULTIPLICATION SIGN}": "*", "\N{MIDDLE DOT}": "*", "÷": "/", "\N{MINUS SIGN}": "-"})
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(\*\*|//|[-+*/%^()]))")
_OPERATIONS = {
    **{"+": operator.add, "-": operator.sub, "*": operator.mul},
    **{"/": operator.truediv, "//": operator.floordiv, "%": operator.mod},
}
_NEGATIVE = "neg"
# The precedence of operators. Powers are right-associative and bind tighter than a sign before them: -2**2 is -4.
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, _NEGATIVE: 3, "**": 4}


class Refused(Exception):
    """An expression is not computed. The message says why; the policy reads it."""


class Calculator(Tool):
    """`calculator({"expression": "2/3 + 0.5"})` returns `7/6 (about 1.16666666667)`."""

    name = "calculator"
    description = "Compute an arithmetic expression exactly: numbers, + - * / // % ** and parentheses."
    parameters: ClassVar[dict] = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "For example (2/3 + 0.5) * 12."}},
        "required": ["expression"],
    }

    async def call(self, arguments: dict[str, Any], state: None) -> Output:
        try:
            return Output(written(compute(arguments["expression"])))
        except Refused as reason:
            return Output(f"not computed: {reason}", "program")


def compute(expression: str) -> Fraction:
    """The exact value of an expression.

    Raises:
        Refused: it is too long, is not arithmetic, divides by zero, has an exponent that is not whole, or a value of
            more than about 3600 digits.
    """
    if len(expression) > MAX_LENGTH:
        raise Refused(f"the expression has {len(expression)} characters, the limit is {MAX_LENGTH}")
    values: list[Fraction] = []
    operators: list[str] = []  # operators that are not applied yet, and open parentheses

    def apply_last() -> None:
        sign, right = operators.pop(), values.pop()
        values.append(-right if sign == _NEGATIVE else _apply(sign, values.pop(), right))

    expects_operand = True
    for token, position in _tokens(expression):
        if expects_operand:
            if token in ("+", "-"):
                operators += [_NEGATIVE] if token == "-" else []
            elif token == "(":
                operators.append(token)
            elif token in _PRECEDENCE or token == ")":
                raise Refused(f"a number is missing before {token!r} at character {position}")
            else:
                values.append(Fraction(token))
                expects_operand = False
        elif token in _PRECEDENCE:
            least = _PRECEDENCE[token] + (token == "**")  # right-associative: an earlier ** is not applied yet
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= least:
                apply_last()
            operators.append(token)
            expects_operand = True
        elif token == ")":
            while operators and operators[-1] != "(":
                apply_last()
            if not operators:
                raise Refused(f"the parenthesis at character {position} was never opened")
            operators.pop()
        else:
            raise Refused(f"an operator is missing before {token!r} at character {position}")
    if expects_operand:
        raise Refused("a number is missing at the end")
    while operators:
        if operators[-1] == "(":
            raise Refused("a parenthesis is not closed")
        apply_last()
    return values[0]


def written(value: Fraction) -> str:
    """An integer in digits; a fraction followed by its decimal value."""
    if value.denominator == 1:
        return str(value.numerator)
    about = Context(prec=DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    return f"{value} (about {about})"


def _tokens(expression: str) -> list[tuple[str, int]]:
    """Numbers, operators and parentheses with their positions, counted from 1."""
    text, found, position = expression.translate(_SPELLINGS), [], 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if not match:
            rest = text[position:].lstrip()
            raise Refused(
                f"cannot read {rest[:1]!r} at character {len(text) - len(rest) + 1}; there are numbers, + - * / // % **"
                " and parentheses"
            )
        token = match[1] or match[2]
        found.append(("**" if token == "^" else token, match.end() - len(token) + 1))
        position = match.end()
    return found


def _apply(sign: str, left: Fraction, right: Fraction) -> Fraction:
    """The result of an operation. It is at most about twice as long as the operands, so its length is checked
    afterwards. Only a power can be longer; `_power` checks its length before."""
    try:
        value = _power(left, right) if sign == "**" else Fraction(_OPERATIONS[sign](left, right))
    except ZeroDivisionError:
        raise Refused("a division by zero") from None
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _too_long()
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise Refused(f"the power {exponent} is not a whole number")
    if abs(base) == 1:  # any exponent is allowed
        return Fraction(base ** (exponent.numerator % 2))
    if base and abs(exponent.numerator) > MAX_BITS / math.log2(max(abs(base.numerator), base.denominator)):
        raise _too_long()
    return base**exponent.numerator


def _too_long() -> Refused:
    return Refused(f"a result would have more than about {MAX_BITS * 3 // 10} digits")
