"""One spelling for what means the same: typography, units and needless zeros taken away from an answer."""

import re
import unicodedata

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


def right_hand_side(equation: str) -> str:
    r"""The value an equation gives: 45 in `m + n = 45`; unchanged when it gives several, or says "not equal"."""
    value = equation.rpartition("=")[2]
    inside = value.count("{") != value.count("}")  # the sign of \sum_{k=1}
    if inside or re.search(r"[,;<>!:]|\\(?:not|ne|le|ge|approx|equiv|pmod)", equation):
        return equation
    return normalise(value)
