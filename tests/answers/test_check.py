r"""The answer checker: which texts are right, which are not, why, and that nothing a policy writes can hang it."""

import json
import time

import pytest

from retool_jax.answers import check, check_all, normalise, workers
from retool_jax.answers.symbolic import Outcome

INTEGER, RATIONAL, TEXT, SYMBOLIC = "integer", "rational", "text", "symbolic"
MISMATCH, REFUSED = "mismatch", "refused"


# The content of the box, the truth, and the expected reason. None of these needs the worker.
NUMBERS = [
    ("42", "42", INTEGER),
    ("43", "42", MISMATCH),
    (" 42 ", "42", INTEGER),
    ("042", "42", INTEGER),
    ("33", "033", INTEGER),
    ("-3", "-3", INTEGER),
    ("3", "-3", MISMATCH),
    ("- 3", "-3", INTEGER),
    ("\u22123", "-3", INTEGER),
    ("\u20133", "-3", INTEGER),
    ("+5", "5", INTEGER),
    ("-0", "0", INTEGER),
    ("0", "10", MISMATCH),
    ("'42'", "42", INTEGER),
    ('"42"', "42", INTEGER),
    ("\u201842\u2019", "42", INTEGER),
    ("``42''", "42", INTEGER),
    ("1,000", "1000", INTEGER),
    ("8{,}556", "8556", INTEGER),
    (r"8\,556", "8556", INTEGER),
    (r"10,\!080", "10080", INTEGER),
    (r"11,\! 111,\! 111,\! 100", "11111111100", INTEGER),
    ("12 345", "12345", INTEGER),
    ("4 5", "45", MISMATCH),
    ("-1,234", "-1234", INTEGER),
    ("12,34", "1234", MISMATCH),
    (r"\text{42}", "42", INTEGER),
    (r"\mathbf{42}", "42", INTEGER),
    (r"\textbf{\text{42}}", "42", INTEGER),
    ("{42}", "42", INTEGER),
    ("$42$", "42", INTEGER),
    (r"\(42\)", "42", INTEGER),
    (r"\$32,\!348", "32348", INTEGER),
    ("42.", "42", INTEGER),
    ("'42.'", "42", INTEGER),
    (r"336^\circ", "336", INTEGER),
    ("336", r"336^\circ", INTEGER),
    (r"45^{\circ}", "45", INTEGER),
    ("45\u00b0", "45", INTEGER),
    (r"45\degree", "45", INTEGER),
    (r"100 ^\circ C", "100", INTEGER),
    (r"45\%", "45", INTEGER),
    (r"15\mbox{ cm}^2", "15", INTEGER),
    (r"864 \mbox{ inches}^2", "864", INTEGER),
    (r"5 \text{ m/s}", "5", INTEGER),
    ("12 square units", "12", INTEGER),
    (r"42 \text{ million}", "42", MISMATCH),
    ("x = 42", "42", INTEGER),
    (r"m + n = 42", "42", INTEGER),
    (r"f(2) = 6 \cdot 7 = 42", "42", INTEGER),
    (r"\text{Answer: } 42", "42", INTEGER),
    ("42 = x + 1", "42", MISMATCH),
    (r"x \neq 42", "42", MISMATCH),
    ("x != 42", "42", REFUSED),
    ("52_{10}", "52", INTEGER),
    ("\uff14\uff12", "42", INTEGER),
    ("10\u00b2", "102", MISMATCH),
    ("4\u2082", "42", MISMATCH),
    ("12345678901234567891", "12345678901234567891", INTEGER),
    ("12345678901234567890", "12345678901234567891", MISMATCH),
    ("1000000006", "1000000007", MISMATCH),
    ("42.0", "42", INTEGER),
    ("42.5", "42", MISMATCH),
    (".5", "0.50", RATIONAL),
    (r"\frac12", "0.5", RATIONAL),
    (r"\dfrac{2}{4}", r"\frac{1}{2}", RATIONAL),
    (r"-\frac{1}{2}", "-1/2", RATIONAL),
    (r"\frac{-1}{2}", "-1/2", RATIONAL),
    (r"\frac{84}{2}", "42", INTEGER),
    ("\u00bd", "1/2", RATIONAL),
    ("0.333333", r"\frac{1}{3}", MISMATCH),
    (".0000674", ".0000672", MISMATCH),
    (r"1\frac{4}{5}", r"\frac{9}{5}", RATIONAL),
    ("137 1/2", r"137 \frac{1}{2}", RATIONAL),
    ("-2 3/4", "-2.75", RATIONAL),
    (r"1\frac{1}{2}", "1 1/2", RATIONAL),
    ("3 1/2", r"\frac32", MISMATCH),
    ("3 5/2", "5.5", MISMATCH),
    ("12 345/346", "12345/346", MISMATCH),
    (r"\frac{5}{12} \text{ ways}.", r"\frac{5}{12}", RATIONAL),
    (r"\frac{3}{4}\text{ of the pie}.", "0.75", RATIONAL),
    (r"5\text{ m}.", "5", INTEGER),
    (r" 7 \text{ sq. ft.} .", "7", INTEGER),
    (r"5 \text{ million}.", "5", MISMATCH),
    ("1/0", "0", MISMATCH),
]

TEXTS = [
    ("Evelyn", r"\text{Evelyn}", TEXT),
    ("yes", "Yes", TEXT),
    ("NM", "MN", MISMATCH),
    ("mn", "MN", MISMATCH),
    ("X", "x", MISMATCH),
    (r"\text{(C)}", "C", TEXT),
    ("52_8", "52_{8}", TEXT),
    ("52_9", "52_8", MISMATCH),
    ("52", "52_8", MISMATCH),
    ("p-q", "p - q", TEXT),
    ("1 and -2", "1,-2", TEXT),
    (r"1 \text{ or } -2", "1,-2", TEXT),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", TEXT),
    ("y = 2x + 3", "2x+3", TEXT),
    ("AC", "AB = AC", MISMATCH),
    ("6", "4x + 3y = 6", MISMATCH),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{pmatrix} -1/3 \\\\\n2/3 \\end{pmatrix}", TEXT),
    ("9^{9^{9}}", "9", REFUSED),
    ("9^9^9", "9", REFUSED),
    ("2^{1000000000}", "0", REFUSED),
    (r"\sum_{k=1}^{10} k", "55", REFUSED),
    ("5!", "120", REFUSED),
    ("1+" * 200 + "1", "201", REFUSED),
    ("1999^{1999}", "1999^{1999}", TEXT),
    ("", "42", "empty_box"),
    (r"\text{ }", "42", "empty_box"),
    ("7" * 5000, "7", "too_long"),
    ("7" * 1000, "7" * 1000, INTEGER),
    ("'The final answer goes here.'", "42", MISMATCH),
]

# For the worker: (answer, truth, equal).
EXPRESSIONS = [
    ("40+5", "45", True),
    (r"\sqrt{2025}", "45", True),
    (r"2\sqrt{2}", r"\sqrt{8}", True),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    ("1 + x", "x+1", True),
    ("(x+1)(x-1)", "x^2-1", True),
    ("-2, 1", "1,-2", True),
    ("8x + 6y = 12", "4x + 3y = 6", True),
    (r"\begin{pmatrix} -\frac13 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", True),
    (r"\begin{pmatrix} -1/3 & 2/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", False),
    ("52_9", "52_8", False),
    ("52_8", "52", False),
    ("X", "x", False),
    ("12345678901234567890 + 1", "12345678901234567891", True),
    ("12345678901234567890 + 2", "12345678901234567891", False),
    ("4,3", "(3,4)", False),
    ("(3, 8/2)", "(3,4)", True),
    ("[3,4]", "(3,4]", False),
    (r"44 \text{ or } 45", "45", False),
    ("45, 46", "45", False),
    (r"\{44, 45\}", "45", False),
    ("5d", "5", False),
    ("5m", "5", False),
    (r"2.236", r"\sqrt{5}", False),
    ("10\u00b2", "100", True),
    ("{5}{6}*1", "30", False),
    ("x^{pi} + {5}{6}", r"x^\pi + 30", False),
    (r"\frac{0}{0}", "1", False),
    (r"\infty", "42", False),
    ("__import__('os').getpid()", "42", False),
]


@pytest.mark.parametrize(("box", "truth", "reason"), NUMBERS + TEXTS)
def test_comparison_without_the_worker(box, truth, reason, monkeypatch):
    monkeypatch.setattr(workers.pool, "compare", lambda pairs: dict.fromkeys(pairs, Outcome.DIFFERENT))
    verdict = check(rf"So the answer is \boxed{{{box}}}.", truth)
    assert (verdict.reason, verdict.correct) == (reason, reason in (INTEGER, RATIONAL, TEXT))


def test_plain_answers_never_reach_a_worker(monkeypatch):
    asked = []
    monkeypatch.setattr(workers.pool, "compare", lambda pairs: asked.extend(pairs))
    for box, truth, reason in [*NUMBERS, *TEXTS]:
        if reason in (INTEGER, RATIONAL, TEXT, REFUSED, "empty_box", "too_long"):
            check(rf"\boxed{{{box}}}", truth)
    assert asked == []


@pytest.mark.parametrize(("answer", "truth", "equal"), EXPRESSIONS)
def test_expressions_are_compared_by_value(answer, truth, equal):
    verdict = check(rf"\boxed{{{answer}}}", truth)
    assert (verdict.correct, verdict.reason) == (equal, SYMBOLIC if equal else MISMATCH)


def test_equal_answers_vote_together():
    assert {check(rf"\boxed{{{box}}}", "0").answer for box in ("42", "'042'", r"42^\circ", "x = 42.0")} == {"42"}


@pytest.mark.parametrize("box", [box for box, *_ in NUMBERS + TEXTS + EXPRESSIONS])
def test_normalise_is_idempotent(box):
    assert normalise(normalise(box)) == normalise(box)


def test_integer_path_costs_microseconds():
    texts = [rf"The answer is \boxed{{{number}}}." for number in range(2000)]
    begin = time.process_time()
    for text in texts:
        check(text, "42")
    assert (time.process_time() - begin) / len(texts) < 100e-6  # of the processor; it is about 4e-6


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        r"\boxed{" + "{" * 100_000,
        "<code>" * 20_000,
        "<think>" * 20_000,
        r"\boxed{" + "~" * 1000 + "}",
        r"\boxed{" + r"\text{" * 150 + "}" * 151,
        r"\boxed{" + "^{" * 140 + "}" * 141,
        r"\boxed{" + ", and " * 160 + "}",
        r"\boxed{1}, " * 9000,
        r"\boxed{1" + " " * 990 + "}",
        r"\boxed{1" + " a" * 490 + "}",
        r"\boxed{1\text{" + "word " * 190 + "}}",
        r"\boxed{" + "x=1," * 240 + "}",
        r"\boxed{" + "=(" * 490 + "}",
        r"\boxed{" + "f(x," * 240 + "=}",
        r"\boxed{=" + "9 " * 490 + "}",
        r"\boxed{" + r"\quad " * 160 + "}",
        r"\boxed{" + "x^(" * 300 + "}",
        r"\boxed{0." + "1" * 400 + r"\overline{" + "3" * 500 + "}}",
        r"\boxed{" + "\u03c0" * 990 + "}",
    ],
)
def test_hostile_text_is_cheap_to_reject(text, monkeypatch):
    monkeypatch.setattr(workers.pool, "compare", lambda pairs: dict.fromkeys(pairs, Outcome.DIFFERENT))
    begin = time.process_time()
    assert not check(text, "42").correct
    assert time.process_time() - begin < 0.5


def test_hostile_expressions_are_wrong_and_cost_their_own_time_alone(monkeypatch):
    """Power towers, huge calls, and nesting that is slow to parse; an ordinary comparison after them stays cheap."""
    assert workers.TIME_LIMIT <= 1.0
    monkeypatch.setattr(workers.pool, "time_limit", 0.4)
    boxes = ["2**3**2 * 9**9**9", "1e9999", "binomial(10**9, 10**8)", "(" * 90 + "x" + ")" * 90, "-" * 290 + "1", "1+1"]
    verdicts = check_all([(rf"\boxed{{{box}}}", "2") for box in boxes])
    assert [verdict.correct for verdict in verdicts] == [False] * 5 + [True]
    assert {verdict.reason for verdict in verdicts} <= {"refused", "timeout", "mismatch", "symbolic"}


# --- truths of data sets ----------------------------------------------------------------------------------------------

# Truths in the forms of MATH-500 and DeepMath. Texts on one line have the same meaning, and all lines differ.
TRUTHS = [
    # Numbers: plain, with separators, units, degrees, currencies, per cent signs; decimals, fractions, mixed numbers.
    ("7", "07", "x=7", r"7\%"),
    ("-7", "\u22127"),
    ("17",),
    ("70", r"70^\circ", r"70^{\circ}", r"\$70"),
    ("71", r"71\mbox{ cm}^2", r"71 \mbox{ inches}^2"),
    ("720",),
    (r"\$45,\!678", "45,678", r"45,\!678", "45678"),
    ("45,679",),
    (r"22,\! 333,\! 444,\! 500", "22333444500"),
    ("2025", "2{,}025"),
    (".0000543",),
    (".000543",),
    (r"\$27.60", "27.6"),
    (r"2.3 \text{ cents}", "2.3"),
    ("23",),
    (r"\frac{3}{4}", r"\frac 34", r"\frac34", r"\dfrac{6}{8}", ".75", "0.750"),
    (r"\frac{4}{3}", r"\frac43"),
    (r"-\frac{3}{4}",),
    (r"\frac7{19}", r"\frac{7}{19}", "7/19"),
    (r"\frac{719}{20}",),
    (r"\frac{290}7\text{ degrees}",),
    (r"1\frac{2}{5}",),
    (r"241 \frac{1}{2}",),
    ("34_5", "34_{5}"),
    ("34_6",),
    ("2716_8",),
    ("1777^{1777}",),
    # Constants, roots and powers.
    (r"\pi",),
    (r"2\pi", r"2 \pi"),
    (r"-\frac{\pi}{8}",),
    (r"\frac{10000}{\pi}",),
    (r"14+3\pi", r"14 + 3 \pi"),
    ("e",),
    ("e^3",),
    ("e^{-3}",),
    (r"\dfrac{1}{e}", r"\frac{1}{e}"),
    (r"-25e^2",),
    (r"\ln 5",),
    (r"-\infty",),
    (r"\infty",),
    (r"\sqrt{7}",),
    (r"-\sqrt{7}",),
    (r"\sqrt{77}",),
    (r"7\sqrt2",),
    (r"2 \sqrt{7}", r"2\sqrt{7}"),
    (r"\frac{5\sqrt{5}}{8}",),
    (r"1 \pm \sqrt{7}", r"1\pm\sqrt{7}"),
    (r"4 \pm 3 \sqrt{2}",),
    (r"\pm 2",),
    ("3 + 4i", "3+4i"),
    ("3 - 4i",),
    (r"5\pi i",),
    (r"\dbinom{77}{33}",),
    (r"\zeta_{10}",),
    # Expressions, functions, equations, inequalities.
    ("a",),
    ("A",),
    ("2k",),
    ("2k+3", "2k + 3"),
    ("3x^2-5x-28",),
    ("x^7 + x^5 + x^3 + x + 1",),
    ("(a+3)(b+4)",),
    ("4R^2",),
    (r"\frac{13+7a}{30}",),
    (r"\dfrac{kr}{m}", r"\frac{kr}{m}"),
    (r"\tan x",),
    ("p + q",),
    ("y = 3x + 4", "3x + 4"),
    ("y = -3x",),
    ("y = e^{C x}",),
    ("2x - 9y + 4z + 8 = 0", "2x-9y+4z+8=0"),
    ("AB = CD",),
    ("AB = DC",),
    (r"\alpha > 2",),
    (r"\alpha < 2",),
    (r"n \geq m",),
    (r"m \neq 3",),
    ("(30 - x)e^{-x}",),
    ("e^{-y^2/2}",),
    (r"O(n^4 \log k)",),
    ("aE(X) + cE(X^2)",),
    (r"\tan x^{\cot x} > \cot x^{\cot x} > \tan x^{\tan x}",),
    # Points, lists, sets, intervals, matrices.
    ("(3,5)", r"\left( 3, 5 \right)"),
    ("(5,3)",),
    ("(3,5]",),
    ("[3,5)",),
    ("[3,5]", r"x \in [3,5]"),
    (r"\{3,5\}",),
    ("3,5", "3, 5", r"3 \text{ and } 5"),
    ("(3,-5)",),
    ("(2,-18,-5,37)",),
    ("3, 5, 9",),
    (r"\{2\pm\sqrt{7},-3\}",),
    (r"\left( 5, \frac{\pi}{4} \right)", r"(5, \frac{\pi}{4})"),
    (r"\left( \frac{5}{2}, -11 \right)",),
    (r"(-\infty, 3]", r"\left(-\infty,3\right]"),
    (r"(-\infty, 3)",),
    (r"(3, \infty)",),
    (r"(-\infty, 3) \cup (5, \infty)", r"(-\infty,3)\cup(5,\infty)"),
    (r"(0,8) \cup (8,24)",),
    (r"(0,8) \cap (8,24)",),
    (r"\left[ \frac{\pi^2}{7}, \frac{4 \pi^2}{3} \right]",),
    (r"\begin{pmatrix} -2 \\ 7 \\ 1/3 \end{pmatrix}", "\\begin{pmatrix}-2\\\\\n7\\\\\n1/3\\end{pmatrix}"),
    (r"\begin{pmatrix} -2 & 7 & 1/3 \end{pmatrix}",),
    (r"\begin{pmatrix} 0 & -1 \\ 1 & 0 \end{pmatrix}",),
    (r"\begin{pmatrix} 0 & 1 \\ -1 & 0 \end{pmatrix}",),
    # Words and names.
    (r"\text{(D)}", "D", "(D)"),
    (r"\text{(F)}",),
    (r"\text{Marta}", "Marta"),
    (r"\text{Martha}",),
    (r"\text{west}", "west"),
    (r"\text{odd}",),
    ("Yes", "yes"),
    ("No",),
    ("True",),
    ("False",),
    ("MN",),
    ("U(0,2)",),
    (r"\mathbb{Z}",),
    (r"\mathbb{Z}_9",),
    (r"\mathbf{1}", "1"),
]


def boxed_correctly(truth: str, answer: str) -> bool:
    return check(rf"$$\boxed{{{answer}}}.$$", truth).correct


def test_truths_of_every_form_equal_their_other_spellings_and_nothing_else(monkeypatch):
    monkeypatch.setattr(workers.pool, "compare", lambda pairs: dict.fromkeys(pairs, Outcome.DIFFERENT))
    spellings = [(line, text) for line, group in enumerate(TRUTHS) for text in group]
    wrong = [
        (truth, answer)
        for line, truth in spellings
        for other, answer in spellings
        if boxed_correctly(truth, answer) != (line == other)
    ]
    assert wrong == []
    integers = [truth for _, truth in spellings if truth.isdigit()]
    assert len(integers) > 5
    assert [truth for truth in integers if boxed_correctly(truth, str(int(truth) + 1))] == []


def test_every_ground_truth_of_public_sets_equals_itself_and_not_its_successor(local_data, monkeypatch):
    monkeypatch.setattr(workers.pool, "compare", lambda pairs: dict.fromkeys(pairs, Outcome.DIFFERENT))
    for name, column, rows in [
        ("aime/AIME24.jsonl", "output", 30),
        ("aime/AIME25.jsonl", "output", 30),
        ("math500/math500.jsonl", "answer", 500),
        ("deepmath/deepmath_first600.jsonl", "answer", 600),
        ("dapo/dapo_math_17k_sample.jsonl", "reward_model", 28),
    ]:
        values = [json.loads(line)[column] for line in local_data(name).read_text().splitlines()]
        truths = [value["ground_truth"] if isinstance(value, dict) else value for value in values]
        assert len(truths) == rows
        assert [truth for truth in truths if not boxed_correctly(truth, truth)] == []
        integers = [truth for truth in truths if truth.isdigit()]
        assert [truth for truth in integers if boxed_correctly(truth, str(int(truth) + 1))] == []


def test_different_truths_of_math500_are_different(local_data):
    """A normalisation that removes too much makes answers of different problems equal."""
    spellings = {}
    for line in local_data("math500/math500.jsonl").read_text().splitlines():
        truth = json.loads(line)["answer"]
        spellings.setdefault(normalise(truth), set()).add(truth)
    assert {value: len(group) for value, group in spellings.items() if len(group) > 1} == {
        **{degrees: 2 for degrees in ("30", "90", "120")},
        "36": 3,  # plain, degrees, dollars
        "10080": 2,  # with and without a separator
        "15": 2,  # plain, square centimetres
        "5": 2,  # plain, x=5
    }
