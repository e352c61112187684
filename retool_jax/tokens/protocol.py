"""Find tool calls in a policy's turn: the `hermes` grammar of Qwen2.5, `<tool_call>` JSON `</tool_call>`.

Only ids that the policy sampled are ever parsed, so nothing in a tool's output can become a call. A call that
cannot be read is still a call: it is answered with an error that says what was expected.
"""

import json
from dataclasses import dataclass

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


@dataclass(frozen=True)
class ToolCall:
    """One call of a turn: the code to run, or the error that answers a call that cannot be run."""

    code: str
    error: str | None = None


def tool_calls(tokenizer: Tokenizer, turn_ids: list[int]) -> list[ToolCall]:
    """The calls in one sampled turn, in order; empty when the turn holds none."""
    opening, closing = tokenizer.id_of("<tool_call>"), tokenizer.id_of("</tool_call>")
    calls = []
    start = None
    for position, index in enumerate(turn_ids):
        if index == opening:
            if start is not None:
                calls.append(ToolCall("", "unfinished call: <tool_call> without </tool_call>"))
            start = position + 1
        elif index == closing and start is not None:
            calls.append(_parse_call(tokenizer.decode(turn_ids[start:position])))
            start = None
    if start is not None:
        calls.append(ToolCall("", "unfinished call: <tool_call> without </tool_call>"))
    return calls


def _parse_call(text: str) -> ToolCall:
    try:
        call = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return ToolCall("", f"malformed call: {error.msg} at character {error.pos}; expected a JSON object")
    if not isinstance(call, dict):
        return ToolCall("", "malformed call: expected a JSON object with name and arguments")
    if call.get("name") != TOOL_NAME:
        return ToolCall("", f"unknown tool {call.get('name')!r}; the only tool is {TOOL_NAME}")
    arguments = call.get("arguments")
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str):
        return ToolCall("", 'malformed call: arguments must be {"code": "..."}')
    return ToolCall(code)
