"""Clients' messages and functions in the form that templates take, with all control tokens in their texts broken up."""

import json
import re
from typing import Any

from retool_jax.sandbox.text import encodable
from retool_jax.sandbox.types import shown
from retool_jax.serving.requests import Refused, a_list, an_object
from retool_jax.shapes import map_leaves
from retool_jax.tokens.chat import defuse
from retool_jax.tokens.tokenizer import Tokenizer

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def defused(tokenizer: Tokenizer, value: Any) -> Any:
    """JSON with every mark in its texts broken up (`chat.defuse`)."""
    return map_leaves(lambda leaf: defuse(tokenizer, encodable(leaf)) if isinstance(leaf, str) else leaf, value)


def text_of(content: object, name: str) -> str:
    """A message's text, given as one string or in parts."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    texts = []
    for part in a_list(content, name):
        part = an_object(part, name)
        text = part.get("text")
        if part.get("type") not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise Refused(400, f"{name} has a part of type {shown(part.get('type'))}; only text is served", name)
        texts.append(text)
    return "".join(texts)


def messages_of(tokenizer: Tokenizer, given: object) -> list[dict]:
    """Chat messages in the form that templates take.

    Answers of the client's functions are sorted by their calls, the order that the policy expects.

    Raises:
        Refused: an unknown role or part, an answer without a call, or a call without an answer.
    """
    messages: list[dict] = []
    waiting: list[str] = []  # ids of calls that have to be answered next
    answers: dict[str, dict] = {}
    for number, entry in enumerate(a_list(given, "messages")):
        name = f"messages[{number}]"
        entry = an_object(entry, name)
        role = ROLES.get(entry["role"]) if isinstance(entry.get("role"), str) else None
        if role is None:
            known = ", ".join(ROLES)
            raise Refused(400, f"{name}.role is {shown(entry.get('role'))}; it must be one of {known}", name)
        message = {"role": role, "content": text_of(entry.get("content"), f"{name}.content")}
        if role == "tool":
            call = entry.get("tool_call_id")
            if call not in waiting or call in answers:
                raise Refused(
                    400, f"{name}.tool_call_id is {shown(call)}; it must name a call of the turn before it", name
                )
            answers[call] = message
            if len(answers) == len(waiting):
                messages += [answers[call] for call in waiting]
                waiting, answers = [], {}
            continue
        _all_answered(waiting, answers, name)
        if role == "assistant":
            if isinstance(thought := entry.get("reasoning_content", entry.get("reasoning")), str):
                message["reasoning_content"] = thought
            if entry.get("tool_calls"):
                message["tool_calls"], waiting = _calls_of(entry["tool_calls"], f"{name}.tool_calls")
        messages.append(message)
    _all_answered(waiting, answers, "messages")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise Refused(400, "messages must end with a message of role user or tool, for the model to answer", "messages")
    return defused(tokenizer, messages)


def _all_answered(waiting: list[str], answers: dict[str, dict], name: str) -> None:
    if missing := [call for call in waiting if call not in answers]:
        raise Refused(
            400, f"{name}: the call {shown(missing[0])} has no answer; add a message of role tool with its id", name
        )


def _calls_of(given: object, name: str) -> tuple[list[dict], list[str]]:
    """An assistant's calls in the form that templates take, and their ids."""
    calls, ids = [], []
    for call in a_list(given, name):
        function = an_object(an_object(call, name).get("function"), f"{name}.function")
        if not isinstance(call.get("id"), str) or call["id"] in ids or not isinstance(function.get("name"), str):
            raise Refused(400, f"{name} needs an id of its own and a name for each call", name)
        ids.append(call["id"])
        calls.append(called(function["name"], function.get("arguments")))
    return calls, ids


def called(name: str, arguments: object) -> dict:
    """A call in the form that templates take. Arguments are JSON in a string; a string that is not JSON is kept."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = arguments
    return {"type": "function", "function": {"name": name, "arguments": value}}


def functions_of(tokenizer: Tokenizer, given: object, nested: bool) -> dict[str, dict]:
    """The client's functions by name, in the form that prompts show.

    `nested` is Chat Completions' form, `{"type": "function", "function": {...}}`; the form of Responses is flat.
    """
    functions = {}
    for number, entry in enumerate(a_list(given, "tools")):
        name = f"tools[{number}]"
        entry = an_object(entry, name)
        if entry.get("type") != "function":
            raise Refused(400, f"{name}.type is {shown(entry.get('type'))}; function is served here", name)
        function = an_object(entry.get("function"), f"{name}.function") if nested else entry
        called_by = function.get("name")
        if not isinstance(called_by, str) or not _NAME.fullmatch(called_by) or called_by in functions:
            raise Refused(
                400,
                f"{name} is called {shown(called_by)}; a name has 1 to 64 letters, digits, _ or -, and no other tool's",
                name,
            )
        shown_as = {
            "name": called_by,
            "description": text_of(function.get("description"), f"{name}.description"),
            "parameters": an_object(function.get("parameters") or {}, f"{name}.parameters"),
        }
        functions[called_by] = {"type": "function", "function": defused(tokenizer, shown_as)}
    return functions
