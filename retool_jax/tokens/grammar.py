"""How a policy calls tools, and how it is answered: two grammars with one interface.

`hermes` is the tool calling of Qwen's chat template: `<tool_call>` JSON `</tool_call>`, any number of calls in one
turn, answered together in a turn of their own. `retool` is the text form of the ReTool paper (arXiv 2504.11536, 3.1):
the policy stops at `</code>`, reads what its program printed between `<interpreter>` and `</interpreter>`, and goes on
in the same turn. It knows no other tool than the interpreter.

Only ids that the policy sampled are ever parsed, so nothing in a tool's output can become a call. A call that
cannot be read is still a call: it is answered with an error that says what was expected. Whether there is such a tool,
and what arguments it takes, is not known here (`retool_jax.tools`).
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.tokens.chat import environment_ids, prompt_ids, tool_segment
from retool_jax.tokens.tokenizer import FAMILIES, QWEN, Tokenizer

CODE_TOOL = "code_interpreter"  # the tool that <code> calls
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
    """One call of a turn as it was written, or the error that answers what cannot be read.

    `name` and `arguments` are any JSON: nobody has looked yet whether there is such a tool.
    """

    name: object = None
    arguments: object = None
    error: str | None = None

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


@dataclass(frozen=True)
class Grammar:
    """One way to call tools, as pure functions over a tokenizer.

    `prompt(tokenizer, messages, tools)` gives the ids up to the policy's first token, the tools (JSON schemas as
    `{"type": "function", "function": ...}`) explained in them; `calls(tokenizer, turn_ids)` the calls of one sampled
    turn in order; `segment(tokenizer, turn_ids, outputs)` the ids that answer them, one output per call;
    `stop_ids(tokenizer)` the ids at which a turn ends, which the engine watches for; `stop_at(tokenizer, turn_ids,
    seen)` how many of a turn's ids stand before the end that a string in them makes, None without one, when the first
    `seen` are known to hold none; `written(tokenizer, message, outputs)` a demonstrated turn and its answers as pieces
    of (ids, whether a policy would have sampled them).
    """

    prompt: Callable[[Tokenizer, list[dict], list[dict]], list[int]]
    calls: Callable[[Tokenizer, list[int]], list[ToolCall]]
    segment: Callable[[Tokenizer, list[int], list[str]], list[int]]
    stop_ids: Callable[[Tokenizer], tuple[int, ...]]
    stop_at: Callable[[Tokenizer, list[int], int], int | None]
    written: Callable[[Tokenizer, dict, list[str]], list[tuple[list[int], bool]]]


# --- hermes -----------------------------------------------------------------------------------------------------------


def hermes_prompt(tokenizer: Tokenizer, messages: list[dict], tools: list[dict]) -> list[int]:
    """Ids of a prompt that shows the tools as the template does, or in words where the template leaves them out."""
    if tools and not tokenizer.family.writes_tools:
        return prompt_ids(tokenizer, _with_tools_in_words(messages, tools))
    return tokenizer.encode(tokenizer.render(messages, tools, generation_prompt=True))


def _with_tools_in_words(messages: list[dict], tools: list[dict]) -> list[dict]:
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    words = (
        "You may call a function while you work on the answer. To call it, write its name and arguments as JSON, like"
        ' this, and end your turn:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        f"What it returns is shown to you before you go on. The functions that you may call:\n{schemas}"
    )
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{words}"}, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]


def tool_calls(tokenizer: Tokenizer, turn_ids: list[int]) -> list[ToolCall]:
    """The `<tool_call>`s in one sampled turn, in order; empty when the turn holds none."""
    opening, closing = tokenizer.id_of("<tool_call>"), tokenizer.id_of("</tool_call>")
    unfinished = ToolCall(error="unfinished call: <tool_call> without </tool_call>")
    calls = []
    start = None
    for position, index in enumerate(turn_ids):
        if index == opening:
            if start is not None:
                calls.append(unfinished)
            start = position + 1
        elif index == closing and start is not None:
            calls.append(read_call(tokenizer.decode(turn_ids[start:position])))
            start = None
    if start is not None:
        calls.append(unfinished)
    return calls


def read_call(text: str) -> ToolCall:
    """What stands between `<tool_call>` and `</tool_call>`."""
    try:
        call = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return ToolCall(error=f"malformed call: {error.msg} at character {error.pos}; expected a JSON object")
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested thousands deep
        return ToolCall(error="malformed call: too long a number or too deep a nesting; expected a JSON object")
    if not isinstance(call, dict):
        return ToolCall(error="malformed call: expected a JSON object with name and arguments")
    return ToolCall(call.get("name"), call.get("arguments"))


def policy_turn_text(message: dict, turn_end: str = QWEN.turn_end) -> str:
    """The text that a policy would have sampled for an assistant message, the end of its turn included."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    parts = ([message["content"]] if message.get("content") else []) + calls
    return "\n".join(parts) + turn_end


def hermes_written(tokenizer: Tokenizer, message: dict, outputs: list[str]) -> list[tuple[list[int], bool]]:
    """A demonstrated turn with all of its calls, and the segment that answers them."""
    said = tokenizer.encode(policy_turn_text(message, tokenizer.family.turn_end))
    return [(said, True), *([(tool_segment(tokenizer, outputs), False)] if outputs else [])]


# --- retool -----------------------------------------------------------------------------------------------------------

# The errors below name no tag as it is written: shown to the policy, a mark is broken up (`chat.defuse`).
_CODE = re.compile(r"<code>(.*?)(</code>|\Z)|</code>", re.DOTALL)
_FENCE = "```"
_CODE_END = "</code>"
_FENCE_LINE = re.compile(r"^[ \t]*```", re.MULTILINE)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def retool_prompt(tokenizer: Tokenizer, messages: list[dict], tools: list[dict]) -> list[int]:
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
    question = messages[-1]
    return prompt_ids(tokenizer, [*messages[:-1], question | {"content": RETOOL_PROMPT + question["content"]}])


def retool_calls(tokenizer: Tokenizer, turn_ids: list[int]) -> list[ToolCall]:
    """The `<code>`s in one sampled turn, in order; empty when the turn holds none.

    Inside stands one fenced block, or the bare program.
    """
    return _calls_in(tokenizer.decode(turn_ids))


def _calls_in(text: str) -> list[ToolCall]:
    calls = []
    for match in _CODE.finditer(text):
        if match[1] is None:
            calls.append(ToolCall(error="malformed call: the code tag was closed and never opened"))
        elif not match[2]:
            calls.append(ToolCall(error="unfinished call: the code tag was opened and never closed"))
        else:
            calls.append(read_code(match[1]))
    return calls


def read_code(inside: str) -> ToolCall:
    """What stands between `<code>` and `</code>`."""
    expected = "expected one ```python block between the code tags"
    first, newline, rest = inside.strip().partition("\n")
    if newline and rest.endswith(_FENCE) and first.rstrip(" \t") in (_FENCE, f"{_FENCE}python", f"{_FENCE}py"):
        code = rest.removesuffix(_FENCE).rstrip(" \t").removesuffix("\n")
    else:
        code = inside.strip("\n")
    if _FENCE_LINE.search(code):
        return ToolCall(error=f"malformed call: the code block is not closed, or not the only one; {expected}")
    if not code.strip():
        return ToolCall(error=f"malformed call: there is no code; {expected}")
    return ToolCall(CODE_TOOL, {"code": code})


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
    return counts[bisect_left(counts, True, key=lambda count: _CODE_END in tokenizer.decode(turn_ids[first:count]))]


def retool_written(tokenizer: Tokenizer, message: dict, outputs: list[str]) -> list[tuple[list[int], bool]]:
    """A demonstrated turn: each call with its answer in place; without a call the answer in its tags, and the end.

    Raises:
        UserError: a call of another tool, or one that would not be read as it was meant.
    """
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = message.get("content") or ""
    if not calls:
        return [(tokenizer.encode(_answer_in_tags(said) + tokenizer.family.turn_end), True)]
    if len(outputs) != len(calls):
        raise UserError(f"a turn with {len(calls)} calls has {len(outputs)} outputs; each call needs one")
    pieces: list[tuple[list[int], bool]] = []
    for call, output in zip(calls, outputs, strict=True):
        text = "\n".join(filter(None, (said, f"<code>\n```python\n{call['arguments'].get('code')}\n```\n{_CODE_END}")))
        if _calls_in(text) != [ToolCall(call["name"], call["arguments"])]:
            raise UserError(
                "a turn cannot be written in the retool grammar: it calls another tool, or its text or code holds a"
                " code tag or a line that begins with ```; leave the row out, or use the hermes grammar"
            )
        ids = tokenizer.encode(text)
        pieces += [(ids, True), (retool_segment(tokenizer, ids, [output]), False)]
        said = ""
    return pieces


def _answer_in_tags(text: str) -> str:
    r"""A final turn as the prompt asks for it: a `\boxed{...}` at its end stands between answer tags, on its own."""
    begin = text.rfind("\\boxed{")
    if begin < 0 or "<answer>" in text:
        return text
    depth = 0
    for brace in _BRACE.finditer(text, begin + len("\\boxed")):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            if text[brace.end() :].strip(" \n."):  # something is said after it
                return text
            before = text[:begin].rstrip()
            return "\n".join(filter(None, (before, f"<answer>\n{text[begin : brace.end()]}\n</answer>")))
    return text


DEFAULT_GRAMMAR = "hermes"  # that of the chat templates
GRAMMARS = {
    "hermes": Grammar(
        prompt=hermes_prompt,
        calls=tool_calls,
        segment=lambda tokenizer, turn_ids, outputs: tool_segment(tokenizer, outputs),
        stop_ids=lambda tokenizer: tokenizer.stop_ids,
        stop_at=lambda tokenizer, turn_ids, seen: None,
        written=hermes_written,
    ),
    "retool": Grammar(retool_prompt, retool_calls, retool_segment, retool_stop_ids, retool_stop_at, retool_written),
}


# --- shown to people --------------------------------------------------------------------------------------------------

_MARKS = re.compile(r"<tool_call>|</tool_call>|<code>|</code>")
_FRAMES = re.compile(
    "|".join([r"<\|im_start\|>(?:assistant\n?)?", *(re.escape(mark) for family in FAMILIES for mark in family.stops)])
)
# What an answer stands between; a segment has answers of one kind.
_OUTPUTS = (
    *((family.output_open, family.output_close) for family in FAMILIES),
    ("<interpreter>\n", "\n</interpreter>"),
)


@dataclass(frozen=True)
class Shown:
    """A piece of a policy's turn for people: `kind` is `said` or `call`; `fault` says why a call cannot be read."""

    kind: str
    text: str
    fault: str = ""


def show_turn(text: str) -> list[Shown]:
    """A turn of either grammar, decoded, in pieces: what was said, and each call as a program or as name and arguments.

    An opening mark without its end is words. Marks of turns are left out, and so are words of nothing but space.
    """
    pieces, last, opened = [], 0, None
    for mark in _MARKS.finditer(text):
        name = mark[0].strip("</>")
        if not mark[0].startswith("</"):
            if opened is None or name == "tool_call":
                opened = mark
        elif opened is not None and opened[0].strip("</>") == name:
            pieces += [_show_words(text[last : opened.start()]), _show_call(name, text[opened.end() : mark.start()])]
            last, opened = mark.end(), None
    return [piece for piece in (*pieces, _show_words(text[last:])) if piece.kind == "call" or piece.text.strip()]


def _show_words(text: str) -> Shown:
    return Shown("said", _FRAMES.sub("", text).strip("\n"))


def _show_call(tag: str, inside: str) -> Shown:
    inside = inside.strip()
    call = read_code(inside) if tag == "code" else read_call(inside)
    if call.error or not isinstance(call.name, str) or not isinstance(call.arguments, dict):
        return Shown("call", inside, call.error or "not a well-formed call")
    return Shown("call", call.code if call.name == CODE_TOOL else f"{call.name} {call.code}")


def show_outputs(text: str) -> list[str]:
    """What the tools answered, from the decoded segment that answers a turn; the whole segment where it holds none.

    An output ends at the last closing mark before the next one begins, so that a mark inside of it cuts nothing off.
    """
    for opening, closing in _OUTPUTS:
        _, *pieces = text.split(opening)
        if found := [piece.rpartition(closing)[0] for piece in pieces if closing in piece]:
            return found
    return [_FRAMES.sub("", text)]
