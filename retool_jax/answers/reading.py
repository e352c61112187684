r"""Read an answer's text, LaTeX or SymPy's own output, as SymPy objects.

Lists, tuples, sets, intervals and unions are taken apart here. Each remaining expression or relation is read by
math-verify's grammar (`latex2sympy2_extended`), or by Python's `ast` if it is Python as SymPy prints it
(`-1 + exp(16)`, `x**2/2`). Nothing is evaluated: only the names and calls that are listed below are read.
"""

import ast
import re
from dataclasses import dataclass

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.relational import Relational

from retool_jax.answers.normalise import FUNCTIONS, GREEK
from retool_jax.answers.statements import brackets_of, split

# units=False: with True the library treats any trailing m, g or d as a unit, so that 5d would equal 5.
_RULES = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_LETTERS_AS_WRITTEN = ConversionConfig(lowercase_symbols=False)  # or X would be x

_OTHER_NAMES = {"ln": "log", "abs": "Abs", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
_FUNCTIONS = {name: getattr(sympy, _OTHER_NAMES.get(name, name)) for name in FUNCTIONS}
_CONSTANTS = {"pi": sympy.pi, "E": sympy.E, "I": sympy.I, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}
_NAME = re.compile(rf"[a-zA-Z](_?[0-9]+)?|{'|'.join(GREEK)}")
_OPEN_ENDS = {"open": (True, True), "Lopen": (True, False), "Ropen": (False, True)}
_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
_PYTHON = re.compile(rf"[*]|[0-9]e[-+]?[0-9]|(?<![a-zA-Z])(?:{'|'.join(FUNCTIONS)}|pi|oo)(?![a-zA-Z])")
# 2pi, 3(x+1), pi r
_PRODUCT = re.compile(r"(?<=[0-9)])\s*(?=(?!e[-+]?[0-9])[a-zA-Z(])|(?<=[a-zA-Z])\s+(?=[a-zA-Z])")
_EXPONENT = re.compile(r"\^\s*\{([^{}]*)\}")  # as in e^{2pi}, a mix of LaTeX and Python
_ANGLE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
# Text that the library would misread: it drops primes and dots, and reads the letters of words as factors.
_UNREADABLE = re.compile(r"['!]|\\(?:pmod|bmod|mod|equiv|approx|sim|text|[lc]?dots|[hv]?phantom)(?![a-zA-Z])")
_ARGUMENTS = re.compile(r"(?:\\[a-zA-Z]+\s*(?:\[[^][{}]*\])?|[_^])\s*(?:\{[^{}]*\}\s*)+|\\log\s*_\s*[0-9a-zA-Z]")
# The library adds two numbers side by side, as in 1\frac{4}{5}, even in the forms 4 5, 5(6) and {5}{6}.
_SIDE_BY_SIDE = re.compile(
    r"[0-9]\s+[0-9]|[0-9]\s*[)}\]]+\s*[0-9]|[0-9]\s*[)}\]]*\s*(?:[({\[]\s*[-+]?[0-9][0-9./\s]*[)}\]]|\\d?binom)"
)
# { x | x > 3 }: the numbers that satisfy a condition.
_BUILT = re.compile(
    r"\s*(?P<name>[a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{R\})?\s*(?:\\mid|\\colon|\\vert|:|\|)(?P<condition>.+)"
)
_EITHER = re.compile(r"\\(pm|mp)(?![a-zA-Z])")


@dataclass(frozen=True)
class Group:
    """Several values: `brackets` is `()`, `[)` and so on, `{}` for a set, empty for a bare list, `U` for a union."""

    brackets: str
    items: tuple["Value", ...]


Value = Group | sympy.Basic | sympy.MatrixBase


def read(text: str) -> Value:
    """The value of a normalised text. Raises some exception if it cannot be read."""
    for word, join in (("or", sympy.Or), ("and", sympy.And)):
        if len(parts := split(text, rf"(?<![a-zA-Z\\]){word}(?![a-zA-Z])")) > 1:
            return _joined(join, parts)
    if len(parts := split(text, r"\\(?:big)?cup(?![a-zA-Z])")) > 1:
        return Group("U", tuple(map(read, parts)))
    if len(parts := split(text, "[,;]")) > 1:
        return Group("", tuple(value for part in parts for value in _flat(read(part))))
    if brackets := brackets_of(text):
        content = text.replace(r"\{", "{").replace(r"\}", "}")[1:-1]
        if brackets == "{}" and (built := _BUILT.fullmatch(content)):
            return _joined(sympy.And, [built["condition"]], built["name"])
        inside = split(content, "[,;]")
        if len(inside) > 1 or brackets == "{}":
            return Group(brackets, tuple(value for part in inside for value in _flat(read(part))))
    return _expression(text)


def _joined(join: type[sympy.Or] | type[sympy.And], parts: list[str], name: str | None = None) -> sympy.Basic:
    """`x < 2 or x > 3` as one condition on a single unknown, whose name must be `name` if that is given."""
    values = [read(part) for part in parts]
    if not all(isinstance(value, Relational | sympy.And | sympy.Or) for value in values):
        raise ValueError(f"no conditions: {parts}")
    unknowns = {symbol.name for value in values for symbol in value.free_symbols}
    if len(unknowns) != 1 or (name and unknowns != {name}):
        raise ValueError(f"conditions on {unknowns}: {parts}")
    return join(*values)


def _flat(value: Value) -> tuple[Value, ...]:
    r"""The items of a bare list, such as the two values of `1 \pm 2`, to be added to the group around it."""
    return value.items if isinstance(value, Group) and not value.brackets else (value,)


def _expression(text: str) -> Value:
    if "\\" not in text and _PYTHON.search(text):
        try:
            source = _PRODUCT.sub("*", _EXPONENT.sub(r"**(\1)", text.strip()).replace("^", "**"))
            return _python(ast.parse(source, mode="eval").body, source)
        except (SyntaxError, KeyError, TypeError, ValueError):
            pass  # it can still be LaTeX
    if signs := _EITHER.findall(text):
        if len(signs) > 1:
            raise ValueError(f"it is unknown which signs go together: {text}")
        return Group("", (_expression(_EITHER.sub("+", text)), _expression(_EITHER.sub("-", text))))
    if _UNREADABLE.search(text) or _SIDE_BY_SIDE.search(_without_arguments(text)):
        raise ValueError(f"no expression: {text}")
    return _exact(
        latex2sympy(
            _ANGLE.sub(r"(\\frac{\1\\pi}{180})", text),
            is_real=None,
            normalization_config=_RULES,
            conversion_config=_LETTERS_AS_WRITTEN,
        )
    )


def _without_arguments(text: str) -> str:
    """The text with an `x` in place of every command with arguments."""
    while (shorter := _ARGUMENTS.sub("x", text)) != text:
        text = shorter
    return text


def _exact(value: sympy.Basic | sympy.MatrixBase) -> sympy.Basic | sympy.MatrixBase:
    """The value with decimals as exact fractions, `i` as the imaginary unit, and unknown functions as symbols."""
    known = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    known |= {applied: sympy.Symbol(str(applied)) for applied in value.atoms(sympy.core.function.AppliedUndef)}
    known |= {symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"}
    return value.xreplace(known).doit()


def _python(node: ast.expr, source: str) -> Value:
    match node:
        case ast.Constant(value=int()) if not isinstance(node.value, bool):
            return sympy.Integer(node.value)
        case ast.Constant(value=float()):
            return sympy.Rational(ast.get_source_segment(source, node))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Name(id=name) if _NAME.fullmatch(name):
            return sympy.Symbol(re.sub(r"(?<=[a-zA-Z])_?(?=[0-9])", "_", name))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _python(operand, source)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_python(left, source), _python(right, source))
        case ast.Call(func=ast.Name(id="Matrix"), args=[ast.List(elts=rows)], keywords=[]):
            return sympy.Matrix([_python(row, source).items for row in rows])
        case ast.Call(func=ast.Attribute(value=ast.Name(id="Interval"), attr=ends), args=[low, high], keywords=[]):
            left_open, right_open = _OPEN_ENDS[ends]
            return sympy.Interval(_python(low, source), _python(high, source), left_open, right_open)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _FUNCTIONS[name](*(_python(argument, source) for argument in arguments))
        case ast.List(elts=items):
            return Group("[]", tuple(_python(item, source) for item in items))
    raise ValueError(f"not what SymPy prints: {ast.dump(node)[:100]}")
