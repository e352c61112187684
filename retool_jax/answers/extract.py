r"""Find the answer in a policy's text: the content of the last `\boxed{...}`."""

import re

_CALL = re.compile(r"<(tool_call|code)>.*?(?:</\1>|\Z)", re.DOTALL)  # also one that the length limit cut off
_BOX = re.compile(r"\\boxed\s*(?:\{|\Z)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\\.` first: an escaped brace is a character of the answer
# The text between two boxes of one answer; the second box may have a name. It is matched after math delimiters are
# removed and spaces are joined, since a policy may write thousands of spaces.
_JOINT = re.compile(r"(?:,|;|(?:, ?)?(?:\\text ?\{ ?)?(?:and|or)\b(?: ?\})?|\\q?quad)(?: ?\\?[a-zA-Z]\w* ?=)?")
_SIGNS = re.compile(r"\$|\\[()\[\]]")


def extract_boxed(text: str) -> tuple[str | None, str]:
    r"""The content of the last `\boxed{...}` (or None), and `boxed`, `no_box` or `unterminated_box`.

    Thinking (up to the last `</think>`, or from a `<think>` that is never closed) and tool calls (`<tool_call>`,
    `<code>`) are ignored. If the last box has no end, an earlier box does not replace it. Boxes with only a comma,
    "and" or "or" between them are one list.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    text = _CALL.sub("", text)
    begins = [box.end() for box in _BOX.finditer(text)]
    if not begins:
        return None, "no_box"
    end = _end_of_box(text, begins[-1], len(text))
    if end is None:
        return None, "unterminated_box"
    contents = [text[begins[-1] : end]]
    for begin, following in zip(begins[-2::-1], begins[:0:-1], strict=True):
        end = _end_of_box(text, begin, following)
        if end is None:
            break
        between = _SIGNS.sub(" ", text[end + 1 : following].rpartition("\\boxed")[0])
        if not _JOINT.fullmatch(" ".join(between.split())):
            break
        contents.append(text[begin:end])
    return ", ".join(reversed(contents)), "boxed"


def _end_of_box(text: str, begin: int, limit: int) -> int | None:
    """The position of the brace that closes a box; None if there is none before the limit."""
    depth = 1
    for brace in _BRACE.finditer(text, begin, limit):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None
