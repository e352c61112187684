"""How a policy calls tools and gets their answers: two grammars with one interface.

`hermes` is the tool calling of Qwen's chat template: `<tool_call>` JSON `</tool_call>`, any number of calls in one
turn. All of them are answered together in a separate turn. `retool` is the text form of the ReTool paper (arXiv
2504.11536, 3.1): the policy stops at `</code>`, reads the program's output between `<interpreter>` and
`</interpreter>`, and continues in the same turn. It can only call the interpreter. In both grammars a mark is a string,
whether the vocabulary has a token for it or not.

Only text that the policy sampled is parsed, so nothing in a tool's output can become a call. A call that cannot be read
is still a call: it is answered with an error that says what was expected. This file does not check whether a tool
exists or which arguments it takes (`retool_jax.tools` does).
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from retool_jax.errors import UserError
from retool_jax.tokens.chat import environment_ids, prompt_ids, tool_segment
from retool_jax.tokens.tokenizer import QWEN, Tokenizer

CODE_TOOL = "code_interpreter"  # the tool that <code> calls
# The text before a question in the `retool` grammar. The question itself says how to answer.
TOOL_PROMPT = (
    "You can run Python: write a complete program like this, and what it prints is shown to you between `<interpreter>`"
    " and `</interpreter>`.\n<code>\n```python\nthe program\n```\n</code>\n\n"
)
# Does the same as the prompt in the paper's evaluation code, which has quotes inside the box that models copy.
PAPER_PROMPT = (
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
    """One call of a turn as the policy wrote it, or the error that answers a call that cannot be read.

    `name` and `arguments` can be any JSON, because the tool is not looked up yet. `repaired` lists deviations from the
    grammar that have only one possible meaning and were read with it. `start` is the position of the call's mark in
    the turn's text; two calls that differ only in `start` are equal.
    """

    name: object = None
    arguments: object = None
    error: str | None = None
    repaired: str = ""
    start: int = field(default=-1, compare=False)

    @property
    def code(self) -> str:
        """The program, or for other tools the arguments as JSON; empty if there are no arguments."""
        if self.arguments is None:
            return ""
        if isinstance(self.arguments, dict) and self.name == CODE_TOOL and isinstance(self.arguments.get("code"), str):
            return self.arguments["code"]
        try:
            return json.dumps(self.arguments, ensure_ascii=False)
        except RecursionError:  # nesting that can just be read can be too deep to be written
            return ""

    def strict(self) -> "ToolCall":
        """The same call, but with an error instead of a repair."""
        return ToolCall(error=f"malformed call: {self.repaired}", start=self.start) if self.repaired else self


@dataclass(frozen=True)
class Grammar:
    """One way to call tools, as pure functions. Tools are JSON schemas: `{"type": "function", "function": ...}`.

    Attributes:
        prompt: from (tokenizer, messages, tools, tool_prompt) to the ids up to the policy's first token.
        calls: from a turn's text, which begins with `<think>` if it began inside a thought, to its calls in order.
        segment: from (tokenizer, turn_ids, outputs) to the ids that answer the calls, one output per call.
        demonstration: from (tokenizer, message, outputs, tool_prompt) to a demonstrated turn and its answers, as pieces
            of (ids, whether a policy would have sampled them).
        stop: a string that also ends a turn; empty if there is none.
    """

    prompt: Callable[[Tokenizer, list[dict], list[dict], str], list[int]]
    calls: Callable[[str], list[ToolCall]]
    segment: Callable[[Tokenizer, list[int], list[str]], list[int]]
    demonstration: Callable[[Tokenizer, dict, list[str], str], list[tuple[list[int], bool]]]
    stop: str = ""

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end a turn. The engine stops at them."""
        return (*tokenizer.stop_ids, *(i for text, i in tokenizer.control_tokens.items() if text == self.stop))

    def stop_at(self, tokenizer: Tokenizer, turn_ids: list[int], seen: int) -> int | None:
        """The number of ids up to and including the one that completes `stop`; None if the turn does not contain it.

        The first `seen` ids are known not to contain it. `</code>` is several tokens in Qwen. The last id is kept as it
        was sampled, even if it holds text after the mark (mostly a line break).
        """
        return end_of(tokenizer, turn_ids, seen, self.stop) if self.stop else None


def end_of(tokenizer: Tokenizer, ids: list[int], seen: int, string: str) -> int | None:
    """The same for any string and ids: the number of ids up to the one that completes `string` (`Grammar.stop_at`)."""
    first = max(seen - len(string.encode()), 0)  # each id has at least one byte, so the string cannot begin earlier
    if string not in tokenizer.decode(ids[first:]):
        return None
    counts = range(max(seen, 1), len(ids) + 1)
    return counts[bisect_left(counts, True, key=lambda count: string in tokenizer.decode(ids[first:count]))]


# --- text between marks -----------------------------------------------------------------------------------------------

_MARK = re.compile(r"<(/?)(tool_call|code|think)>")
_FENCE = "```"
_PYTHON = re.compile(r"((i?python|py)[\d.]*)?", re.IGNORECASE)  # allowed language words of a fence around a program


class Marked(NamedTuple):
    """The text between `<tag>` and `</tag>`. If one of the two is missing, `fault` names the other: opened, closed."""

    tag: str
    inside: str
    start: int
    stop: int
    fault: str = ""


def marked(text: str, *tags: str) -> list[Marked]:
    """The parts of a turn between these tags, in order.

    Parts inside a closed thought are left out. A thought ends when there are as many `</think>` as `<think>`, or else
    at the last `</think>`. A thought that is never closed hides nothing. Inside a call other marks are plain text,
    except `<tool_call>`, which begins another call.
    """
    found: list[Marked] = []
    opened: re.Match[str] | None = None
    thought_depth, last_thought_end = 0, text.rfind("</think>")
    for mark in _MARK.finditer(text):
        closes, tag = bool(mark[1]), mark[2]
        if thought_depth:
            if tag == "think":
                thought_depth = 0 if mark.start() == last_thought_end else thought_depth + (-1 if closes else 1)
        elif opened and closes and tag == opened[2]:
            found.append(Marked(tag, text[opened.end() : mark.start()], opened.start(), mark.end()))
            opened = None
        elif tag == "think":
            thought_depth = int(not opened and not closes and mark.start() < last_thought_end)
        elif tag in tags and closes and not opened:
            found.append(Marked(tag, "", mark.start(), mark.end(), "closed"))
        elif tag in tags and not closes and (not opened or tag == "tool_call"):
            if opened:
                inside = text[opened.end() : mark.start()]
                found.append(Marked(opened[2], inside, opened.start(), mark.start(), "opened"))
            opened = mark
    if opened:
        found.append(Marked(opened[2], text[opened.end() :], opened.start(), len(text), "opened"))
    return found


def marking_ids(tokenizer: Tokenizer, turn_ids: list[int], text: str, starts: Iterable[int]) -> list[int]:
    """For each mark of a turn, which begins at one of `starts` in its text, the index of the id of its first character.

    Marks begin with `<`, and each `<` comes from one id, so counting them is enough and nothing is decoded again. They
    are counted from the end, since the text may begin with a `<think>` that is not among the ids.
    """
    with_bracket = [place for place, i in enumerate(turn_ids) for _ in range(tokenizer.brackets.get(i, 0))]
    return [with_bracket[-text.count("<", start)] for start in starts]


def unfenced(text: str) -> tuple[str, str | None]:
    """The content of the fence around a text, and the fence's language word; the text and None if there is no fence."""
    first, newline, rest = text.strip().partition("\n")
    if not (newline and first.startswith(_FENCE) and rest.endswith(_FENCE)):
        return text, None
    inside = rest.removesuffix(_FENCE).rstrip(" \t").removesuffix("\n").removesuffix("\r")
    if first.endswith("\r"):
        inside = inside.replace("\r\n", "\n")
    return inside, first.removeprefix(_FENCE).strip()


# --- hermes -----------------------------------------------------------------------------------------------------------

_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def hermes_prompt(tokenizer: Tokenizer, messages: list[dict], tools: list[dict], tool_prompt: str = "") -> list[int]:
    """Ids of a prompt that shows the tools: as the template does, or in words if the template leaves them out."""
    if not tools or tokenizer.writes_tools:
        return tokenizer.encode(tokenizer.render(messages, tools, generation_prompt=True))
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    words = (
        "You may call a function while you work on the answer. To call it, write its name and arguments as JSON, like"
        ' this, and end your turn:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        f"What it returns is shown to you before you go on. The functions that you may call:\n{schemas}"
    )
    first, *others = messages
    if first["role"] == "system":
        return prompt_ids(tokenizer, [first | {"content": f"{first['content']}\n\n{words}"}, *others])
    if tokenizer.writes_system:
        return prompt_ids(tokenizer, [{"role": "system", "content": words}, *messages])
    return prompt_ids(tokenizer, [first | {"content": f"{words}\n\n{first['content']}"}, *others])


def tool_calls(text: str) -> list[ToolCall]:
    """The `<tool_call>`s in the text of a turn, in order; empty if there are none."""
    unfinished = ToolCall(error="unfinished call: <tool_call> without </tool_call>")
    found = [part for part in marked(text, "tool_call") if part.fault != "closed"]
    return [replace(unfinished if part.fault else read_call(part.inside), start=part.start) for part in found]


def read_call(text: str) -> ToolCall:
    """Read the text between `<tool_call>` and `</tool_call>`: JSON, or the variants that models are known to write."""
    try:
        call, repairs = _read_json(text)
    except json.JSONDecodeError as error:
        return ToolCall(error=f"malformed call: {error.msg} at character {error.pos}; expected a JSON object")
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested thousands deep
        return ToolCall(error="malformed call: too long a number or too deep a nesting; expected a JSON object")
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
        repairs.append("name and arguments stand inside of function")
    if not isinstance(call, dict):
        return ToolCall(error="malformed call: expected a JSON object with name and arguments")
    name, arguments = call.get("name"), call.get("arguments")
    if "arguments" not in call and isinstance(call.get("parameters"), dict):
        arguments = call["parameters"]
        repairs.append("the arguments are called parameters")
    if isinstance(arguments, str) and (read := _arguments_in(arguments, name)):
        arguments = read
        repairs.append("the arguments are a string; they must be a JSON object")
    if name == CODE_TOOL and isinstance(arguments, dict) and isinstance(arguments.get("code"), str):
        code, word = unfenced(arguments["code"])
        if word is not None and _PYTHON.fullmatch(word):
            arguments = arguments | {"code": code}
            repairs.append(f"the code stands between {_FENCE}")
    return ToolCall(name, arguments, repaired="; ".join(repairs))


def _read_json(text: str) -> tuple[object, list[str]]:
    """A JSON value, and a list of the repairs that were made. Only common and unambiguous mistakes are repaired.

    Raises:
        ValueError, RecursionError: what `json.loads` raises for the original text.
    """
    try:
        return json.loads(text), []
    except json.JSONDecodeError:
        pass
    try:
        return json.loads(text, strict=False), ["a line's end or a tab in a string must be escaped"]
    except json.JSONDecodeError as error:
        first_error = error
    body, word = unfenced(text)
    repairs = [f"the JSON stands between {_FENCE}"] if word is not None else []
    body = body.strip()
    if body.startswith("{{") and body.endswith("}}"):
        body = body[1:-1]
        repairs.append("the outer braces are doubled")
    if (escaped := _ESCAPE.sub(_escape, body)) != body:
        body = escaped
        repairs.append("a backslash in a string must be doubled")
    body += "}"  # closes an object that lacks its last brace; otherwise this brace is left over
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(body)
    except json.JSONDecodeError:
        raise first_error from None
    left = body[end:].strip()
    if not value or left not in ("", "}", "}}"):
        raise first_error
    return value, repairs + ([] if left == "}" else ["there is a closing brace too many or too few"])


def _escape(match: re.Match[str]) -> str:
    r"""A valid JSON escape: `\'` becomes a quote; a backslash before any other unknown character is doubled."""
    if match[1] in '"\\/bfnrtu':
        return match[0]
    return "'" if match[1] == "'" else f"\\{match[0]}"


def _arguments_in(text: str, name: object) -> dict | None:
    """The arguments in a string: JSON, or only the program."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return {"code": text} if name == CODE_TOOL and text.strip() and not text.lstrip().startswith("{") else None


def policy_turn_text(message: dict, turn_end: str = QWEN.turn_end) -> str:
    """The text that a policy would have sampled for an assistant message, including the end of the turn."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    parts = ([message["content"]] if message.get("content") else []) + calls
    return "\n".join(parts) + turn_end


def hermes_segment(tokenizer: Tokenizer, turn_ids: list[int], outputs: list[str]) -> list[int]:
    """Ids of the environment's turn with these outputs; `turn_ids` play no part in this grammar."""
    return tool_segment(tokenizer, outputs)


def hermes_demonstration(
    tokenizer: Tokenizer, message: dict, outputs: list[str], tool_prompt: str = ""
) -> list[tuple[list[int], bool]]:
    """A demonstrated turn with all its calls, and the segment that answers them (`Grammar.demonstration`)."""
    said = tokenizer.encode(policy_turn_text(message, tokenizer.family.turn_end))
    return [(said, True), *([(tool_segment(tokenizer, outputs), False)] if outputs else [])]


# --- retool -----------------------------------------------------------------------------------------------------------

# The errors below do not spell tags out: the policy would see them broken up (`chat.defuse`).
_CODE_END = "</code>"
_FENCE_LINE = re.compile(r"^[ \t]*```", re.MULTILINE)


def tool_prompt_of(tokenizer: Tokenizer, tool_prompt: str) -> str:
    """The text before a question: the run's own, the paper's for `paper`, or by default `TOOL_PROMPT`.

    The miniature's default is the paper's, because its numbers were measured with that.
    """
    if tool_prompt == "paper" or (not tool_prompt and tokenizer.is_miniature):
        return PAPER_PROMPT
    return tool_prompt.rstrip() + "\n\n" if tool_prompt else TOOL_PROMPT


def retool_prompt(tokenizer: Tokenizer, messages: list[dict], tools: list[dict], tool_prompt: str = "") -> list[int]:
    """Ids of a prompt whose last message, the question, begins with an explanation of `<code>`.

    Raises:
        UserError: there are tools other than the interpreter.
    """
    if not tools:
        return prompt_ids(tokenizer, messages)
    if others := [tool["function"]["name"] for tool in tools if tool["function"]["name"] != CODE_TOOL]:
        raise UserError(
            f"rollout.grammar=retool calls {CODE_TOOL} only and has no way to write a call of {', '.join(others)}; set"
            " rollout.grammar=hermes, or leave the tool out"
        )
    *before, question = messages
    content = tool_prompt_of(tokenizer, tool_prompt) + question["content"]
    return prompt_ids(tokenizer, [*before, question | {"content": content}])


def retool_calls(text: str) -> list[ToolCall]:
    """The `<code>`s in the text of a turn, in order; empty if there are none."""
    faults = {
        "closed": ToolCall(error="malformed call: the code tag was closed and never opened"),
        "opened": ToolCall(error="unfinished call: the code tag was opened and never closed"),
    }
    return [
        replace(faults[part.fault] if part.fault else read_code(part.inside), start=part.start)
        for part in marked(text, "code")
    ]


def read_code(inside: str) -> ToolCall:
    """Read the text between `<code>` and `</code>`: one fenced block, or the bare program."""
    expected = "expected one ```python block between the code tags"
    code, word = unfenced(inside)
    if word is None:
        code = inside.strip("\r\n")
    elif not _PYTHON.fullmatch(word):
        return ToolCall(error=f"malformed call: the code block says {word[:20]!r}, and only Python runs; {expected}")
    if _FENCE_LINE.search(code):
        return ToolCall(error=f"malformed call: the code block is not closed, or not the only one; {expected}")
    if not code.strip():
        return ToolCall(error=f"malformed call: there is no code; {expected}")
    repaired = "" if word == "python" else f"the program stands in no ```python block; {expected}"
    return ToolCall(CODE_TOOL, {"code": code}, repaired=repaired)


def retool_segment(tokenizer: Tokenizer, turn_ids: list[int], outputs: list[str]) -> list[int]:
    """Ids that answer a turn in place, so that the policy continues in the same turn.

    If the policy ended its turn inside a call, the answer is a separate user turn, because only the header of the next
    turn may follow an end of turn. An answer in place begins with a newline, unless the policy's last token ends in it.
    """
    family = tokenizer.family
    if turn_ids[-1] in tokenizer.stop_ids:
        opening, closing = family.user_open, family.user_close + tokenizer.turn_header
    else:
        opening, closing = "" if tokenizer.decode(turn_ids[-1:]).endswith("\n") else "\n", "\n"

    def write(outputs: list[str]) -> str:
        return opening + "\n".join(f"<interpreter>\n{output}\n</interpreter>" for output in outputs) + closing

    return environment_ids(tokenizer, write, outputs)


def retool_demonstration(
    tokenizer: Tokenizer, message: dict, outputs: list[str], tool_prompt: str = ""
) -> list[tuple[list[int], bool]]:
    """A demonstrated turn: each call followed by its answer. A turn without calls answers in the form of the prompt.

    Raises:
        UserError: a call of another tool, or one that would be read back as something else.
    """
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = message.get("content") or ""
    if not calls:
        said = _answer_in_tags(said) if "<answer>" in tool_prompt_of(tokenizer, tool_prompt) else said
        return [(tokenizer.encode(said + tokenizer.family.turn_end), True)]
    if len(outputs) != len(calls):
        raise UserError(f"a turn with {len(calls)} calls has {len(outputs)} outputs; each call needs one")
    pieces: list[tuple[list[int], bool]] = []
    for call, output in zip(calls, outputs, strict=True):
        text = "\n".join(filter(None, (said, f"<code>\n```python\n{call['arguments'].get('code')}\n```\n{_CODE_END}")))
        if retool_calls(text) != [ToolCall(call["name"], call["arguments"])]:
            raise UserError(
                "a turn cannot be written in the retool grammar: it calls another tool, or its text or code holds a"
                " code tag or a line that begins with ```; leave the row out, or use the hermes grammar"
            )
        ids = tokenizer.encode(text)
        pieces += [(ids, True), (retool_segment(tokenizer, ids, [output]), False)]
        said = ""
    return pieces


def _answer_in_tags(text: str) -> str:
    r"""A final turn in the form of the paper's prompt: a `\boxed{...}` at its end is put between answer tags."""
    before, box, inside = text.rstrip(" \n.").rpartition("\\boxed{")
    depths = [*accumulate(({"{": 1, "}": -1}.get(c, 0) for c in _ESCAPE.sub("", inside)), initial=1)]
    if not box or "<answer>" in text or depths.count(0) != 1 or depths[-1]:
        return text
    return "\n".join(filter(None, (before.rstrip(), f"<answer>\n{box}{inside}\n</answer>")))


DEFAULT_GRAMMAR = "hermes"  # what chat templates write
GRAMMARS = {
    "hermes": Grammar(hermes_prompt, tool_calls, hermes_segment, hermes_demonstration),
    "retool": Grammar(retool_prompt, retool_calls, retool_segment, retool_demonstration, stop=_CODE_END),
}
