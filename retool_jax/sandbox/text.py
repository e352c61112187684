"""What the model is told about a run."""

from retool_jax.sandbox.types import ToolResult

NO_OUTPUT = "[no output: use print()]"
MAX_FRAMES = 3
MAX_ERROR_LINES = 10
SNIPPET_FRAME = '  File "<snippet>"'


def cut(text: str, max_chars: int, removed_before: int = 0) -> str:
    """`text` without its middle if it is longer than `max_chars`; the result is never longer than that.

    The number in the marker includes `removed_before`, what someone else took out of `text` earlier.
    """
    if len(text) <= max_chars:
        return text
    room = max_chars
    for _ in range(3):  # the marker's length depends on the number in it
        marker = f"\n[... {len(text) - room + removed_before} characters removed ...]\n"
        room = max(max_chars - len(marker), 0)
    if room == 0:
        return text[:max_chars]
    head = room - room // 2
    return text[:head] + marker + text[len(text) - room // 2 :]


def short_error(stderr: str) -> str:
    """The last traceback's own frames and message; the last lines of stderr if there is no traceback in it.

    Frames inside libraries are left out: what counts is the line of the program that led there.
    """
    lines = stderr.rstrip().split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    first = (
        starts[-1] + 1 if starts else next((i for i, line in enumerate(lines) if line.startswith(SNIPPET_FRAME)), -1)
    )
    if first < 0:
        return "\n".join(lines[-MAX_ERROR_LINES:])
    frames: list[list[str]] = []
    position = first
    while position < len(lines) and lines[position].startswith("  "):
        if lines[position].startswith("  File ") or not frames:
            frames.append([])
        frames[-1].append(lines[position])
        position += 1
    own = [frame for frame in frames if frame[0].startswith(SNIPPET_FRAME)][-MAX_FRAMES:]
    return "\n".join([line for frame in own for line in frame] + lines[position:])


def verdict(result: ToolResult) -> str:
    """The end that the program's own output does not tell, in words; empty if there is nothing to add."""
    if result.status in ("timeout", "oom", "output_limit"):
        return f"[stopped: {result.message}]"
    if result.status == "rejected":
        return f"[not run: {result.message}]"
    if result.status == "user_error" and (result.signal or not result.stderr.strip()):
        return f"[{result.message}]"
    return ""


def tool_text(result: ToolResult, max_chars: int) -> str:
    """Output, then a short error, then how the run ended; at most `max_chars` characters.

    A long error gets at most half of the room, the output the rest. Raises ValueError for `infra_error` and
    `cancelled`: what the machinery did is never told to a model.
    """
    if result.status in ("infra_error", "cancelled"):
        raise ValueError(f"a result of status {result.status} is not for the model: {result.message}")
    # Bytes that the sandbox already removed are counted as characters; that is exact for ASCII.
    missing = max(result.stdout_bytes - len(result.stdout.encode()), 0) if result.stdout_truncated else 0
    output = result.stdout.rstrip("\n")
    error = short_error(result.stderr) if result.status != "success" or not output.strip() else ""
    ending = "\n".join(filter(None, (cut(error, max_chars // 2), verdict(result))))
    if not output.strip():
        return cut(ending or NO_OUTPUT, max_chars)
    if not ending:
        return cut(output, max_chars, missing)
    output = cut(output, max(max_chars - len(ending) - 1, 0), missing)
    return cut("\n".join(filter(None, (output, ending))), max_chars)
