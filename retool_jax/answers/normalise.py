"""One spelling for answers with the same meaning: typography, units and needless zeros are removed."""

import re
import unicodedata

_WRAPPER = (
    r"\\(?:text(?:bf|it|rm|sf|tt|up|sl|md|normal)?|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|pmb|emph|underline"
    r"|[mhf]box)"
)
_LENGTHS = "mm|cm|dm|km|in|ft|yd|mi|inch|inches|foot|feet|yards?|miles?|(?:centi|milli|kilo)?met(?:er|re)s?"
_AMOUNTS = "kg|mg|lb|lbs|oz|ounces?|pounds?|(?:kilo)?grams?|ml|lit(?:er|re)s?|gallons?|dollars?|cents?|euros?|units?"
_TIMES = "sec|secs|seconds?|min|mins|minutes?|hr|hrs|hours?|days?|weeks?|months?|years?|mph|degrees?|deg|radians?"
_WORDS = f"(?:{_LENGTHS}|{_AMOUNTS}|{_TIMES})"
_UNIT = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s*)?{_WORDS}(?:\s+(?:squared|cubed))?(?:\s*(?:/|per)\s*(?:{_WORDS}|[hs]))?"
_SHORT_UNIT = r"(?:[mgshLJNWVKC]|m/s)"  # only inside \text{}: a bare 5m is a product
_POWER = r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?"
# Words after a number that change its value, or make it one of several.
_CHANGING = (
    r"tens|hundreds?|thousands?|[a-z]*illions?|dozens?|score|couple|hal(?:f|ves)|thirds?|quarters?|first|second"
    r"|lakhs?|crores?|gross|grand|fold|mille"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million|[a-z]*teen|[a-z]*tie)ths?"
    r"|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|[a-z]+ty"
    r"|per ?cent(?:age)?s?|pct|ppm|permille|more|less|fewer|greater|larger|smaller|least|most|above|below|over|under"
    r"|between|about|around|almost|approximately|roughly|plus|minus|times|divided|by|up|down|or|and|not|but|if|when"
    r"|for|where|unless|except|mod(?:ulo)?|base|squared?|cubed?|factorial|choose|root|power|point|negative|remainder"
    r"|repeating|recurring|undefined|infinity|only|any|all|none|no|yes|true|false|am|pm|pi|i|each|both|either|neither"
    r"|maybe|perhaps|possibly|probably"
)
_NOUNS = rf"(?i:(?!(?:[a-z'-]+\s+)*(?:{_CHANGING})\b)[a-z][a-z'-]+(?:\s+[a-z][a-z'-]*){{0,5}})"

NAME = r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_(?:\w|\{\w+\}))?(?:\([\w,\s]*\))?"
# Functions that SymPy prints, and their usual other names.
FUNCTIONS = (
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "arcsin", "arccos", "arctan"),
    *("sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "cbrt", "root", "Abs", "abs", "binomial", "floor"),
    *("ceiling", "gamma", "zeta", "Rational", "Integer", "Matrix", "Eq", "Max", "Min", "re", "im", "conjugate"),
    *("Interval", "Union"),
)
GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "mu", "sigma", "phi", "omega", "rho", "tau")
_PLAIN = {"\u221e": r"\infty ", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": "/"}
_PLAIN |= {"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\neq ", "\u00b1": r"\pm ", "\u2208": r"\in "}
_PLAIN |= {"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u03d5": r"\phi "}

# A part of a list that is a condition, not a value: `or 3 < x`.
_COMPARED = r"[^,;]*?(?:[<>]|\\(?:[lg]e(?:q|qslant)?|[lg]t)(?![a-zA-Z]))"

# Applied in order. The lookbehinds keep the row break of a matrix, whose second backslash does not begin a command.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\s+", " "),  # first, so that no later rule looks for long runs
        (r"\\\\ ?\[ ?-?[0-9.]+ ?(?:pt|mm|cm|em|ex|in) ?\]", r"\\\\ "),  # space below a row of a matrix
        (r"\\[hv]?phantom ?\{[^{}]*\}|\\(?:text)?color ?\{[a-zA-Z!0-9]*\}", ""),
        (r"[\u2010-\u2015\u2212]", "-"),
        (r"[\u2018\u2019\u201c\u201d\u2032]", "'"),
        (r"\u221a\s*(?:\(([^()]*)\)|([0-9]+|[a-zA-Z]))", r"\\sqrt{\1\2}"),
        (r"(?<!\\)\\[()\[\]]|\\?\$|[\u00a2\u00a3\u00a5\u20ac]", ""),  # math delimiters and currency signs
        (r"(?<=[0-9])(?<![0-9]{4})(?:\{,\}|,\s*\\!\s*)(?=[0-9]{3}(?![0-9]))", ""),  # thousands, anywhere
        (r"\{,\}|,\s*\\!\s*", ","),
        (r"(?<!\\)\\(?:!|(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![a-zA-Z]))", ""),
        (rf"\s*,?\s*(?:(?<!\\)\\q?quad(?![a-zA-Z])\s*)+(?=(?:\\?(?:and|or)\s+)?{NAME}\s*=)", ", "),
        (r"(?:(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\s)+", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac ?(\\pi)(?![a-zA-Z]) ?", r"\\frac{\1}"),  # \frac\pi2
        (r"(\\frac ?(?:\{[^{}]*\}|[0-9a-zA-Z])) ?(\\pi)(?![a-zA-Z])", r"\1{\2}"),
        (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"(\\sqrt ?\[[^\[\]{}]*\]) ?([0-9a-zA-Z])", r"\1{\2}"),
        (r"(\\math(?:bb|cal|frak|scr)) ([0-9a-zA-Z])", r"\1{\2}"),
        (r"\\operatorname\*? ?\{ ?((?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|exp|log|ln) ?\}", r"\\\1 "),
        (r"\\(?:varnothing(?![a-zA-Z])|\{ ?\\\})", r"\\emptyset "),
        (r"\\not ?=", r"\\neq "),
        (r"\\[lr]brace(?![a-zA-Z])", lambda found: r"\{" if found[0][1] == "l" else r"\}"),
        (r"\\(?:langle|lparen)(?![a-zA-Z])", "("),
        (r"\\(?:rangle|rparen)(?![a-zA-Z])", ")"),
        (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
        (r"\\(?:land|wedge)(?![a-zA-Z])", " and "),
        (r"(?<=[a-zA-Z}\]]) ?\{ ?[0-9]{1,3}(?:,[0-9]{3})+ ?\}", lambda found: found[0].replace(",", "")),
        (r"^\( ?([0-9a-zA-Z]+) ?\) ?_", r"\1_"),  # (52)_8, and 52_{(8)}
        (r"_ ?\{? ?\( ?([0-9]+) ?\) ?\}?$", r"_\1"),
        (r"(?<!\.)[.\u3002]\s*$", ""),  # a full stop, but not an ellipsis; before the rules for the end of the text
        (
            rf"(?:(?<=[0-9}})\s])|(?<=\\pi))\s*{_WRAPPER}\s*\{{\s*(?:{_UNIT}|{_SHORT_UNIT}){_POWER}\s*\.?\s*\}}{_POWER}\s*$",
            "",
        ),
        (rf"(?:(?<=[0-9}}])|(?<=\\pi))\s*{_WRAPPER}\s*\{{\s*{_NOUNS}\s*\.?\s*\}}\s*$", ""),
        (rf"{_WRAPPER}\s*\{{([^{{}}]*)\}}", r"\1"),
        (rf"^{_WRAPPER}\s*\{{((?:[^{{}}]|\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})*)\}}$", r"\1"),  # around the whole text
        (rf"\s*(?:,\s*)?\b(?:and|or)\b\s*(?=[-+\\0-9(]|{NAME}\s*=)(?!{_COMPARED})", ", "),
        (r"\s*\\?%(?!\s*[0-9])", ""),
        (rf"(?:(?<=[0-9}})])|(?<=\\pi)(?![a-zA-Z]))\s*{_UNIT}{_POWER}\s*$", ""),
        (r"^([-+]?)\s*(?i:infinity)$", r"\1\\infty"),
        (rf"^([-+]?[0-9][0-9,.]*)\s+(?=[a-zA-Z]{{4}}){_NOUNS}\s*$", r"\1"),
        (r"^\s+|\s+$", ""),
        (r"^([\"'`])\s*([^\"'`]*)\s*\1$|^``([^\"'`]*)''$|^\{([^{}]*)\}$", r"\2\3\4"),  # quotes, needless braces
        (r"^(?:(?i:(?:the )?(?:final )?answer)\s*(?:is|=|:)|=)\s*", ""),
        (r"^\(([^(),;]*)\)$", r"\1"),  # the letter of a choice, or needless brackets
    ]
]
_LABEL = re.compile(rf"^{NAME}\s*(?:=|\\in(?![a-zA-Z]))\s*(?=[^=]*$)")
_DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|\u00b0|\\degrees?(?![a-zA-Z]))\s*(?:[CF]\b)?")
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
_THOUSANDS = re.compile(r"[+-]?\s*[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]*)?")
_DECIMAL = re.compile(r"([+-]?)\s*([0-9]*)(?:\.([0-9]*))?(?:_\{?10\}?)?")


def normalise(answer: str, named: bool = False) -> str:
    r"""One spelling for answers with the same meaning: `'\text{1{,}042}.'` and ` x = 01,042^\circ` both become `1042`.

    Removes typography (unicode variants, spacing and size commands, `$`, quotes, text wrappers, a full stop), names and
    measures (`x =`, degree sign, per cent sign, unit, what is counted), thousands separators, and needless zeros of
    decimals. A bare letter does not count as a unit. The left side of an equation is removed only if it is a single
    name, and never with `named`.
    """
    if _DECIMAL.fullmatch(answer):  # most answers; takes a few microseconds
        return _plain_decimal(answer)
    answer = _plain_characters(answer)
    for _ in range(4):  # wrappers, quotes and full stops can be nested
        before = answer
        for pattern, replacement in _REWRITES:
            answer = pattern.sub(replacement, answer)
        if not _TRIGONOMETRIC.search(answer):  # in sin 30^\circ the degree sign is part of the value
            answer = _DEGREE.sub("", answer)
        if not named:
            answer = _LABEL.sub("", answer)
        if answer == before:
            break
    if _THOUSANDS.fullmatch(answer):
        answer = re.sub(r"[,\s]", "", answer)
    return _plain_decimal(answer)


def _plain_characters(text: str) -> str:
    """NFKC that keeps exponents, indices and fractions: plain NFKC turns 10 squared into 102."""
    if text.isascii():
        return text
    text = re.sub("[\u00ba\u02da]", "\u00b0", text)  # look-alikes of the degree sign
    parts = []
    for character in text:
        kind, _, points = unicodedata.decomposition(character).partition(" ")
        if kind == "<font>":
            character = unicodedata.normalize("NFKC", character)
        if kind in ("<super>", "<sub>"):
            mark = "^" if kind == "<super>" else "_"
            plain = "".join(chr(int(point, 16)) for point in points.split())
            if parts and parts[-1].startswith(mark + "{"):  # another digit of the same exponent
                parts[-1] = parts[-1][:-1] + plain + "}"
            else:
                parts.append(f"{mark}{{{plain}}}")
        elif kind == "<fraction>":
            over, _, under = unicodedata.normalize("NFKC", character).partition("\u2044")
            parts.append(rf"\frac{{{over}}}{{{under}}}")
        elif name := re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(character, "")):
            parts.append("\\" + (name[2].lower() if name[1] == "SMALL" else name[2].capitalize()) + " ")
        else:
            parts.append(_PLAIN.get(character, character))
    return unicodedata.normalize("NFKC", "".join(parts))


def _plain_decimal(text: str) -> str:
    """A plain decimal with one form of sign, zeros and base: `+042.50` becomes `42.5`. Other text is unchanged."""
    match = _DECIMAL.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return text
    whole, part = match[2].lstrip("0") or "0", (match[3] or "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return "-" + number if match[1] == "-" and number != "0" else number
