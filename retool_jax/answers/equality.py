"""Whether two values are equal: exactly if possible, else to hundreds of digits, but never within a tolerance.

Expressions with unknowns are compared at points. Both sides must agree at positive points, and at other points if all
parts of both are real. So the root of 1/n equals one over the root of n, but the root of x squared does not equal x.
"""

import random

import sympy
from sympy.core.relational import Relational

from retool_jax.answers.reading import Group, Value

DIGITS = 300  # two numbers that agree in so many digits count as equal
_NUMBERS = random.Random(0)
_POINTS = [[sympy.Rational(_NUMBERS.randint(1, 3000), 997) for _ in range(8)] for _ in range(6)]
_SIGNS = [[1] * 8] * 3 + [[-1] * 8, [-1, 1] * 4, [1, -1] * 4]
_INTERVALS = ("()", "[]", "(]", "[)")


def equal(truth: Value, answer: Value) -> bool:
    """Whether an answer has the value of the truth. May raise anything that SymPy raises."""
    groups = [value for value in (truth, answer) if isinstance(value, Group)]
    if len(groups) == 2 and _equal_groups(*groups):
        return True
    if len(groups) == 1 and len(groups[0].items) == 1:  # SymPy's solve() gives [5]
        return equal(*(value.items[0] if isinstance(value, Group) else value for value in (truth, answer)))
    if groups and not _needs_sets(truth) and not _needs_sets(answer):
        return False
    if isinstance(truth, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return truth.shape == answer.shape and all(map(equal, truth.flat(), answer.flat()))
    if isinstance(truth, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _equal_expressions(truth, answer)
    if isinstance(truth, Relational) and isinstance(answer, Relational) and _equal_relations(truth, answer):
        return True
    if isinstance(truth, sympy.And) and isinstance(answer, sympy.And) and _match(truth.args, answer.args):
        return True
    return _equal_sets(truth, answer)


def _equal_groups(truth: Group, answer: Group) -> bool:
    """Sets and bare lists are compared in any order; tuples, also without brackets, and lists item by item."""
    if len(truth.items) != len(answer.items):
        return False
    kinds = truth.brackets, answer.brackets
    # `[...]` is also how Python shows a list of solutions.
    if kinds in [("U", "U"), *((one, other) for one in ("", "{}") for other in ("", "{}", "[]"))]:
        return _match(truth.items, answer.items)
    in_order = truth.brackets == answer.brackets or set(kinds) == {"", "()"}
    return in_order and all(map(equal, truth.items, answer.items))


def _match(truths: tuple[Value, ...], answers: tuple[Value, ...]) -> bool:
    """Whether truths and answers can be paired so that each pair is equal and none is left."""
    left = list(answers)
    for truth in truths:
        place = next((place for place, answer in enumerate(left) if equal(truth, answer)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _equal_expressions(truth: sympy.Expr, answer: sympy.Expr) -> bool:
    if truth.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) or answer.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return truth == answer and not truth.has(sympy.nan)
    symbols = _symbols(truth, answer)
    if truth == answer or not symbols:
        return _is_zero(truth - answer)
    agreed = 0
    for values, signs in zip(_POINTS, _SIGNS, strict=True):
        point = dict(zip(symbols, (v * s for v, s in zip(values, signs, strict=True)), strict=False))
        one, other = truth.xreplace(point), answer.xreplace(point)
        if not (one.evalf().is_finite and other.evalf().is_finite):
            continue
        if -1 in signs and not (_is_real(truth, point) and _is_real(answer, point)):
            continue
        if not _is_zero(one - other):
            return False
        agreed += 1
    return agreed > 1


def _is_real(value: sympy.Expr, point: dict[sympy.Symbol, sympy.Rational]) -> bool:
    """Whether a value is real at a point, including all roots and logarithms in it."""
    bases = [part.args[0] for part in value.atoms(sympy.log)]
    bases += [power.base for power in value.atoms(sympy.Pow) if not power.exp.is_integer]
    return bool(value.xreplace(point).evalf().is_real) and all(
        base.xreplace(point).evalf().is_nonnegative for base in bases
    )


def _symbols(*values: sympy.Basic) -> list[sympy.Symbol]:
    """The first eight symbols, as a point has eight numbers. Expressions with more symbols never count as equal."""
    return sorted(set().union(*(value.free_symbols for value in values)), key=lambda symbol: symbol.name)[:8]


def _is_zero(number: sympy.Expr) -> bool:
    """Whether a number is 0: exactly for a rational number; for others, if no digit can be shown to differ from 0."""
    if number.is_Rational:
        return number == 0
    parts = number.evalf(15, maxn=DIGITS).as_real_imag()
    return all(part == 0 or (part.is_Float and part._prec == 1) for part in parts)  # 1: no digit is certain


def _equal_relations(truth: Relational, answer: Relational) -> bool:
    """Whether one is a multiple of the other, by a positive factor for inequalities."""
    if isinstance(truth, sympy.Eq | sympy.Ne):
        sides = [sympy.fraction(sympy.together(relation.lhs - relation.rhs))[0] for relation in (truth, answer)]
        same_kind = type(truth) is type(answer)
    else:
        same_kind = answer.func in (truth.func, truth.reversed.func)
        sides = [relation.gts - relation.lts for relation in (truth, answer)] if same_kind else []
    if not same_kind or sides[0].free_symbols != sides[1].free_symbols or not sides[0].free_symbols:
        return False
    point = dict(zip(_symbols(*sides), _POINTS[0], strict=False))
    factor = sides[1].xreplace(point) / sides[0].xreplace(point)
    if not factor.evalf().is_finite or _is_zero(factor) or (factor.evalf() < 0 and hasattr(truth, "gts")):
        return False
    return _equal_expressions(sides[0] * factor, sides[1])


def _needs_sets(value: Value) -> bool:
    return not isinstance(value, Group | sympy.Expr | sympy.MatrixBase) or (
        isinstance(value, Group) and (value.brackets == "U" or any(map(_needs_sets, value.items)))
    )


def _equal_sets(truth: Value, answer: Value) -> bool:
    related = all(isinstance(value, Relational | sympy.And | sympy.Or) for value in (truth, answer))
    if related and truth.free_symbols != answer.free_symbols:  # x = 5 and y = 5
        return False
    sets = _as_set(truth), _as_set(answer)
    return None not in sets and (sets[0] == sets[1] or sets[0].symmetric_difference(sets[1]).is_empty is True)


def _as_set(value: Value) -> sympy.Set | None:
    """A set, union or interval, or the solutions of a relation in one unknown; None for other values."""
    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, Relational | sympy.And | sympy.Or):
        return value.as_set() if len(value.free_symbols) == 1 else None
    if not isinstance(value, Group):
        return None
    if value.brackets == "U":
        sets = [_as_set(item) for item in value.items]
        return None if None in sets else sympy.Union(*sets)
    if value.brackets == "{}":
        return sympy.FiniteSet(*value.items)
    if value.brackets in _INTERVALS and len(value.items) == 2:
        found = sympy.Interval(*value.items, value.brackets[0] == "(", value.brackets[1] == ")")
        return None if found.is_empty else found  # (5, 3) is a point
    return None
