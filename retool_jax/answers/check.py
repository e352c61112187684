r"""Is the answer right? From the text of the policy's last turn to a verdict.

The answer is what stands in the last `\boxed{...}` of that turn, wherever it stands there. Both sides are normalised
(`042`, `1,000`, `\text{42}`, `42^\circ` and `'42'` are ways to write a number); numbers are compared exactly, without
floats or tolerance; other expressions by math-verify in processes with limits (`retool_jax.answers.workers`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from retool_jax.answers import workers
from retool_jax.answers.extract import extract_boxed
from retool_jax.answers.normalise import normalise, right_hand_side
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
_normalised_truth = lru_cache(maxsize=65536)(normalise)


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
    verdicts = [_check_plainly(text, truth) for text, truth in pairs]
    asked = {i: (_normalised_truth(pairs[i][1]), v.answer) for i, v in enumerate(verdicts) if v.reason == _OPEN}
    outcomes = workers.pool.compare(asked.values())
    for index, pair in asked.items():
        outcome = outcomes[pair]
        verdicts[index] = Verdict(outcome is Outcome.EQUAL, verdicts[index].answer, _REASONS[outcome])
    return verdicts


def _check_plainly(final_text: str, ground_truth: str) -> Verdict:
    """The verdict, without SymPy; its reason is `open` where only that can tell."""
    content, reason = extract_boxed(final_text)
    if content is None:
        return Verdict(False, None, reason)
    if len(content) > MAX_ANSWER:
        return Verdict(False, content[:MAX_ANSWER], "too_long")
    answer, truth = normalise(content), _normalised_truth(ground_truth)
    if "=" in answer and "=" not in truth:
        answer = right_hand_side(answer)
    if not answer:
        return Verdict(False, answer, "empty_box")
    return _compare(answer, truth)


def _compare(answer: str, truth: str) -> Verdict:
    """The verdict on two normalised answers, from the cheapest comparison to the dearest."""
    left, right = _number(answer), _number(truth)
    if left is not None and right is not None:
        exact = "integer" if isinstance(right, int) else "rational"
        return Verdict(left == right, answer, exact if left == right else "mismatch")
    if _text_key(answer) == _text_key(truth):
        return Verdict(True, answer, "text")
    if _is_text(answer) or _is_text(truth):
        same = answer.casefold() == truth.casefold() and len(truth) > 1 and not truth.isupper()
        return Verdict(same, answer, "text" if same else "mismatch")
    return Verdict(False, answer, "refused" if _is_costly(answer) or _is_costly(truth) else _OPEN)


# --- comparison -------------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_RATIO = re.compile(
    r"([+-]?)\s*(?:(-?[0-9]+)\s*/\s*([0-9]+)"
    r"|\\frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9])))"
)
_COMMAND = re.compile(r"\\(?:begin|end|operatorname)\*?\s*\{\w+\*?\}|\\[a-zA-Z]+")
_COSTLY = re.compile(r"!|\\(?:sum|prod|i*int|lim|uparrow)(?![a-zA-Z])|\^\s*\{?\s*-?[0-9]{5}")
_TOWER = re.compile(r"\^\s*(?:\{(?:[^{}]|\{[^{}]*\})*\^|[^\s{]\s*\^)")
_SMALL_POWER = re.compile(r"[a-zA-Z]\s*\^\s*(?:[2-9](?![0-9])|\{[2-9]\})")  # e^{-x^2} is no tower


def _number(text: str) -> int | Fraction | None:
    """The value of a normalised integer, decimal or fraction, exactly; None for anything else."""
    if len(text) > MAX_ANSWER:
        return None
    plain = _PLAIN.fullmatch(text)
    if plain:
        return Fraction(text) if plain[1] else int(text)
    ratio = _RATIO.fullmatch(text)
    if not ratio:
        return None
    over, under = (int(group) for group in ratio.groups()[1:] if group is not None)
    if under == 0:
        return None
    value = Fraction(-over if ratio[1] == "-" else over, under)
    return value.numerator if value.denominator == 1 else value


def _text_key(text: str) -> str:
    """`text` without the spaces (but `4 5` is not 45) and braces that change nothing in LaTeX."""
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def _is_text(text: str) -> bool:
    r"""Words, names, and digits with a base: equal as text or not at all; math-verify takes `52_9` for `52_8`."""
    return text.isalpha() or bool(re.search(r"[a-zA-Z]{4}", _COMMAND.sub(" ", text)) or re.search(r"[0-9)}]\s*_", text))


def _is_costly(text: str) -> bool:
    """Whether SymPy should not be asked: long, or with operators that make huge values of short texts."""
    return len(text) > MAX_SYMBOLIC or bool(_COSTLY.search(text) or _TOWER.search(_SMALL_POWER.sub("x", text)))
