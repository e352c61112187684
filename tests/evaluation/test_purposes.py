"""The purposes of programs by the rules in a table of docs/behaviour.md; no program makes them raise."""

import re
import warnings
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.evaluation.purposes import LONGEST, NAMES, OTHER, RULES, UNPARSABLE, by_rules, classifier_named

PAGE = Path(__file__).resolve().parents[2] / "docs" / "behaviour.md"

PROGRAMS = {
    "verification": [
        "x = 12\nassert x % 6 == 0",
        "print(3**2 + 4**2 == 5**2)",
        "import math\nok = math.isclose(0.1 + 0.2, 0.3)\nprint('ok:', ok)",
        "print(f'{17 * 3 == 51}')",
        "print('yes' if 91 % 7 == 0 else 'no')",
        "if 2**10 > 10**3:\n    print('larger')\nelse:\n    print('smaller')",
        "import sympy as sp\nx = sp.symbols('x')\nprint(sp.simplify(x + x - 2*x) == 0)",
        "from sympy import isprime\nprint(isprime(2027))",
        "print(all(n * n >= n for n in range(100)))",
        "def verify(n):\n    return n % 7\n\nprint(verify(91))",
        "print(not 3 in [1, 2])",
    ],
    "plotting": ["import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4])\nplt.savefig('a.png')"],
    "simulation": [
        "import random\nprint(sum(random.random() < 0.5 for _ in range(100)) / 100)",
        "import numpy as np\nprint(np.random.default_rng(0).normal(size=9).mean())",
        "from numpy.random import randint\nprint(randint(6))",
    ],
    "symbolic": [
        "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 2, x))",
        "import sympy as sp\nx = sp.Symbol('x')\nprint(sp.integrate(sp.sin(x), x))",
        "from sympy import *\nprint(limit(1, x, 0))",
        "from z3 import Int, Solver\ns = Solver()\ns.add(Int('x') > 3)\nprint(s)",
    ],
    "optimisation": [
        "from scipy.optimize import minimize\nprint(minimize(lambda x: x**2, 1).x)",
        "best = 0\nfor x in range(100):\n    v = x * (99 - x)\n    if v > best:\n        best = v\nprint(best)",
        "best = None\nfor x in range(9):\n    if best is None or x * x < best:\n        best = x * x\nprint(best)",
        "best = 0\nfor x in range(9):\n    best = max(best, x % 5)\nprint(best)",
        "print(max(x * (99 - x) for x in range(100)))",
        "print(min(range(9), key=lambda x: (x - 4) ** 2))",
    ],
    "counting": [
        "import math\nprint(math.comb(10, 3) * math.factorial(4))",
        "count = 0\nfor n in range(100):\n    if n % 7 == 3:\n        count += 1\nprint(count)",
        "print(sum(1 for n in range(100) if n % 7 == 3))",
        "print(sum(n % 7 == 3 for n in range(100)))",
        "print(len([n for n in range(100) if n % 7 == 3]))",
    ],
    "search": [
        "for a in range(1, 50):\n    for b in range(a, 50):\n        if a * b == 391:\n            print(a, b)",
        "print([n for n in range(100) if n % 7 == 3])",
        "for n in range(9):\n    if n > 4:\n        last = n * n\nprint(last)",
        "import itertools\nfor p in itertools.permutations('abc'):\n    print(p)",
        "print(next(n for n in range(100) if n % 7 == 3))",
        "n = 1\nwhile True:\n    if n % 7 == 3:\n        break\n    n += 1\nprint(n)",
    ],
    "numeric": [
        "import numpy as np\nprint(np.linalg.det(np.array([[1, 2], [3, 4]])))",
        "from scipy.integrate import quad\nprint(quad(lambda x: x, 0, 1)[0])",
    ],
    "calculation": [
        "print(12 * 34)",
        "import math\nprint(math.gcd(12, 18))",
        "a, b = 1, 1\nfor _ in range(10):\n    a, b = b, a + b\nprint(a)",
        "from sympy import factorint\nprint(factorint(2027))",
        "import numpy, random  # and neither is used\nprint(2**10)",
        "a, best = 3 * 2, 4\nif a > best:\n    best = a\nprint(best)",
        "x = -5\nif x < 0:\n    x = -x\nprint(x + 1)",
    ],
    "other": ["print('hello')", "x = 5\nprint(x)", "import math", "# nothing at all", "def f():\n    return 1"],
    "unparsable": ["print(", "What is 6?", "print 6", "  x = 1\ny = 2", "puts 6 if 1 end"],
}


@pytest.mark.parametrize(("purpose", "code"), [(name, code) for name, codes in PROGRAMS.items() for code in codes])
def test_a_program_has_the_purpose_of_the_first_rule_that_fits(purpose, code):
    assert by_rules(code) == purpose


def test_the_page_has_the_rules_in_their_order_and_every_purpose_has_a_program_here():
    table = PAGE.read_text().split("| purpose | rule |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert rows == [UNPARSABLE, *RULES, OTHER]
    assert sorted(rows) == sorted(NAMES) == sorted(PROGRAMS)


HOSTILE = {
    "NUL": "print(1)\x00",
    "half a pair": "print('\ud800')",
    "a long number": "print(" + "9" * 9_000 + ")",
    "a long number compared": f"for x in y:\n    if x > 0x{'f' * 9_000}:\n        x = 1",
    "brackets": "(" * 4_900 + ")" * 4_900,
    "lists": "[" * 150 + "]" * 150,
    "signs": "-" * 9_900 + "1",
    "negations": "not " * 2_400 + "x",
    "a long sum": "1" + "+1" * 4_900,
    "a long chain": "x" + ".x" * 4_900,
    "a long module": "import " + "a." * 4_900 + "a\na",
    "calls": "f" + "()" * 4_900,
    "a long or": "print(" + " or ".join(["x"] * 1_900) + ")",
    "a deep or": "print(" + "(x or " * 190 + "x" + ")" * 190 + ")",
    "lambdas": "lambda: " * 1_200 + "x",
    "branches": "x if y else " * 800 + "z",
    "elifs": "if x: pass\n" + "elif x: pass\n" * 700,
    "loops": "\n".join(" " * i + f"for x{i} in y:" for i in range(90)) + "\n" + " " * 90 + "pass",
    "compared chains in a loop": "for x in y:\n if " + "x" + "+x" * 4_000 + " > z:\n  z = 1",
    "too long": "x = 1\n" * 2_000,
    "much too long": "print(1)\n" * 1_000_000,
    "an escape": "print('\\d')",
    "a literal that is called": "1()",
    "blanks": " " * 9_900,
    "half a string": "'" * 9_999,
    "format": "f'" + "{" * 9_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_program_makes_the_rules_raise_or_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert by_rules(HOSTILE[name]) in NAMES
        assert by_rules("print('\\d' * 3)") == "calculation", "an escape that Python warns of"


def test_what_is_too_long_is_not_parsed():
    line = "x = 1\n"
    assert by_rules(line * (LONGEST // len(line))) == OTHER
    assert by_rules(line * (LONGEST // len(line) + 1)) == UNPARSABLE


def test_a_classifier_that_is_not_there_is_an_error_with_the_way_out():
    assert classifier_named("rules") is by_rules
    with pytest.raises(UserError, match=r"evaluation.purposes=rule is not rules or my_package.my_module:my_classifier"):
        classifier_named("rule")
    with pytest.raises(UserError, match=r"evaluation.purposes=nowhere:f cannot be loaded .* see that nowhere can be"):
        classifier_named("nowhere:f")
    with pytest.raises(UserError, match=r"evaluation.purposes=math:pi is no function; it must take a program"):
        classifier_named("math:pi")
