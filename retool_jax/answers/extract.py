r"""Which part of a policy's words is its answer: what stands in the last `\boxed{...}`."""

import re

_CALL = re.compile(r"<(tool_call|code)>.*?(?:</\1>|\Z)", re.DOTALL)  # a call cut short by the length limit is a call
_BOX = re.compile(r"\\boxed\s*(?:\{|\Z)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\\.` first: an escaped brace is a character of the answer
# Between two boxes that give one answer together, the second with a name or without; without signs of mathematics, and
# with single spaces, since a policy may write thousands.
_JOINT = re.compile(r"(?:,|;|(?:, ?)?(?:\\text ?\{ ?)?(?:and|or)\b(?: ?\})?|\\q?quad)(?: ?\\?[a-zA-Z]\w* ?=)?")
_SIGNS = re.compile(r"\$|\\[()\[\]]")


def extract_boxed(text: str) -> tuple[str | None, str]:
    r"""The content of the last `\boxed{...}` that is an answer, and `boxed`, `no_box` or `unterminated_box`.

    Thinking (up to the last `</think>`, or from a `<think>` that is never closed) and tool calls (`<tool_call>`,
    `<code>`) are not part of the answer. When the last box has no end, an earlier one does not stand in for it. Boxes
    with nothing but a comma, "and" or "or" between them are one list.
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
    """Where the brace stands that closes a box, None when none does before the limit."""
    depth = 1
    for brace in _BRACE.finditer(text, begin, limit):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None
