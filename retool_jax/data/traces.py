r"""Demonstrations for the cold start: published conversations as chat messages with tool calls.

Two forms are read: the raw form of JoeYing/ReTool-SFT, which is a prompt and one text with `<code>` and
`<interpreter>`, and the multi-turn form with tool calls and tool turns. Both become messages that
`tokens.demonstrations.demonstration_ids` turns into ids and mask in any grammar. The question has the same instruction
as in RL.

The paper checks its cold-start data in two stages, form and answer (arXiv 2504.11536, section 3.2). Here `conversation`
and `boxed_answer` check the form, and the reward's verdict checks the answer. `rerun_calls` checks whether the code
prints the recorded outputs.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile

from retool_jax.answers import extract_boxed
from retool_jax.data.instructions import prompt_of, question_of, without_instructions
from retool_jax.data.rows import conversation_in, is_text, true_answer, unpacked
from retool_jax.errors import UserError
from retool_jax.sandbox import Sandbox, tool_text
from retool_jax.tokens.demonstrations import Unreadable, holds_control, is_transcript, read_transcript
from retool_jax.tokens.grammar import CODE_TOOL

MAX_OUTPUT = 1 << 16  # characters of an output that are compared
THINKING = ("reasoning_content", "reasoning", "thinking")  # fields for thinking in servers' answers and data sets


class BadTrace(Exception):
    """A row cannot be a demonstration. The message is one of a few fixed reasons, so that reasons can be counted."""


# --- rows to messages -------------------------------------------------------------------------------------------------


def conversation(row: dict) -> list[dict]:
    """The chat messages of one row of either form, with strings as content and each call's `arguments` as a dict.

    The user's turn is reduced to its question and our instruction. A system turn loses sentences that ask for a form of
    the answer. Schemas in a row's own `tools` are ignored: the prompt shows those of the run.

    Raises:
        BadTrace: it cannot be converted, with the reason.
    """
    system, user, policy = _parts(row)
    if len(policy) == 1 and not policy[0].get("tool_calls"):
        try:
            first, *others = read_transcript(policy[0]["content"])
        except Unreadable as reason:
            raise BadTrace(str(reason)) from None
        policy = [policy[0] | first, *others]
    question = question_of(user["content"])
    if not question:
        raise BadTrace("no question")
    return _checked(without_instructions(system), {"role": "user", "content": prompt_of(question)}, policy)


def messages_of(row: dict, tools: Collection[str] = (CODE_TOOL,)) -> list[dict]:
    """The messages of a row of the multi-turn form, with the user's turn unchanged and calls of these tools only.

    Raises:
        BadTrace: it cannot be a demonstration, or it has the raw form, whose prompt asks for another kind of call.
    """
    system, user, policy = _parts(row, tools)
    if any(is_transcript(turn["content"]) for turn in policy):
        raise BadTrace("the raw form with <code> and <interpreter>")
    return _checked(system, user, policy)


def _parts(row: dict, tools: Collection[str] = (CODE_TOOL,)) -> tuple[list[dict], dict, list[dict]]:
    """A list with the system turn, if any; the user's turn; and all following turns, at least one."""
    if row.get("label") is False:  # in TRL's unpaired preferences
        raise BadTrace("a completion that is marked as bad")
    messages = conversation_in(row)
    if messages is None:
        raise BadTrace("no messages")
    turns = [_turn(message, tools) for message in messages]
    start = 1 if turns and turns[0]["role"] == "system" else 0
    if [turn["role"] for turn in turns[start : start + 2]] != ["user", "assistant"]:
        raise BadTrace("no user turn followed by an assistant turn")
    return turns[:start], turns[start], _in_order(turns[start + 1 :])


def _checked(system: list[dict], user: dict, policy: list[dict]) -> list[dict]:
    policy = [_with_thinking(turn) for turn in policy]
    for turn in [*system, user, *policy]:
        texts = [turn["content"]] if turn["role"] != "tool" else []  # outputs are defused when they are encoded
        texts += [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
        if any(map(holds_control, texts)):
            raise BadTrace("a control token in the text")
    if not policy[-1]["content"].rpartition("</think>")[2].strip():
        raise BadTrace("no final answer")
    return [*system, user, *policy]


def _turn(message: dict, tools: Collection[str]) -> dict:
    """One message with only what a template needs, the ids that match calls and outputs, and its thinking."""
    role, content, calls = message["role"], message["content"], _calls(message)
    if isinstance(content, list):
        raise BadTrace("a part that is no text")
    content = "" if content is None and (calls or role == "tool") else content
    if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
        raise BadTrace("a message without role or text")
    if any(message.get(key) for key in ("refusal", "audio", "images", "videos")):
        raise BadTrace("a message with more than text")
    turn = {"role": role, "content": content}
    if role == "tool" and message.get("tool_call_id") is not None:
        turn["id"] = str(message["tool_call_id"])
    if thinking := _thinking(message):
        turn["thinking"] = thinking
    if role == "assistant":
        if any(message.get(key) in (0, False) for key in ("weight", "loss_mask")):  # OpenAI's and verl's
            raise BadTrace("a turn that is not to be learned")
        if calls:
            turn["tool_calls"] = [_tool_call(call, tools) for call in calls]
    return turn


def _calls(message: dict) -> list:
    """The calls of a message, also the single call of OpenAI's older form."""
    calls = unpacked(message.get("tool_calls")) or []
    if not isinstance(calls, list):
        raise BadTrace("calls that are no list")
    return [*calls, *([{"function": message["function_call"]}] if message.get("function_call") else [])]


def _tool_call(call: object, tools: Collection[str]) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadTrace("a call without a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's form; Qwen2.5's template would encode it a second time
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise BadTrace("arguments that are not JSON") from None
    name = function.get("name")
    if name not in tools:
        raise BadTrace("a call of another tool")
    if name == CODE_TOOL:
        code = arguments.get("code") if isinstance(arguments, dict) else None
        if not is_text(code):
            raise BadTrace("empty code")
        arguments = {"code": code}
    elif not isinstance(arguments, dict):
        raise BadTrace("arguments that are no object")
    identity = {} if call.get("id") is None else {"id": str(call["id"])}
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | identity


def _in_order(turns: list[dict]) -> list[dict]:
    """The turns, checked: each call is answered once, in the order of the calls, and the last turn is text."""
    ordered: list[dict] = []
    while turns:
        turn, *turns = turns
        if turn["role"] != "assistant":
            raise BadTrace(f"a {turn['role']} turn after the first answer")
        outputs = list(takewhile(lambda following: following["role"] == "tool", turns))
        turns, calls = turns[len(outputs) :], turn.get("tool_calls", [])
        outputs = _by_call(calls, outputs)
        if len(outputs) > len(calls):
            raise BadTrace("an output without its call")
        if turns and len(outputs) < len(calls):
            raise BadTrace("code without its output")
        if turns and not calls:
            raise BadTrace("a turn after the final answer")
        ordered += [turn, *outputs]
    if ordered[-1]["role"] != "assistant" or ordered[-1].get("tool_calls"):
        raise BadTrace("no final answer")
    return ordered


def _by_call(calls: list[dict], outputs: list[dict]) -> list[dict]:
    """The outputs in the order of one turn's calls, matched by their ids. The ids are removed from both."""
    wanted = [call.pop("id", None) for call in calls]
    given = [output.pop("id", None) for output in outputs]
    if not any(given):
        return outputs
    if not all(given):
        raise BadTrace("outputs with and without tool_call_id")
    if len(set(given)) < len(given):
        raise BadTrace("two outputs with one tool_call_id")
    if set(given) - set(wanted):
        raise BadTrace("an output with an unknown tool_call_id")
    if len(set(wanted)) < len(wanted):
        raise BadTrace("two calls with one id")
    return [outputs[given.index(identity)] for identity in wanted if identity in given]


def _thinking(message: dict) -> str:
    """The thinking that a message has in a separate field."""
    found = [message[key] for key in THINKING if message.get(key)]
    if not all(isinstance(text, str) for text in found):
        raise BadTrace("thinking that is no text")
    texts = {text.strip() for text in found} - {""}
    if len(texts) > 1:
        raise BadTrace("two different thinkings in one turn")
    if texts and message["role"] != "assistant":
        raise BadTrace("thinking in a turn that is not the policy's")
    return "".join(texts)


def _with_thinking(turn: dict) -> dict:
    """A policy's turn with its thinking before its text, in the form of Qwen3's and DeepSeek-R1's turns."""
    turn = dict(turn)
    thinking = turn.pop("thinking", "")
    if not thinking:
        return turn
    if "think>" in thinking or is_transcript(thinking):
        raise BadTrace("marks of thinking or calls inside of the thinking")
    if "<think>" in turn["content"]:
        raise BadTrace("two different thinkings in one turn")
    # Only one newline if there is no text: a call is written with a newline before it.
    text = "\n" + turn["content"].lstrip("\n") if turn["content"] else ""
    return turn | {"content": f"<think>\n{thinking}\n</think>\n{text}"}


# --- verification -----------------------------------------------------------------------------------------------------


def boxed_answer(messages: list[dict]) -> str:
    """The content of the last box of the final turn, found by the reward's rule.

    Raises:
        BadTrace: there is no box, or it is unterminated or empty.
    """
    answer, reason = extract_boxed(messages[-1]["content"])
    if answer is None:
        raise BadTrace({"no_box": "no box in the final turn", "unterminated_box": "an unterminated box"}[reason])
    if not answer.strip():
        raise BadTrace("an empty box")
    return answer


def truth_of(row: dict) -> str | None:
    """The ground truth in a row; None if there is none that can be read."""
    try:
        return true_answer(row, "the row")
    except UserError:
        return None


@dataclass(frozen=True)
class Rerun:
    """One recorded output and the real output of the same code.

    Attributes:
        verdict: `same` (except for white space at line ends), `same error` (both end in the same exception, and the
            rest differs), `differs`, or `not run` (the sandbox failed, which says nothing).
    """

    call: int
    verdict: str
    recorded: str
    real: str


async def rerun_calls(messages: list[dict], box: Sandbox) -> list[Rerun]:
    """Run every call of a conversation in a fresh interpreter, and compare its recorded output with the real one."""
    calls = [call["function"]["arguments"]["code"] for turn in messages for call in turn.get("tool_calls", ())]
    recorded = [turn["content"] for turn in messages if turn["role"] == "tool"]
    reruns = []
    for number, (code, output) in enumerate(zip(calls, recorded, strict=True)):
        result = await box.run(code)
        if result.status in ("infra_error", "cancelled", "rejected"):
            reruns.append(Rerun(number, "not run", output, result.message))
            continue
        real = tool_text(result, MAX_OUTPUT)
        # An empty output is described to a model in words; old recordings have nothing there.
        printed = result.stdout if result.status == "success" else real
        reruns.append(Rerun(number, compare_outputs(output, printed, result.status), output, real))
    return reruns


def compare_outputs(recorded: str, real: str, status: str) -> str:
    """`same`, `same error` or `differs`; see `Rerun`. `status` is the sandbox's."""
    left, right = ([line.rstrip() for line in text.strip().split("\n")] for text in (recorded, real))
    if left == right:
        return "same"
    return "same error" if status == "user_error" and left[-1] and left[-1] == right[-1] else "differs"
