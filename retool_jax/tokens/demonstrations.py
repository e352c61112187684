"""Demonstrations: chat messages to ids and a mask, and the paper's text form to chat messages."""

import re
from dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.tokens.grammar import CODE_TOOL, GRAMMARS, read_code
from retool_jax.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenList:
    """Token ids, and for each one whether the policy learns to sample it."""

    ids: list[int]
    sampled: list[bool]


def demonstration_ids(
    tokenizer: Tokenizer,
    messages: list[dict],
    tools: list[dict] | None = None,
    grammar: str = "hermes",
    tool_prompt: str = "",
) -> TokenList:
    """A whole conversation as ids and mask, made of the same segments as a rollout.

    Args:
        messages: user (or system) turns, then assistant turns with tool turns between them. Messages after the last
            assistant turn are left out.
        tools: schemas of the tools that the prompt shows.
        grammar: how calls are written.
        tool_prompt: how the `retool` grammar is explained (`rollout.tool_prompt`).

    Raises:
        UserError: the messages are in another order, or cannot be written in this grammar.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if not first:
        raise UserError("a demonstration needs a user message and then an assistant message")
    rules = GRAMMARS[grammar if tools else "hermes"]  # without tools there are no calls to write
    tokens = TokenList([], [])
    pieces = [(rules.prompt(tokenizer, messages[:first], tools or [], tool_prompt), False)]
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    for position, following in zip(turns, [*turns[1:], None], strict=True):
        answers = messages[position + 1 : following]
        if others := [message["role"] for message in answers if message["role"] != "tool"]:
            raise UserError(f"a {others[0]} message after the first assistant turn is not supported")
        outputs = [message["content"] for message in answers] if following else []
        pieces += rules.demonstration(tokenizer, messages[position], outputs, tool_prompt)
    for ids, sampled in pieces:
        tokens.ids.extend(ids)
        tokens.sampled.extend([sampled] * len(ids))
    return tokens


# --- the paper's text form --------------------------------------------------------------------------------------------

_CODE = re.compile(r"</?code>")
_OUTPUT = re.compile(r"\s*<interpreter>(.*?)</interpreter>", re.DOTALL)
_FINAL = re.compile(r"(.*?)<answer>(.*?)</answer>(.*)", re.DOTALL)
# Strings that a tokenizer would turn into control tokens; DeepSeek's have full-width bars.
_CONTROL = re.compile(r"<\|\w+\|>|<\uff5c[\w\u2581]+\uff5c>|</?tool_(?:call|response)>")


class Unreadable(ValueError):
    """A text is not a transcript. The message is one of a few fixed reasons, so that reasons can be counted."""


def holds_control(text: str) -> bool:
    """Whether a text contains a mark that would end a turn or open a call."""
    return bool(_CONTROL.search(text))


def is_transcript(text: str) -> bool:
    """Whether a text contains calls and their outputs, as published ReTool trajectories do."""
    return "<code>" in text and "<interpreter>" in text


def read_transcript(text: str) -> list[dict]:
    """The turns in one text: a call for each `<code>`, a tool turn for each `<interpreter>`, and the final answer.

    Raises:
        Unreadable: a tag without its partner, code without output, text after the answer.
    """
    turns: list[dict] = []
    while opening := _CODE.search(text):
        if opening[0] == "</code>":
            raise Unreadable("</code> without <code>")
        closing = _CODE.search(text, opening.end())
        if closing is None or closing[0] == "<code>":
            raise Unreadable("unfinished code")
        output = _OUTPUT.match(text, closing.end())
        if output is None:
            raise Unreadable("code without its output")
        turns.append(_call_turn(text[: opening.start()], _code(text[opening.end() : closing.start()])))
        turns.append({"role": "tool", "content": output[1].strip()})
        text = text[output.end() :]
    if final := _FINAL.fullmatch(text):
        if final[3].strip():
            raise Unreadable("text after the answer")
        text = final[1] + final[2]
    if re.search(r"</?(?:answer|interpreter)>", text):
        raise Unreadable("a tag without its partner")
    return [*turns, {"role": "assistant", "content": text.strip()}]


def _call_turn(text: str, code: str) -> dict:
    if re.search(r"</?(?:answer|interpreter)>", text):
        raise Unreadable("a tag without its partner")
    call = {"type": "function", "function": {"name": CODE_TOOL, "arguments": {"code": code}}}
    return {"role": "assistant", "content": text.strip(), "tool_calls": [call]}


def _code(inside: str) -> str:
    """The program between `<code>` and `</code>`, in any form that a rollout would accept."""
    call = read_code(inside)
    if call.error:
        raise Unreadable("empty code" if "there is no code" in call.error else "several fences in one code")
    return call.code.strip("\n").rstrip()
