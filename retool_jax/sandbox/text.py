"""The text that the model gets about a run."""

from collections.abc import Callable
from dataclasses import replace

from retool_jax.sandbox.types import ToolResult

NO_OUTPUT = "[no output: use print()]"
CUT = "\n[... characters removed ...]\n"  # without a count, which a policy could take for a number of the output
# The end of Python's message about a number of more than 4,300 digits. For a literal in the code Python has another
# message: code is parsed before it runs, so the call that helps would come too late there.
DIGITS_ERROR = "use sys.set_int_max_str_digits() to increase the limit"
DIGITS_HELP = "[to write longer numbers, begin with: import sys; sys.set_int_max_str_digits(0)]"
TRACEBACK = "Traceback (most recent call last)"
MAX_FRAMES = 3
MAX_ERROR_LINES = 10
SNIPPET_FRAME = '  File "<snippet'  # a session's later cells are <snippet 2> and so on
# At most so many characters of a text are measured per unit of room. Longer tokens are runs of white space.
CHARS_PER_UNIT = 16
SEARCH_STEPS = 8

Count = Callable[[str], int]


def encodable(text: str) -> str:
    r"""`text` as UTF-8 can encode it: a lone surrogate becomes its escape, six characters like `\ud800`.

    JSON can contain lone surrogates, so a model's code and a server's answer may hold one, which neither a file nor a
    tokenizer accepts. A program's own streams print the same escape. Other text is not changed.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def longest(text: str, room: int, count: Count, tail: bool = False) -> str:
    """A head (or tail) of `text` that fills most of `room`; its `count` is never more than `room`.

    A count of tokens does not always grow with the length, so the search stops when 95 % of the room is used.
    """
    if room <= 0 or not text:
        return ""
    fits, over = 0, min(len(text), CHARS_PER_UNIT * room) + 1
    guess = over - 1
    for _ in range(SEARCH_STEPS):
        used = count(text[len(text) - guess :] if tail else text[:guess])
        if used <= room:
            fits = guess
            if used >= 0.95 * room:
                break
        else:
            over = guess
        if over - fits <= 1:
            break
        likely = guess * room // max(used, 1)  # exact if all units have the same length
        guess = likely if fits < likely < over else (fits + over) // 2
    return text[len(text) - fits :] if tail else text[:fits]


def cut(text: str, room: int, count: Count = len) -> str:
    """`text`, without its middle if its `count` is more than `room`; the count of the result never is."""
    if len(text) <= CHARS_PER_UNIT * room and count(text) <= room:
        return text
    share = room - count(CUT)
    while share > 0:
        head = longest(text, share - share // 2, count)
        tail = longest(text[len(head) :], share // 2, count, tail=True)
        whole = head + CUT + tail
        used = count(whole)
        if used <= room:
            return whole
        share -= used - room  # joined text can have more tokens than its parts
    return longest(text, room, count)


def short_error(stderr: str, room: int, count: Count) -> str:
    """The program's own frames and the message of the last traceback; without a traceback, the last lines of stderr.

    Frames inside libraries are left out: the line of the program that led there is what counts. A text of more than
    half of `room` is cut, the frames first. The line that names the error stays whole if it fits into `room`.
    """
    frames, message = _error_parts(stderr)
    name, _, more = message.partition("\n")
    limit = max(room // 2, min(count(name[: CHARS_PER_UNIT * room]), room))
    whole = "\n".join(filter(None, (frames, message)))
    if cut(whole, limit, count) == whole:
        return whole
    error = longest(name, limit, count)
    for part, template in ((more, "{error}\n{part}"), (frames, "{part}\n{error}")):
        left = limit - count(f"\n{error}")
        longer = template.format(error=error, part=cut(part, left, count))
        if part and left > count(CUT) and count(longer) <= limit:
            error = longer
    return error


def _error_parts(stderr: str) -> tuple[str, str]:
    """The program's own frames, and the message, whose first line names the error."""
    lines = stderr.rstrip().split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(TRACEBACK)]
    first = (
        starts[-1] + 1 if starts else next((i for i, line in enumerate(lines) if line.startswith(SNIPPET_FRAME)), -1)
    )
    if first < 0:
        return "\n".join(lines[-MAX_ERROR_LINES:-1]), lines[-1]
    frames: list[list[str]] = []
    position = first
    while position < len(lines) and lines[position].startswith("  "):
        if lines[position].startswith("  File ") or not frames:
            frames.append([])
        frames[-1].append(lines[position])
        position += 1
    own = [frame for frame in frames if frame[0].startswith(SNIPPET_FRAME)][-MAX_FRAMES:]
    return "\n".join(line for frame in own for line in frame), "\n".join(lines[position:])


def describe_end(result: ToolResult) -> str:
    """How the run ended, in words, if the program's own output does not say it; else empty."""
    if result.status in ("timeout", "oom", "output_limit"):
        return f"[stopped: {result.message}]"
    if result.status == "rejected":
        return f"[not run: {result.message}]"
    if result.status == "success" and result.message:  # a session's interpreter ended
        return f"[{result.message}]"
    if result.status == "user_error" and (result.signal or not result.stderr.strip() or ";" in result.message):
        return f"[{result.message}]"
    return ""


def tool_text(result: ToolResult, room: int, count: Count = len) -> str:
    """Output, then a short error with advice, then how the run ended; `count` of the text is at most `room`.

    What a program that succeeded wrote to stderr is shown if it holds a traceback, or if there is no other output.

    Args:
        result: how the program ended.
        room: the largest size of the text, in the unit of `count`.
        count: size of a text. Characters by default; for a budget of tokens, the number of ids that the text becomes
            in the context (`tokens.chat.defuse` included).

    A long error gets at most half of the room, or what its first line needs; the output gets the rest. Raises
    ValueError for `infra_error` and `cancelled`: a model is never told about faults of the machinery.
    """
    if result.status in ("infra_error", "cancelled"):
        raise ValueError(f"a result of status {result.status} is not for the model: {result.message}")
    result = replace(result, **{name: encodable(getattr(result, name)) for name in ("stdout", "stderr", "message")})
    output = result.stdout.rstrip("\n")
    # Of a program that succeeds, stderr mostly holds warnings. But a thread may have failed, or an error was printed.
    shown = result.status != "success" or not output.strip() or TRACEBACK in result.stderr
    error = short_error(result.stderr, room, count) if shown else ""
    help_ = DIGITS_HELP if error.endswith(DIGITS_ERROR) else ""
    ending = "\n".join(filter(None, (error, help_, describe_end(result))))
    if not output.strip() or not ending:
        return cut(ending or (output if output.strip() else NO_OUTPUT), room, count)
    left = room - count(f"\n{ending}")
    while left > 0:
        whole = f"{cut(output, left, count)}\n{ending}"
        over = count(whole) - room
        if over <= 0:
            return whole
        left -= over  # joined text can have more tokens than its parts
    return cut(ending, room, count)
