"""What a program is for: one purpose for each program, from rules on its syntax tree or from a user's function.

In the ReTool paper (arXiv 2504.11536, on how code is used) a language model names the purpose of each program. Here the
first of `RULES` that fits decides, which takes microseconds and gives the same result in every run. docs/behaviour.md
says what the rules can see. `evaluation.purposes=my_package.my_module:my_classifier` replaces them with a function.
"""

import ast
import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from retool_jax.errors import UserError
from retool_jax.tools.toolbox import imported

Classifier = Callable[[str, str], str]  # from a program and all text before it to the name of its purpose

OTHER = "other"
UNPARSABLE = "unparsable"
FAILED = "failed"  # the user's classifier raised an exception
LONGEST = 10_000  # characters; longer programs are not parsed
# Limits, so that a user's classifier cannot add any number of names to a run's metrics.
MOST_NAMES = 24  # different names for a set of programs
NAME_LENGTH = 32  # characters of a name


# --- the facts that the rules use -------------------------------------------------------------------------------------


@dataclass
class Facts:
    """Facts about a program. A comprehension counts as a loop, and its filter as a condition in the loop."""

    modules: set[str] = field(default_factory=set)  # imported and used; for a submodule `numpy` and `numpy.random`
    calls: set[str] = field(default_factory=set)  # the last part of each called name
    attributes: set[str] = field(default_factory=set)
    asserts: bool = False
    prints_truth: bool = False  # prints whether something holds, as a boolean or in words
    keeps_best: bool = False  # takes max or min of many, or keeps the larger of two in a loop
    counts: bool = False  # adds one under a condition in a loop, or applies sum or len to a comprehension
    searches: bool = False  # has a condition in a loop
    computes: bool = False  # has an operation, a loop or a call of anything but print

    def uses(self, *modules: str) -> bool:
        return not self.modules.isdisjoint(modules)

    def calls_a(self, names: re.Pattern[str]) -> bool:
        return any(map(names.fullmatch, self.calls))


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LOOPS = (ast.For, ast.AsyncFor, ast.While, *_COMPREHENSIONS)
_ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
# Functions that return true or false.
_YES_OR_NO = re.compile(r"all|any|bool|(all|is)close|equals|is(prime|disjoint|subset|superset)|is_\w+|has_\w+")


def facts_of(tree: ast.Module) -> Facts:
    """One walk over a program, without recursion."""
    facts = Facts()
    imports: list[tuple[str, str]] = []  # a name, and the module or object that it is bound to
    loaded, truths = {"*"}, set()
    printed: list[ast.expr] = []
    # Node, whether it is in a loop, whether it is under a condition in a loop.
    remaining: list[tuple[ast.AST, bool, bool]] = [(tree, False, False)]
    while remaining:
        node, looping, conditional = remaining.pop()
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                loaded.add(node.id)
        elif isinstance(node, ast.Attribute):
            facts.attributes.add(node.attr)
        elif isinstance(node, ast.Call):
            name = _name_of(node.func)
            facts.calls.add(name)
            facts.computes |= name != "print"
            facts.keeps_best |= name in ("max", "min") and _of_many(node)
            facts.counts |= name in ("sum", "len") and _counts(node)
            if name == "print":
                printed += node.args
        elif isinstance(node, ast.Import):
            imports += [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Assert):
            facts.asserts = True
        elif isinstance(node, ast.Assign):
            if _is_truth(node.value):
                truths |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            facts.keeps_best |= looping and _keeps_larger(node)
        elif isinstance(node, ast.If):
            facts.searches |= looping
            facts.keeps_best |= looping and _replaces_smaller(node)
            facts.prints_truth |= not looping and _prints_words(node)
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            facts.computes = True
            facts.counts |= conditional and _adds_one(node)
        elif isinstance(node, ast.comprehension):
            facts.searches |= bool(node.ifs)
        facts.computes |= isinstance(node, _LOOPS)
        conditional |= looping and isinstance(node, ast.If)
        looping |= isinstance(node, _LOOPS)
        remaining += [(child, looping, conditional) for child in ast.iter_child_nodes(node)]
    facts.prints_truth |= any(_is_truth(value, truths) for value in printed)
    for name, module in imports:
        if name in loaded:
            parts = module.split(".", 2)
            facts.modules |= {parts[0], ".".join(parts[:2])}
    return facts


def _name_of(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _is_truth(value: ast.expr, truths: Collection[str] = ()) -> bool:
    """Whether an expression has the form of a boolean, or of a text with one; `truths` are variables that hold one."""
    match value:
        case ast.Compare() | ast.UnaryOp(op=ast.Not()) | ast.Constant(value=bool()):
            return True
        case ast.BoolOp(values=values):
            return all(_is_truth(part, truths) for part in values)
        case ast.Name(id=name):
            return name in truths
        case ast.Call(func=called):
            return bool(_YES_OR_NO.fullmatch(_name_of(called)))
        case ast.IfExp(body=ast.Constant(), orelse=ast.Constant()):
            return True
        case ast.JoinedStr(values=parts):
            return any(isinstance(part, ast.FormattedValue) and _is_truth(part.value, truths) for part in parts)
    return False


def _prints_words(node: ast.If) -> bool:
    """`if a == b: print("yes")`: the condition only decides what is printed."""
    match node.body:
        case [ast.Expr(value=ast.Call(func=ast.Name(id="print"), args=args))]:
            return bool(args) and all(isinstance(arg, ast.Constant) for arg in args)
    return False


def _of_many(call: ast.Call) -> bool:
    """`max(f(x) for x in ...)`, `min(many, key=f)`."""
    return any(isinstance(arg, _COMPREHENSIONS) for arg in call.args) or any(k.arg == "key" for k in call.keywords)


def _keeps_larger(node: ast.Assign) -> bool:
    """`best = max(best, x)`."""
    match node:
        case ast.Assign(targets=[ast.Name(id=kept)], value=ast.Call(func=ast.Name(id="max" | "min"), args=args)):
            return any(isinstance(arg, ast.Name) and arg.id == kept for arg in args)
    return False


def _replaces_smaller(node: ast.If) -> bool:
    """`if x > best: best = x`, also with further conditions."""
    tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
    sides = [
        {ast.unparse(test.left), ast.unparse(test.comparators[0])}
        for test in tests
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], _ORDERS)
    ]
    assigned = [
        {part.targets[0].id, ast.unparse(part.value)}
        for part in node.body
        if sides and isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name)
    ]
    return any(pair in sides for pair in assigned)


def _adds_one(node: ast.BinOp | ast.AugAssign) -> bool:
    """`count += 1`."""
    one = isinstance(node, ast.AugAssign) and isinstance(node.value, ast.Constant) and node.value.value == 1
    return one and isinstance(node.op, ast.Add)


def _counts(call: ast.Call) -> bool:
    """`sum(1 for x in many)`, `sum(x > 3 for x in many)`, `len([x for x in many if x > 3])`."""
    match call:
        case ast.Call(func=ast.Name(id="len"), args=[ast.ListComp() | ast.SetComp()]):
            return True
        case ast.Call(args=[ast.GeneratorExp(elt=part) | ast.ListComp(elt=part)]):
            return _is_truth(part) or (isinstance(part, ast.Constant) and part.value == 1)
    return False


# --- the rules --------------------------------------------------------------------------------------------------------

_PLOTS = ("matplotlib", "seaborn", "plotly", "turtle", "PIL")
_CHECKS = re.compile(r"(verif|check|valid)\w*")
_SYMBOLIC = re.compile(
    r"symbols|Symbol|var|Function|Eq|(lin|nonlin|n|d|r)?solve|solveset|roots|Poly|groebner"
    r"|resultant|integrate|diff|limit|series|summation|simplify|expand|factor|apart|together|cancel|sympify"
)
_OPTIMISES = re.compile(r"(minim|maxim)ize\w*|linprog|milp|differential_evolution|argm(ax|in)")
_COUNTS = re.compile(r"comb|perm|factorial|binom(ial)?|multinomial|Counter|npartitions|stirling|catalan")
_TRIES = re.compile(r"product|permutations|combinations\w*|next")


# The first rule that fits counts. Rules about a program's stated aim come before rules about its methods. The table in
# docs/behaviour.md says the same in words.
RULES: dict[str, Callable[[Facts], bool]] = {
    "verification": lambda f: f.asserts or f.prints_truth or (not f.searches and f.calls_a(_CHECKS)),
    "plotting": lambda f: f.uses(*_PLOTS),
    "simulation": lambda f: (
        f.uses("random", "secrets", "numpy.random") or (f.uses("numpy") and "random" in f.attributes)
    ),
    "symbolic": lambda f: f.uses("z3") or (f.uses("sympy") and f.calls_a(_SYMBOLIC)),
    "optimisation": lambda f: f.keeps_best or f.calls_a(_OPTIMISES) or f.uses("pulp", "cvxpy", "ortools"),
    "counting": lambda f: f.counts or f.calls_a(_COUNTS),
    "search": lambda f: f.searches or f.calls_a(_TRIES),
    "numeric": lambda f: f.uses("numpy", "scipy", "pandas", "mpmath"),
    "calculation": lambda f: f.computes,
}
NAMES = (*RULES, OTHER, UNPARSABLE)


def by_rules(code: str, context: str = "") -> str:
    """The purpose of a program by the first rule that fits; `other` if none does.

    A program is `unparsable` if it has a syntax error, is in another language or version of Python, is nested too deep,
    or is longer than `LONGEST`.
    """
    if len(code) > LONGEST:
        return UNPARSABLE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the program
            facts = facts_of(ast.parse(code))
    except Exception:  # SyntaxError, ValueError, RecursionError, MemoryError: a policy may write anything
        return UNPARSABLE
    return next((name for name, fits in RULES.items() if fits(facts)), OTHER)


# --- classifiers ------------------------------------------------------------------------------------------------------


def classifier_named(name: str) -> Classifier:
    """The function that `evaluation.purposes` chooses.

    Raises:
        UserError: there is no such function, or it cannot be loaded.
    """
    if name == "rules":
        return by_rules
    if ":" not in name:
        raise UserError(f"evaluation.purposes={name} is not rules or my_package.my_module:my_classifier")
    function = imported(name, "evaluation.purposes")
    if not callable(function):
        raise UserError(f"evaluation.purposes={name} is no function; it must take a program and what stands before it")
    return function


def purpose_of(classify: Classifier, code: str, context: str) -> str:
    """A classifier's name for a program, in the form of a metric's name; `failed` if it raises an exception."""
    try:
        name = classify(code, context)
    except Exception:  # from a user's function
        return FAILED
    if not isinstance(name, str):
        return OTHER
    return re.sub(r"[^a-z0-9]+", "_", name[: 4 * NAME_LENGTH].lower())[:NAME_LENGTH].strip("_") or OTHER
