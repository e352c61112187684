"""How a policy calls tools, and how it is answered: two grammars with one interface.

`hermes` is the tool calling of Qwen's chat template: `<tool_call>` JSON `</tool_call>`, any number of calls in one
turn, answered together in a turn of their own. `retool` is the text form of the ReTool paper (arXiv 2504.11536, 3.1):
the policy stops at `</code>`, reads what its program printed between `<interpreter>` and `</interpreter>`, and goes on
in the same turn. It knows no other tool than the interpreter. Marks are strings in both, whether they are tokens of the
vocabulary or not.

Only what the policy sampled is ever parsed, so nothing in a tool's output can become a call. A call that cannot be read
is still a call: it is answered with an error that says what was expected. Whether there is such a tool, and what
arguments it takes, is not known here (`retool_jax.tools`).
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
# What stands before a question in the paper's grammar. How to answer is said by the question itself.
TOOL_PROMPT = (
    "You can run Python: write a complete program like this, and what it prints is shown to you between `<interpreter>`"
    " and `</interpreter>`.\n<code>\n```python\nthe program\n```\n</code>\n\n"
)
# In function the prompt of the paper's evaluation code; its own has quotes inside the box, which models copy.
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
    """One call of a turn as it was written, or the error that answers what cannot be read.

    `name` and `arguments` are any JSON: nobody has looked yet whether there is such a tool. `repaired` says what is not
    as the grammar writes it, where that can mean one thing only and was read so. `start` is where its mark begins in
    the turn's text, which does not make two calls differ.
    """

    name: object = None
    arguments: object = None
    error: str | None = None
    repaired: str = ""
    start: int = field(default=-1, compare=False)

    @property
    def code(self) -> str:
        """What to show of it: the program, or the arguments as JSON; empty where there are none."""
        if self.arguments is None:
            return ""
        if isinstance(self.arguments, dict) and self.name == CODE_TOOL and isinstance(self.arguments.get("code"), str):
            return self.arguments["code"]
        try:
            return json.dumps(self.arguments, ensure_ascii=False)
        except RecursionError:  # nested a little less deep than what cannot be read
            return ""

    def strict(self) -> "ToolCall":
        """The same without leniency: a call that had to be repaired is answered with what is wrong with it."""
        return ToolCall(error=f"malformed call: {self.repaired}", start=self.start) if self.repaired else self


@dataclass(frozen=True)
class Grammar:
    """One way to call tools, as pure functions.

    `prompt(tokenizer, messages, tools, tool_prompt)` gives the ids up to the policy's first token, the tools (JSON
    schemas as `{"type": "function", "function": ...}`) explained in them; `calls(text)` the calls of one turn in order,
    its text beginning with `<think>` where the turn began in a thought; `segment(tokenizer, turn_ids, outputs)` the ids
    that answer them, one output per call; `written(tokenizer, message, outputs, tool_prompt)` a demonstrated turn and
    its answers as pieces of (ids, whether a policy would have sampled them). `stop` is a string that ends a turn too.
    """

    prompt: Callable[[Tokenizer, list[dict], list[dict], str], list[int]]
    calls: Callable[[str], list[ToolCall]]
    segment: Callable[[Tokenizer, list[int], list[str]], list[int]]
    written: Callable[[Tokenizer, dict, list[str], str], list[tuple[list[int], bool]]]
    stop: str = ""

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids at which a turn ends, which the engine watches for."""
        return (*tokenizer.stop_ids, *(i for text, i in tokenizer.control_tokens.items() if text == self.stop))

    def stop_at(self, tokenizer: Tokenizer, turn_ids: list[int], seen: int) -> int | None:
        """How many of a turn's ids there are up to the one that completes `stop`, when the first `seen` hold none.

        `</code>` is several tokens in Qwen. The last id is kept whole, as it was sampled, with what it may hold behind
        the mark (a line's end, mostly). None where there is no such string.
        """
        return end_of(tokenizer, turn_ids, seen, self.stop) if self.stop else None


def end_of(tokenizer: Tokenizer, ids: list[int], seen: int, string: str) -> int | None:
    """How many ids there are up to the one that completes a string, when the first `seen` hold none; None without."""
    first = max(seen - len(string.encode()), 0)  # an id stands for a byte or more, so it begins no further back
    if string not in tokenizer.decode(ids[first:]):
        return None
    counts = range(max(seen, 1), len(ids) + 1)
    return counts[bisect_left(counts, True, key=lambda count: string in tokenizer.decode(ids[first:count]))]


# --- what stands between marks ----------------------------------------------------------------------------------------

_MARK = re.compile(r"<(/?)(tool_call|code|think)>")
_FENCE = "```"
_PYTHON = re.compile(r"((i?python|py)[\d.]*)?", re.IGNORECASE)  # what a fence around a program may say


class Marked(NamedTuple):
    """What a text has between `<tag>` and `</tag>`; `fault` is `opened` or `closed` where the other one is missing."""

    tag: str
    inside: str
    start: int
    stop: int
    fault: str = ""


def marked(text: str, *tags: str) -> list[Marked]:
    """What a turn has between these tags, in order.

    What stands in a thought that was closed was only thought of. A thought ends where there are as many `</think>` as
    `<think>`, or else at the last one; in one that goes on, calls are calls. Inside a call other marks are text, but
    for `<tool_call>`, which begins another one.
    """
    found: list[Marked] = []
    opened: re.Match[str] | None = None
    depth, last_end = 0, text.rfind("</think>")  # of thoughts
    for mark in _MARK.finditer(text):
        closes, tag = bool(mark[1]), mark[2]
        if depth:
            if tag == "think":
                depth = 0 if mark.start() == last_end else depth + (-1 if closes else 1)
        elif opened and closes and tag == opened[2]:
            found.append(Marked(tag, text[opened.end() : mark.start()], opened.start(), mark.end()))
            opened = None
        elif tag == "think":
            depth = int(not opened and not closes and mark.start() < last_end)
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
    """Which of a turn's ids brings the first character of the mark that begins at each of these places of its text.

    Marks begin with `<`, and each of these comes from one id, so they are counted and nothing is decoded again: from
    the end, since the text may begin with a `<think>` that the ids have not.
    """
    bringing = [place for place, i in enumerate(turn_ids) for _ in range(tokenizer.brackets.get(i, 0))]
    return [bringing[-text.count("<", start)] for start in starts]


def unfenced(text: str) -> tuple[str, str | None]:
    """What the one fence around a text holds, and the word that it opens with; without one the text, and None."""
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
    """Ids of a prompt that shows the tools as the template does, or in words where the template leaves them out."""
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
    """The `<tool_call>`s in the text of a turn, in order; empty when the turn holds none."""
    unfinished = ToolCall(error="unfinished call: <tool_call> without </tool_call>")
    found = [part for part in marked(text, "tool_call") if part.fault != "closed"]
    return [replace(unfinished if part.fault else read_call(part.inside), start=part.start) for part in found]


def read_call(text: str) -> ToolCall:
    """What stands between `<tool_call>` and `</tool_call>`: JSON, or what teachers and served models write for it."""
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
    """JSON, with its slips repaired that are common and leave no doubt, and which ones there were.

    Raises:
        ValueError, RecursionError: as `json.loads`, of the text as it is.
    """
    try:
        return json.loads(text), []
    except json.JSONDecodeError:
        pass
    try:
        return json.loads(text, strict=False), ["a line's end or a tab in a string must be escaped"]
    except json.JSONDecodeError as error:
        as_it_is = error
    body, word = unfenced(text)
    repairs = [f"the JSON stands between {_FENCE}"] if word is not None else []
    body = body.strip()
    if body.startswith("{{") and body.endswith("}}"):
        body = body[1:-1]
        repairs.append("the outer braces are doubled")
    if (escaped := _ESCAPE.sub(_escape, body)) != body:
        body = escaped
        repairs.append("a backslash in a string must be doubled")
    body += "}"  # one that is missing, or one more to be left over
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(body)
    except json.JSONDecodeError:
        raise as_it_is from None
    left = body[end:].strip()
    if not value or left not in ("", "}", "}}"):
        raise as_it_is
    return value, repairs + ([] if left == "}" else ["there is a closing brace too many or too few"])


def _escape(match: re.Match[str]) -> str:
    r"""An escape as JSON has it: `\'` is only a quote, and before what JSON does not know a backslash is one."""
    if match[1] in '"\\/bfnrtu':
        return match[0]
    return "'" if match[1] == "'" else f"\\{match[0]}"


def _arguments_in(text: str, name: object) -> dict | None:
    """The arguments that a string stands for: JSON, or the program alone."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    return {"code": text} if name == CODE_TOOL and text.strip() and not text.lstrip().startswith("{") else None


def policy_turn_text(message: dict, turn_end: str = QWEN.turn_end) -> str:
    """The text that a policy would have sampled for an assistant message, the end of its turn included."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    parts = ([message["content"]] if message.get("content") else []) + calls
    return "\n".join(parts) + turn_end


def hermes_segment(tokenizer: Tokenizer, turn_ids: list[int], outputs: list[str]) -> list[int]:
    """Ids of the turn of the environment that answers a turn, whatever that said."""
    return tool_segment(tokenizer, outputs)


def hermes_written(
    tokenizer: Tokenizer, message: dict, outputs: list[str], tool_prompt: str = ""
) -> list[tuple[list[int], bool]]:
    """A demonstrated turn with all of its calls, and the segment that answers them."""
    said = tokenizer.encode(policy_turn_text(message, tokenizer.family.turn_end))
    return [(said, True), *([(tool_segment(tokenizer, outputs), False)] if outputs else [])]


# --- retool -----------------------------------------------------------------------------------------------------------

# The errors below name no tag as it is written: shown to the policy, a mark is broken up (`chat.defuse`).
_CODE_END = "</code>"
_FENCE_LINE = re.compile(r"^[ \t]*```", re.MULTILINE)


def tool_prompt_of(tokenizer: Tokenizer, tool_prompt: str) -> str:
    """What stands before a question: a text of the run's own, `paper`, or by default a short one.

    The miniature keeps the paper's by default: its numbers were measured with it.
    """
    if tool_prompt == "paper" or (not tool_prompt and tokenizer.is_miniature):
        return PAPER_PROMPT
    return tool_prompt.rstrip() + "\n\n" if tool_prompt else TOOL_PROMPT


def retool_prompt(tokenizer: Tokenizer, messages: list[dict], tools: list[dict], tool_prompt: str = "") -> list[int]:
    """Ids of a prompt whose last message, the question, comes with the explanation of `<code>`.

    Raises:
        UserError: there are other tools than the interpreter.
    """
    if not tools:
        return prompt_ids(tokenizer, messages)
    if others := [tool["function"]["name"] for tool in tools if tool["function"]["name"] != CODE_TOOL]:
        raise UserError(
            f"rollout.grammar=retool calls {CODE_TOOL} only and has no way to write a call of {', '.join(others)}; set"
            " rollout.grammar=hermes, or leave the tool out"
        )
    *before, question = messages
    asked = tool_prompt_of(tokenizer, tool_prompt) + question["content"]
    return prompt_ids(tokenizer, [*before, question | {"content": asked}])


def retool_calls(text: str) -> list[ToolCall]:
    """The `<code>`s in the text of a turn, in order; empty when the turn holds none."""
    faults = {
        "closed": ToolCall(error="malformed call: the code tag was closed and never opened"),
        "opened": ToolCall(error="unfinished call: the code tag was opened and never closed"),
    }
    return [
        replace(faults[part.fault] if part.fault else read_code(part.inside), start=part.start)
        for part in marked(text, "code")
    ]


def read_code(inside: str) -> ToolCall:
    """What stands between `<code>` and `</code>`: one fenced block, or the bare program."""
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


def retool_written(
    tokenizer: Tokenizer, message: dict, outputs: list[str], tool_prompt: str = ""
) -> list[tuple[list[int], bool]]:
    """A demonstrated turn: each call with its answer in place; without a call the answer as the prompt asks for it.

    Raises:
        UserError: a call of another tool, or one that would not be read as it was meant.
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
    r"""A final turn as the paper's prompt asks for it: a `\boxed{...}` at its end between answer tags, on its own."""
    before, box, inside = text.rstrip(" \n.").rpartition("\\boxed{")
    depths = [*accumulate(({"{": 1, "}": -1}.get(c, 0) for c in _ESCAPE.sub("", inside)), initial=1)]
    if not box or "<answer>" in text or depths.count(0) != 1 or depths[-1]:
        return text
    return "\n".join(filter(None, (before.rstrip(), f"<answer>\n{box}{inside}\n</answer>")))


DEFAULT_GRAMMAR = "hermes"  # that of the chat templates
GRAMMARS = {
    "hermes": Grammar(hermes_prompt, tool_calls, hermes_segment, hermes_written),
    "retool": Grammar(retool_prompt, retool_calls, retool_segment, retool_written, stop=_CODE_END),
}
