"""GSM8K's solutions as programs: each calculator annotation (`<<48/2=24>>`) becomes a step with a named value.

They are real cold-start traces for a small model without a teacher. The control uses the same solutions in words.
"""

import ast
import builtins
import keyword
import operator
import re
from fractions import Fraction

from retool_jax.data.instructions import prompt_of
from retool_jax.data.rows import plain_integer
from retool_jax.tokens.grammar import CODE_TOOL

_STEP = re.compile(r"<<([^<>=]+)=([^<>]*)>>")
_MARK = re.compile(r"<<[^<>]*>>")
_NUMBER = re.compile(r"\d[\d,]*\.?\d*|\.\d+")
_RESULT = re.compile(r"[\s$]*[\d,.]*\d%?(?=\s)")  # the value, which is repeated after its annotation
# Words that are left out at both ends of a name.
_STOP_WORDS = {"a", "an", "and", "are", "at", "by", "for", "from", "in", "is", "of", "on", "or", "per", "so", "than"}
_STOP_WORDS |= {"that", "the", "then", "this", "to", "was", "were", "with"}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_PYTHON_NAMES = frozenset([*keyword.kwlist, *keyword.softkwlist, *dir(builtins)])


class NoProgram(Exception):
    """A solution cannot become a program. The message is one of a few fixed reasons, so that reasons can be counted."""


def program_of(question: str, solution: str) -> str:
    """The steps of a solution as assignments, and a line that prints the last value.

    A number that an earlier step computed is written as its name, unless the question contains that number, too. A
    division without a remainder is written with `//`, so that counts stay integers.

    Raises:
        NoProgram: there is no annotation, or one that is not arithmetic.
    """
    in_question = {_value(number) for number in _NUMBER.findall(question)}
    names: dict[Fraction, tuple[str, bool]] = {}  # by value: the latest name, and whether it is an integer in Python
    lines: list[str] = []
    taken: set[str] = set()
    whole = True
    for step in _STEP.finditer(solution):
        usable = {value: name for value, name in names.items() if value not in in_question}
        expression, value, whole = _rewritten(_parsed(step[1]), usable)
        name = _name(solution[: step.start()], solution[step.end() :], taken)
        lines.append(f"{name} = {ast.unparse(expression)}")
        for known in {value, _value(step[2])} - {None}:  # the exact value, and the one in the annotation
            names[known] = name, whole
    if not lines:
        raise NoProgram("no calculator annotation")
    last = lines[-1].partition(" = ")[0]
    return "\n".join([*lines, f"print({last})" if whole else f"print(round({last}, 2))"])


def trace_of(question: str, program: str, output: str, answer: str) -> list[dict]:
    """A conversation that calls the program and states the answer."""
    call = {"type": "function", "function": {"name": CODE_TOOL, "arguments": {"code": program}}}
    return [
        {"role": "user", "content": prompt_of(question)},
        {"role": "assistant", "content": "I will compute it step by step.", "tool_calls": [call]},
        {"role": "tool", "content": output},
        {"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."},
    ]


def twin_of(question: str, solution: str, answer: str) -> list[dict]:
    """The same solution in its author's words, without a tool."""
    words = _MARK.sub("", solution.rpartition("####")[0]).strip()
    return [
        {"role": "user", "content": prompt_of(question)},
        {"role": "assistant", "content": f"{words}\nThe answer is \\boxed{{{answer}}}."},
    ]


def answer_of(solution: str) -> str:
    """The answer after `####`; an integer as plain digits. Empty if there is none."""
    return plain_integer(solution.rpartition("####")[2].strip()) if "####" in solution else ""


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(number.replace(",", "").replace("$", "").strip().rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def _parsed(text: str) -> ast.expr:
    """The left side of an annotation as Python: thousands without commas, `5%` as (5/100), `x` as `*`."""
    text = re.sub(r"(?<=\d),(?=\d{3})|[$\s]", "", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"([\d.]+)%", r"(\1/100)", text)).replace("x", "*")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NoProgram("an annotation that is no arithmetic") from None


def _rewritten(node: ast.expr, names: dict[Fraction, tuple[str, bool]]) -> tuple[ast.expr, Fraction, bool]:
    """An expression with names for known values, its value, and whether Python computes it as an integer."""
    match node:
        case ast.Constant(value=int() | float() as number) if (value := _value(repr(number))) is not None:
            name, whole = names.get(value, ("", isinstance(number, int)))
            return ast.Name(name) if name else node, value, whole
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            inner, value, whole = _rewritten(operand, names)
            return ast.UnaryOp(sign, inner), -value if isinstance(sign, ast.USub) else value, whole
        case ast.BinOp(op=sign) if type(sign) in _OPERATORS:
            (left, a, a_whole), (right, b, b_whole) = _rewritten(node.left, names), _rewritten(node.right, names)
            divides = isinstance(sign, ast.Div)
            if divides and not b:
                raise NoProgram("a division by zero")
            value = _OPERATORS[type(sign)](a, b)
            whole = a_whole and b_whole and value.denominator == 1
            return ast.BinOp(left, ast.FloorDiv() if divides and whole else sign, right), value, whole
    raise NoProgram("an annotation that is no arithmetic")


def _name(before: str, after: str, taken: set[str]) -> str:
    """A name for a step's value, from the words after it: `24 clips in May` is clips_in_may, `$24.` is dollars."""
    after = _RESULT.sub("", after, count=1) if _RESULT.match(after) else after
    words = re.findall(r"[a-z]+", re.match(r"[A-Za-z $'-]*", after)[0].lower())[:3]
    for end in (-1, 0):
        while words and words[end] in _STOP_WORDS:
            words.pop(end)
    name = "_".join(words) or ("dollars" if before.endswith("$") else "value")
    name = f"{name}_1" if name in _PYTHON_NAMES else name
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique)
    return unique
