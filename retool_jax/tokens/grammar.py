"""How a policy asks for a program to be run, and how it is answered: two grammars with one interface.

`hermes` is the tool calling of Qwen's chat template: `<tool_call>` JSON `</tool_call>`, any number of calls in one
turn, answered together in a turn of their own. `retool` is the text form of the ReTool paper (arXiv 2504.11536, 3.1):
the policy stops at `</code>`, reads what its program printed between `<interpreter>` and `</interpreter>`, and goes on
in the same turn.

Only ids that the policy sampled are ever parsed, so nothing in a tool's output can become a call. A call that
cannot be read is still a call: it is answered with an error that says what was expected.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from retool_jax.tokens.chat import environment_ids, prompt_ids, tool_segment
from retool_jax.tokens.tokenizer import Tokenizer

TOOL_NAME = "code_interpreter"
TOOL_SCHEMA = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Run a Python program and return what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program to run."}},
            "required": ["code"],
        },
    },
}
# In function the prompt of the paper's evaluation code; its own has quotes inside the box, which models copy.
RETOOL_PROMPT = (
    "Work on the problem below step by step. Wherever a computation or a check would help your reasoning, you can write"
    " Python code: a sandbox executes it and shows you the output as `<interpreter>output</interpreter>`, and you"
    " continue from there. Write complete programs with all their imports, and print what you want to see.\n"
    "Each program is wrapped like this:\n<code>\n```python\nthe program\n```\n</code>\n\n"
    "End your response with the final answer in this format:\n"
    "<answer>\n\\boxed{the final answer}\n</answer>\n\n"
    "The problem:\n"
)


@dataclass(frozen=True)
class ToolCall:
    """One call of a turn: the code to run, or the error that answers a call that cannot be run."""

    code: str
    error: str | None = None


@dataclass(frozen=True)
class Grammar:
    """One way to call the interpreter, as pure functions over a tokenizer.

    `prompt(tokenizer, messages)` gives the ids up to the policy's first token, the tool explained in them;
    `calls(tokenizer, turn_ids)` the calls of one sampled turn in order; `segment(tokenizer, turn_ids, outputs)` the ids
    that answer them, one output per call; `stop_ids(tokenizer)` the ids at which a turn ends, which the engine watches
    for; `stop_at(tokenizer, turn_ids, seen)` how many of a turn's ids stand before the end that a string in them makes,
    None without one, when the first `seen` are known to hold none.
    """

    prompt: Callable[[Tokenizer, list[dict]], list[int]]
    calls: Callable[[Tokenizer, list[int]], list[ToolCall]]
    segment: Callable[[Tokenizer, list[int], list[str]], list[int]]
    stop_ids: Callable[[Tokenizer], tuple[int, ...]]
    stop_at: Callable[[Tokenizer, list[int], int], int | None]


# --- hermes -----------------------------------------------------------------------------------------------------------


def tool_calls(tokenizer: Tokenizer, turn_ids: list[int]) -> list[ToolCall]:
    """The `<tool_call>`s in one sampled turn, in order; empty when the turn holds none."""
    opening, closing = tokenizer.id_of("<tool_call>"), tokenizer.id_of("</tool_call>")
    unfinished = ToolCall("", "unfinished call: <tool_call> without </tool_call>")
    calls = []
    start = None
    for position, index in enumerate(turn_ids):
        if index == opening:
            if start is not None:
                calls.append(unfinished)
            start = position + 1
        elif index == closing and start is not None:
            calls.append(_parse_call(tokenizer.decode(turn_ids[start:position])))
            start = None
    if start is not None:
        calls.append(unfinished)
    return calls


def _parse_call(text: str) -> ToolCall:
    try:
        call = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return ToolCall("", f"malformed call: {error.msg} at character {error.pos}; expected a JSON object")
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested thousands deep
        return ToolCall("", "malformed call: too long a number or too deep a nesting; expected a JSON object")
    if not isinstance(call, dict):
        return ToolCall("", "malformed call: expected a JSON object with name and arguments")
    if call.get("name") != TOOL_NAME:
        return ToolCall("", f"unknown tool {repr(call.get('name'))[:80]}; the only tool is {TOOL_NAME}")
    arguments = call.get("arguments")
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str):
        return ToolCall("", 'malformed call: arguments must be {"code": "..."}')
    return ToolCall(code)


# --- retool -----------------------------------------------------------------------------------------------------------

# The errors below name no tag as it is written: shown to the policy, a mark is broken up (`chat.defuse`).
_CODE = re.compile(r"<code>(.*?)(</code>|\Z)|</code>", re.DOTALL)
_FENCE = "```"
_CODE_END = "</code>"
_FENCE_LINE = re.compile(r"^[ \t]*```", re.MULTILINE)


def retool_prompt(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Ids of a prompt whose last message, the question, comes with the explanation of `<code>`."""
    question = messages[-1]
    return prompt_ids(tokenizer, [*messages[:-1], question | {"content": RETOOL_PROMPT + question["content"]}])


def retool_calls(tokenizer: Tokenizer, turn_ids: list[int]) -> list[ToolCall]:
    """The `<code>`s in one sampled turn, in order; empty when the turn holds none.

    Inside stands one fenced block, or the bare program.
    """
    calls = []
    for match in _CODE.finditer(tokenizer.decode(turn_ids)):
        if match[1] is None:
            calls.append(ToolCall("", "malformed call: the code tag was closed and never opened"))
        elif not match[2]:
            calls.append(ToolCall("", "unfinished call: the code tag was opened and never closed"))
        else:
            calls.append(_parse_code(match[1]))
    return calls


def _parse_code(inside: str) -> ToolCall:
    expected = "expected one ```python block between the code tags"
    first, newline, rest = inside.strip().partition("\n")
    if newline and rest.endswith(_FENCE) and first.rstrip(" \t") in (_FENCE, f"{_FENCE}python", f"{_FENCE}py"):
        code = rest.removesuffix(_FENCE).rstrip(" \t").removesuffix("\n")
    else:
        code = inside.strip("\n")
    if _FENCE_LINE.search(code):
        return ToolCall("", f"malformed call: the code block is not closed, or not the only one; {expected}")
    if not code.strip():
        return ToolCall("", f"malformed call: there is no code; {expected}")
    return ToolCall(code)


def retool_segment(tokenizer: Tokenizer, turn_ids: list[int], outputs: list[str]) -> list[int]:
    """Ids that answer a turn in place, so that the policy goes on in the same turn.

    A policy that ended its turn inside a call is answered by the user, in a turn of its own: nothing may follow an end
    of turn but the header of the next. The last token before an answer in place may have brought the line's end along.
    """
    family = tokenizer.family
    if turn_ids[-1] in tokenizer.stop_ids:
        opening, closing = family.user_open, family.user_close + tokenizer.turn_header
    else:
        opening, closing = "" if tokenizer.decode(turn_ids[-1:]).endswith("\n") else "\n", "\n"

    def write(outputs: list[str]) -> str:
        return opening + "\n".join(f"<interpreter>\n{output}\n</interpreter>" for output in outputs) + closing

    return environment_ids(tokenizer, write, outputs)


def retool_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ends of a turn, and `</code>` where the vocabulary has it as one token."""
    code_end = [tokenizer.id_of(_CODE_END)] if _CODE_END in tokenizer.control_tokens else []
    return (*tokenizer.stop_ids, *code_end)


def retool_stop_at(tokenizer: Tokenizer, turn_ids: list[int], seen: int) -> int | None:
    """The number of ids up to the one that completes the first `</code>`, which is several tokens in Qwen.

    That id is kept whole, as it was sampled, with what it may hold behind the mark (a line's end, mostly).
    """
    first = max(seen - len(_CODE_END), 0)  # an id stands for a byte or more, so the mark begins no further back
    if _CODE_END not in tokenizer.decode(turn_ids[first:]):
        return None
    counts = range(max(seen, 1), len(turn_ids) + 1)
    return next(count for count in counts if _CODE_END in tokenizer.decode(turn_ids[first:count]))


GRAMMARS = {
    "hermes": Grammar(
        prompt=lambda tokenizer, messages: prompt_ids(tokenizer, messages, [TOOL_SCHEMA]),
        calls=tool_calls,
        segment=lambda tokenizer, turn_ids, outputs: tool_segment(tokenizer, outputs),
        stop_ids=lambda tokenizer: tokenizer.stop_ids,
        stop_at=lambda tokenizer, turn_ids, seen: None,
    ),
    "retool": Grammar(retool_prompt, retool_calls, retool_segment, retool_stop_ids, retool_stop_at),
}
