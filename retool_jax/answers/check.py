r"""Is the answer right? From the text of the policy's last turn to a verdict.

The answer is what stands in the last `\boxed{...}` of that turn, wherever it stands there. Both sides are normalised
(`042`, `1,000`, `\text{42}`, `42^\circ` and `'42'` are ways to write a number); numbers are compared exactly, without
floats or tolerance; other expressions by math-verify in processes with limits (`retool_jax.answers.workers`).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from retool_jax.answers import workers
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
        answer = _right_hand_side(answer)
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


# --- finding the box --------------------------------------------------------------------------------------------------

_CALL = re.compile(r"<(tool_call|code)>.*?(?:</\1>|\Z)", re.DOTALL)  # a call cut short by the length limit is a call
_BOX = re.compile(r"\\boxed\s*(?:\{|\Z)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\\.` first: an escaped brace is a character of the answer


def extract_boxed(text: str) -> tuple[str | None, str]:
    r"""The content of the last `\boxed{...}` that is an answer, and `boxed`, `no_box` or `unterminated_box`.

    Thinking (up to the last `</think>`, or from a `<think>` that is never closed) and tool calls (`<tool_call>`,
    `<code>`) are not part of the answer. When the last box has no end, an earlier one does not stand in for it.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = _CALL.sub("", text)
    begins = [box.end() for box in _BOX.finditer(text)]
    if not begins:
        return None, "no_box"
    depth = 1
    for brace in _BRACE.finditer(text, begins[-1]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[begins[-1] : brace.start()], "boxed"
    return None, "unterminated_box"


# --- normalisation ----------------------------------------------------------------------------------------------------

_WRAPPER = r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox)"
_LENGTHS = "mm|cm|dm|km|in|ft|yd|mi|inch|inches|foot|feet|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?"
_AMOUNTS = "kg|mg|lb|lbs|oz|ounces?|pounds?|(?:kilo)?grams?|ml|lit(?:er|re)s?|gallons?|dollars?|cents?|euros?|units?"
_TIMES = "sec|secs|seconds?|min|mins|minutes?|hr|hrs|hours?|days?|weeks?|months?|years?|mph|degrees?|deg|radians?"
_WORDS = f"(?:{_LENGTHS}|{_AMOUNTS}|{_TIMES})"
_UNIT = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s*)?{_WORDS}(?:\s*(?:/|per)\s*{_WORDS})?"
_SHORT_UNIT = r"(?:[mgshLJNWVKC]|m/s)"  # only inside \text{}: a bare 5m is a product
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
_NAME = r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?(?:\([\w,\s]*\))?"

# In order. A lookbehind keeps the row break of a matrix, whose second backslash begins no command.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[\u2010-\u2015\u2212]", "-"),
        (r"[\u2018\u2019\u201c\u201d\u2032]", "'"),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters and the currency sign
        (r"\{,\}|,\s*\\!\s*", ","),
        (r"(?<!\\)\\(?:!|(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![a-zA-Z]))", ""),
        (r"(?:(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\s)+", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (rf"(?<=[0-9}})\s])\s*{_WRAPPER}\s*\{{\s*(?:{_UNIT}|{_SHORT_UNIT}){_POWER}\s*\.?\s*\}}{_POWER}\s*$", ""),
        (rf"{_WRAPPER}\s*\{{([^{{}}]*)\}}", r"\1"),
        (r"\s*(?:,\s*)?\b(?:and|or)\b\s*(?=[-+\\0-9(])", ", "),
        (r"\s*\\?%", ""),
        (rf"(?<=[0-9}})])\s*{_UNIT}{_POWER}\s*$", ""),
        (r"(?<!\.)[.\u3002]\s*$", ""),  # a full stop, not the end of an ellipsis
        (r"^\s+|\s+$", ""),
        (r"^([\"'`])\s*([^\"'`]*)\s*\1$|^``([^\"'`]*)''$|^\{([^{}]*)\}$", r"\2\3\4"),  # quotes, idle braces
        (rf"^(?:{_NAME}\s*(?:=|\\in(?![a-zA-Z]))|(?i:(?:the )?(?:final )?answer)\s*(?:is|=|:)|=)\s*", ""),
        (r"^\(([A-Z])\)$", r"\1"),  # a multiple-choice letter
    ]
]
_DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|\u00b0|\\degrees?(?![a-zA-Z]))\s*(?:[CF]\b)?")
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
_THOUSANDS = re.compile(r"[+-]?\s*[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]*)?")
_DECIMAL = re.compile(r"([+-]?)\s*([0-9]*)(?:\.([0-9]*))?(?:_\{?10\}?)?")


def normalise(answer: str) -> str:
    r"""One spelling for what means the same: `'\text{1{,}042}.'` and ` x = 01,042^\circ` both become `1042`.

    Removes typography (unicode variants, spacing and size commands, `$`, quotes, text wrappers, a full stop), what
    names or measures the value (`x =`, degree sign, per cent sign, unit) and thousands separators; decimals lose
    needless zeros. A bare letter is not taken for a unit, and the left side of an equation goes only when it is a
    single name.
    """
    if _DECIMAL.fullmatch(answer):  # most answers: a few microseconds
        return _plain_decimal(answer)
    answer = _plain_characters(answer)
    for _ in range(4):  # wrappers, quotes and full stops stand inside each other
        before = answer
        for pattern, replacement in _REWRITES:
            answer = pattern.sub(replacement, answer)
        if not _TRIGONOMETRIC.search(answer):  # in sin 30^\circ the sign is part of the value
            answer = _DEGREE.sub("", answer)
        if answer == before:
            break
    if _THOUSANDS.fullmatch(answer):
        answer = re.sub(r"[,\s]", "", answer)
    return _plain_decimal(answer)


_normalised_truth = lru_cache(maxsize=65536)(normalise)


def _plain_characters(text: str) -> str:
    """NFKC, but what stands high, low or over a bar keeps its place: plain NFKC reads 10 squared as 102."""
    if text.isascii():
        return text
    text = re.sub("[\u00ba\u02da]", "\u00b0", text)  # look-alikes of the degree sign
    parts = []
    for character in text:
        kind, _, points = unicodedata.decomposition(character).partition(" ")
        if kind in ("<super>", "<sub>"):
            mark = "^" if kind == "<super>" else "_"
            plain = "".join(chr(int(point, 16)) for point in points.split())
            if parts and parts[-1].startswith(mark + "{"):  # one exponent of several digits
                parts[-1] = parts[-1][:-1] + plain + "}"
            else:
                parts.append(f"{mark}{{{plain}}}")
        elif kind == "<fraction>":
            over, _, under = unicodedata.normalize("NFKC", character).partition("\u2044")
            parts.append(rf"\frac{{{over}}}{{{under}}}")
        else:
            parts.append(character)
    return unicodedata.normalize("NFKC", "".join(parts))


def _plain_decimal(text: str) -> str:
    """Signs, zeros and the base of a plain decimal brought to one form: `+042.50` is `42.5`; other text unchanged."""
    match = _DECIMAL.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return text
    whole, part = match[2].lstrip("0") or "0", (match[3] or "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return "-" + number if match[1] == "-" and number != "0" else number


def _right_hand_side(equation: str) -> str:
    r"""The value an equation gives: 45 in `m + n = 45`; unchanged when it gives several, or says "not equal"."""
    value = equation.rpartition("=")[2]
    inside = value.count("{") != value.count("}")  # the sign of \sum_{k=1}
    if inside or re.search(r"[,;<>!:]|\\(?:not|ne|le|ge|approx|equiv|pmod)", equation):
        return equation
    return normalise(value)


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
