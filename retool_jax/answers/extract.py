r"""Which part of a policy's words is its answer: what stands in the last `\boxed{...}`."""

import re

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
