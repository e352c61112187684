r"""Is the answer right? From the text of the policy's last turn to a verdict.

The answer is what stands in the last `\boxed{...}` of that turn, wherever it stands there. Both sides are normalised
(`042`, `1,000`, `\text{42}`, `42^\circ` and `'42'` are ways to write a number); numbers are compared exactly, without
floats or tolerance; other expressions by SymPy in processes with limits (`retool_jax.answers.workers`). What was
decided where there is doubt stands in `docs/answers.md`.
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
MAX_SYMBOLIC = 300  # characters that SymPy is asked to read; the longest answer of MATH-500 has 159

TIMEOUT, LOST = "timeout", "checker_lost"  # reasons of verdicts that others count
_OPEN = "open"
_REASONS = {
    Outcome.EQUAL: "symbolic",
    Outcome.DIFFERENT: "mismatch",
    Outcome.UNDECIDED: "undecided",
    Outcome.TIMEOUT: TIMEOUT,
    Outcome.LATE: TIMEOUT,
    Outcome.LOST: LOST,
}
_named = lru_cache(maxsize=65536)(partial(normalise, named=True))


@dataclass(frozen=True)
class Verdict:
    r"""What the checker found.

    Attributes:
        correct: the answer equals the ground truth.
        answer: the normalised content of the box, None without a box. Equal answers mostly have equal strings, so it
            can be counted for majority votes.
        reason: why. When correct: `integer`, `rational`, `text` or `symbolic` (how the two are equal). When not:
            `mismatch`; `no_box`, `unterminated_box`, `empty_box`; `too_long` (over `MAX_ANSWER`); `refused` (not the
            same text, and too costly to compare: long, a power tower, a factorial, a sum); `undecided` (SymPy failed);
            `timeout` (the comparison ran out of time or memory). Nothing is known about an answer after
            `checker_lost`, a fault of the machinery.
    """

    correct: bool
    answer: str | None
    reason: str


def check(final_text: str, ground_truth: str) -> Verdict:
    """Compare the answer in `final_text` with `ground_truth`; no text of the policy's makes it raise.

    Args:
        final_text: the last policy turn: only what the policy sampled after the last tool response.
        ground_truth: the answer alone, without a box.

    Raises:
        UserError: the machinery that compares expressions does not work here.
    """
    (verdict,) = check_all([(final_text, ground_truth)])
    if verdict.reason == LOST:
        raise UserError(f"the answer checker was lost ({workers.pool.fault}); start the same command again")
    return verdict


def check_all(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """`check` of many (final text, ground truth) at once, some of which may be `checker_lost`.

    Raises:
        UserError: math-verify cannot be imported.
    """
    found = [_check_plainly(text, truth) for text, truth in pairs]
    verdicts = [verdict for verdict, _ in found]
    asked = {i: (truth, verdict.answer) for i, (verdict, truth) in enumerate(found) if verdict.reason == _OPEN}
    outcomes = workers.pool.compare(asked.values())
    for index, pair in asked.items():
        outcome = outcomes[pair]
        verdicts[index] = Verdict(outcome is Outcome.EQUAL, verdicts[index].answer, _REASONS[outcome])
    return verdicts


def _check_plainly(final_text: str, ground_truth: str) -> tuple[Verdict, str]:
    """The verdict, without SymPy, and the truth in the form of its answer; `open` where only SymPy can tell."""
    content, reason = extract_boxed(final_text)
    if content is None:
        return Verdict(False, None, reason), ground_truth
    if len(content) > MAX_ANSWER:
        return Verdict(False, content[:MAX_ANSWER], "too_long"), ground_truth
    answer, truth = normalise(content, named=True), _named(ground_truth)
    if any(sign in text for text in (answer, truth) for sign in ("=", r"\in")):
        answer, truth = align(answer, truth)
    if not answer:
        return Verdict(False, answer, "empty_box"), truth
    shares = [_PER_CENT.search(text) for text in (content, ground_truth)]
    if any(shares):
        return _compare_shares(answer, truth, shares), truth
    return _compare(answer, truth), truth


def _compare(answer: str, truth: str) -> Verdict:
    """The verdict on two normalised answers, from the cheapest comparison to the dearest."""
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
    r"""Where per cent are written: 50\% is 50 where per cent are asked for, and one half; in words it is one half."""
    texts = [re.sub(r"\s*per\s?cent$", "", text) for text in (answer, truth)]
    said, asked = map(_number, texts)
    if all(shares) or said is None or asked is None:
        return _compare(*texts)
    if Fraction(said, 100 if shares[0] else 1) == Fraction(asked, 100 if shares[1] else 1):
        return Verdict(True, answer, "rational")
    by_sign = next(filter(None, shares))["sign"]
    return _compare(*texts) if by_sign else Verdict(False, answer, "mismatch")


# --- comparison -------------------------------------------------------------------------------------------------------

_PER_CENT = re.compile(r"(?:(?P<sign>\\?%)|per\s?cent)[\s}.$]*$")
_PRINTED = {"pi": r"\pi", "E": "e", "I": "i", "oo": r"\infty"}  # by SymPy, when it is the whole answer
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[-+]?[0-9]{1,3})?")
_RECURRING = re.compile(r"(-?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))")
_FRAC = r"\\frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"
_RATIO = re.compile(rf"([+-]?)\s*(?:(-?[0-9]+)\s*/\s*([0-9]+)|{_FRAC})")
# 3 1/2; before three digits a space may divide thousands.
_MIXED = re.compile(rf"(-?)([0-9]+)(?:\s+([0-9]{{1,2}})\s*/\s*([0-9]+)|\s*{_FRAC})")
_COMMAND = re.compile(
    r"\\(?:begin|end|operatorname)\*?\s*\{\w+\*?\}|\\[a-zA-Z]+"
    rf"|(?<![a-zA-Z])(?:Interval\.[LR]?open|{'|'.join((*FUNCTIONS, *GREEK))})(?![a-zA-Z])"
)
_COSTLY = re.compile(r"!|\\(?:sum|prod|i*int|lim|uparrow)(?![a-zA-Z])|(?:\^\s*\{?|[0-9]e)\s*[-+]?[0-9]{5}")
_TOWER = re.compile(r"\^\s*(?:\{(?:[^{}]|\{[^{}]*\})*\^|\((?:[^()]|\([^()]*\))*\^|[^\s{(]\s*\^)")
_SMALL_POWER = re.compile(r"[a-zA-Z]\s*\^\s*(?:[2-9](?![0-9])|\{[2-9]\})")  # e^{-x^2} is no tower


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
    """`text` without the spaces (but `4 5` is not 45) and braces that change nothing in LaTeX."""
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _is_text(text: str) -> bool:
    r"""Words, names, and digits with a base: equal as text or not at all."""
    words = text.isalpha() and text not in _PRINTED
    return words or bool(re.search(r"[a-zA-Z]{4}", _COMMAND.sub(" ", text)) or re.search(r"[0-9)}]\s*_", text))


def _is_costly(text: str) -> bool:
    """Whether SymPy should not be asked: long, or with operators that make huge values of short texts."""
    text = text.replace("**", "^")
    return len(text) > MAX_SYMBOLIC or bool(_COSTLY.search(text) or _TOWER.search(_SMALL_POWER.sub("x", text)))
