r"""Is the answer right? From the text of the policy's last turn to a verdict.

The answer is the content of the last `\boxed{...}` in that turn. Both sides are normalised (`042`, `1,000`,
`\text{42}`, `42^\circ` and `'42'` are ways to write a number). Numbers are compared exactly, without floats or
tolerance, and other expressions by SymPy in processes with limits (`retool_jax.answers.workers`). `docs/answers.md`
lists the decisions for doubtful cases.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial

from retool_jax.answers import workers
from retool_jax.answers.extract import extract_boxed
from retool_jax.answers.normalise import FUNCTIONS, GREEK, normalise
from retool_jax.answers.statements import align
from retool_jax.answers.symbolic import Outcome
from retool_jax.errors import UserError

MAX_ANSWER = 1000  # characters in the box; below the 4300 digits at which int() raises
MAX_SYMBOLIC = 300  # characters that SymPy has to read; the longest answer of MATH-500 has 159

TIMEOUT, LOST = "timeout", "checker_lost"  # reasons of verdicts that other code counts
_OPEN = "open"
_REASONS = {
    Outcome.EQUAL: "symbolic",
    Outcome.DIFFERENT: "mismatch",
    Outcome.UNDECIDED: "undecided",
    Outcome.TIMEOUT: TIMEOUT,
    Outcome.LATE: TIMEOUT,
    Outcome.LOST: LOST,
}
_normalised_truth = lru_cache(maxsize=65536)(partial(normalise, named=True))


@dataclass(frozen=True)
class Verdict:
    r"""The result of the checker.

    Attributes:
        correct: the answer equals the ground truth.
        answer: the normalised content of the box, None without a box. Equal answers mostly have equal strings, so it
            can be counted for majority votes.
        reason: why. If correct: `integer`, `rational`, `text` or `symbolic` (how the two are equal). If not:
            `mismatch`; `no_box`, `unterminated_box`, `empty_box`; `too_long` (over `MAX_ANSWER`); `refused` (not the
            same text, and too costly to compare: long, a power tower, a factorial, a sum); `undecided` (SymPy failed);
            `timeout` (the comparison ran out of time or memory). `checker_lost` is a fault of the machinery, and says
            nothing about the answer.
    """

    correct: bool
    answer: str | None
    reason: str


def check(final_text: str, ground_truth: str) -> Verdict:
    """Compare the answer in `final_text` with `ground_truth`. No text of the policy raises an exception.

    Args:
        final_text: the last policy turn: only text that the policy sampled after the last tool response.
        ground_truth: the true answer, without a box.

    Raises:
        UserError: the process that compares expressions does not work here.
    """
    (verdict,) = check_all([(final_text, ground_truth)])
    if verdict.reason == LOST:
        raise UserError(f"the answer checker was lost ({workers.pool.fault}); start the same command again")
    return verdict


def check_all(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """`check` for many pairs of (final text, ground truth); some verdicts may be `checker_lost`.

    Raises:
        UserError: math-verify cannot be imported.
    """
    found = [_check_without_sympy(text, truth) for text, truth in pairs]
    verdicts = [verdict for verdict, _ in found]
    open_pairs = {i: (truth, verdict.answer) for i, (verdict, truth) in enumerate(found) if verdict.reason == _OPEN}
    outcomes = workers.pool.compare(open_pairs.values())
    for index, pair in open_pairs.items():
        outcome = outcomes[pair]
        verdicts[index] = Verdict(outcome is Outcome.EQUAL, verdicts[index].answer, _REASONS[outcome])
    return verdicts


def _check_without_sympy(final_text: str, ground_truth: str) -> tuple[Verdict, str]:
    """The verdict (its reason is `open` if only SymPy can decide), and the truth to compare its answer with."""
    content, reason = extract_boxed(final_text)
    if content is None:
        return Verdict(False, None, reason), ground_truth
    if len(content) > MAX_ANSWER:
        return Verdict(False, content[:MAX_ANSWER], "too_long"), ground_truth
    answer, truth = normalise(content, named=True), _normalised_truth(ground_truth)
    if any(sign in text for text in (answer, truth) for sign in ("=", r"\in")):
        answer, truth = align(answer, truth)
    if not answer:
        return Verdict(False, answer, "empty_box"), truth
    shares = [_PER_CENT.search(text) for text in (content, ground_truth)]
    if any(shares):
        return _compare_shares(answer, truth, shares), truth
    return _compare(answer, truth), truth


def _compare(answer: str, truth: str) -> Verdict:
    """The verdict on a normalised answer and truth; cheap comparisons come first."""
    left, right = _number(answer), _number(truth)
    if left is not None and right is not None:
        exact = "integer" if isinstance(right, int) else "rational"
        return Verdict(left == right, answer, exact if left == right else "mismatch")
    if _text_key(answer) == _text_key(truth) or _PRINTED.get(answer) == truth:
        return Verdict(True, answer, "text")
    if _is_text(answer) or _is_text(truth):
        same = answer.casefold() == truth.casefold() and len(truth) > 1 and not truth.isupper()
        return Verdict(same, answer, "text" if same else "mismatch")
    return Verdict(False, answer, "refused" if _is_costly(answer) or _is_costly(truth) else _OPEN)


def _compare_shares(answer: str, truth: str, shares: Sequence[re.Match | None]) -> Verdict:
    r"""The verdict if a side has per cent: 50\% equals both 50 and one half, but `50 per cent` equals only one half."""
    texts = [re.sub(r"\s*per\s?cent$", "", text) for text in (answer, truth)]
    left, right = map(_number, texts)
    if all(shares) or left is None or right is None:
        return _compare(*texts)
    if Fraction(left, 100 if shares[0] else 1) == Fraction(right, 100 if shares[1] else 1):
        return Verdict(True, answer, "rational")
    by_sign = next(filter(None, shares))["sign"]
    return _compare(*texts) if by_sign else Verdict(False, answer, "mismatch")


# --- comparison -------------------------------------------------------------------------------------------------------

_PER_CENT = re.compile(r"(?:(?P<sign>\\?%)|per\s?cent)[\s}.$]*$")
_PRINTED = {"pi": r"\pi", "E": "e", "I": "i", "oo": r"\infty"}  # SymPy's names for constants, as a whole answer
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]{1,3})?")
_RECURRING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))")
_FRAC = r"\\frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
_RATIO = re.compile(rf"([+-]?)\s*(?:(-?[0-9]+)\s*/\s*([0-9]+)|{_FRAC})")
# 3 1/2. A space before three digits can be a thousands separator.
_MIXED = re.compile(rf"(-?)([0-9]+)(?:\s+([0-9]{{1,2}})\s*/\s*([0-9]+)|\s*{_FRAC})")
_COMMAND = re.compile(
    r"\\(?:begin|end|operatorname)\*?\s*\{\w+\*?\}|\\[a-zA-Z]+"
    rf"|(?<![a-zA-Z])(?:Interval\.[LR]?open|{'|'.join((*FUNCTIONS, *GREEK))})(?![a-zA-Z])"
)
_COSTLY = re.compile(r"!|\\(?:sum|prod|i*int|lim|uparrow)(?![a-zA-Z])|(?:\^\s*\{?|[0-9]e)\s*[-+]?[0-9]{5}")
_TOWER = re.compile(r"\^\s*(?:\{(?:[^{}]|\{[^{}]*\})*\^|\((?:[^()]|\([^()]*\))*\^|[^\s{(]\s*\^)")
_SMALL_POWER = re.compile(r"[a-zA-Z]\s*\^\s*(?:[2-9](?![0-9])|\{[2-9]\})")  # e^{-x^2} is not a tower


def _number(text: str) -> int | Fraction | None:
    """The value of a normalised integer, decimal, fraction or mixed number, exactly; None for anything else."""
    if len(text) > MAX_ANSWER:
        return None
    if plain := _DECIMAL.fullmatch(text):
        value = Fraction(text) if plain[1] or plain[2] else int(text)
    elif recurring := _RECURRING.fullmatch(text):
        sign, whole, part, *repeated = recurring.groups()
        digits = repeated[0] or repeated[1]
        value = (int((whole + part) or 0) + Fraction(int(digits), 10 ** len(digits) - 1)) / 10 ** len(part)
        value = -value if sign else value
    elif mixed := _MIXED.fullmatch(text):
        whole, over, under = (int(group) for group in mixed.groups()[1:] if group is not None)
        if not 0 <= over < under:
            return None
        value = (whole + Fraction(over, under)) * (-1 if mixed[1] else 1)
    elif ratio := _RATIO.fullmatch(text):
        over, under = (int(group) for group in ratio.groups()[1:] if group is not None)
        if under == 0:
            return None
        value = Fraction(-over if ratio[1] == "-" else over, under)
    else:
        return None
    return value.numerator if value.denominator == 1 else value


def _text_key(text: str) -> str:
    """`text` without spaces (but `4 5` is not 45) and braces that do not matter in LaTeX."""
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _is_text(text: str) -> bool:
    r"""Whether it is words, a name, or digits with a base. These are only equal as text."""
    words = text.isalpha() and text not in _PRINTED
    return words or bool(re.search(r"[a-zA-Z]{4}", _COMMAND.sub(" ", text)) or re.search(r"[0-9)}]\s*_", text))


def _is_costly(text: str) -> bool:
    """Whether SymPy must not compare it: it is long, or has operators that give a short text a huge value."""
    text = text.replace("**", "^")
    return len(text) > MAX_SYMBOLIC or bool(_COSTLY.search(text) or _TOWER.search(_SMALL_POWER.sub("x", text)))
