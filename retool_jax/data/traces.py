r"""Demonstrations for the cold start: published ReTool trajectories as chat messages with tool calls.

Two forms are read: the raw one of JoeYing/ReTool-SFT, a prompt and one text with `<code>` and `<interpreter>`, and the
multi-turn one with `messages`, `tool_calls` and tool turns. Both become messages that
`tokens.demonstrations.demonstration_ids` turns into ids and mask in any grammar, with the question asked by the same
sentence as in RL.

The paper checks its cold-start data in two stages, form and answer (arXiv 2504.11536, section 3.2). The first is
`conversation` and `boxed_answer`; for the second, and to see whether the recorded outputs are what the code prints,
there are `check_answer` and `run_again`.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass

from retool_jax.answers import Verdict, check, extract_boxed
from retool_jax.data.problems import prompt_of, question_of
from retool_jax.sandbox import Sandbox, tool_text
from retool_jax.tokens.demonstrations import Unreadable, holds_control, is_transcript, read_transcript
from retool_jax.tokens.grammar import CODE_TOOL

MAX_OUTPUT = 1 << 16  # characters of an output that are compared


class BadTrace(Exception):
    """A row that cannot be a demonstration. The message is one of a few fixed reasons, to be counted by."""


# --- rows to messages -------------------------------------------------------------------------------------------------


def conversation(row: dict) -> list[dict]:
    """The chat messages of one row of either form: strings as content, calls with `arguments` as a dict.

    The user's turn is reduced to its question and our instruction. Schemas in a row's own `tools` are ignored: those
    in the prompt are RL's.

    Raises:
        BadTrace: why it cannot be converted.
    """
    system, user, policy = _parts(row)
    if len(policy) == 1 and not policy[0].get("tool_calls"):
        try:
            policy = read_transcript(policy[0]["content"])
        except Unreadable as reason:
            raise BadTrace(str(reason)) from None
    question = question_of(user["content"])
    if not question:
        raise BadTrace("no question")
    return _checked(system, {"role": "user", "content": prompt_of(question)}, policy)


def messages_of(row: dict, tools: Collection[str] = (CODE_TOOL,)) -> list[dict]:
    """The messages of a row of the multi-turn form, the user's turn as it stands there, with calls of these tools.

    Raises:
        BadTrace: it cannot be learned from, or it is of the raw form, whose prompt asks for another kind of call.
    """
    system, user, policy = _parts(row, tools)
    if any(is_transcript(turn["content"]) for turn in policy):
        raise BadTrace("the raw form with <code> and <interpreter>")
    return _checked(system, user, policy)


def _parts(row: dict, tools: Collection[str] = (CODE_TOOL,)) -> tuple[list[dict], dict, list[dict]]:
    """The system turn in a list, or none; the user's turn; and all that follows, at least one turn."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadTrace("no messages")
    turns = [_turn(message, tools) for message in messages]
    start = 1 if turns and turns[0]["role"] == "system" else 0
    if [turn["role"] for turn in turns[start : start + 2]] != ["user", "assistant"]:
        raise BadTrace("no user turn followed by an assistant turn")
    return turns[:start], turns[start], turns[start + 1 :]


def _checked(system: list[dict], user: dict, policy: list[dict]) -> list[dict]:
    _check_order(policy)
    for turn in [*system, user, *policy]:
        texts = [turn["content"]] if turn["role"] != "tool" else []  # outputs are defused when they are encoded
        texts += [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
        if any(map(holds_control, texts)):
            raise BadTrace("a control token in the text")
    return [*system, user, *policy]


def _turn(message: dict, tools: Collection[str]) -> dict:
    """One message of the multi-turn form, with nothing in it but what a template needs."""
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    content = "" if content is None and (calls or role == "tool") else content
    if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
        raise BadTrace("a message without role or text")
    turn = {"role": role, "content": content}
    if role == "assistant" and calls:
        turn["tool_calls"] = [_tool_call(call, tools) for call in calls]
    return turn


def _tool_call(call: object, tools: Collection[str]) -> dict:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadTrace("a call without a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's form; Qwen2.5's template would encode it a second time
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadTrace("arguments that are not JSON") from None
    name = function.get("name")
    if name not in tools:
        raise BadTrace("a call of another tool")
    if name == CODE_TOOL:
        code = arguments.get("code") if isinstance(arguments, dict) else None
        if not isinstance(code, str) or not code.strip():
            raise BadTrace("empty code")
        arguments = {"code": code}
    elif not isinstance(arguments, dict):
        raise BadTrace("arguments that are no object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _check_order(policy: list[dict]) -> None:
    """After the question: assistant turns, each call answered once, the last one with words and no call."""
    waiting = 0
    for position, turn in enumerate(policy):
        if turn["role"] == "tool":
            waiting -= 1
            if waiting < 0:
                raise BadTrace("an output without its call")
        elif turn["role"] != "assistant":
            raise BadTrace(f"a {turn['role']} turn after the first answer")
        elif waiting:
            raise BadTrace("code without its output")
        else:
            waiting = len(turn.get("tool_calls", ()))
            if not waiting and position < len(policy) - 1:
                raise BadTrace("a turn after the final answer")
    if policy[-1]["role"] != "assistant" or waiting:
        raise BadTrace("no final answer")
    if not policy[-1]["content"].strip():
        raise BadTrace("no final answer")


# --- verification -----------------------------------------------------------------------------------------------------


def boxed_answer(messages: list[dict]) -> str:
    """What stands in the last box of the final turn, by the reward's own rule.

    Raises:
        BadTrace: no box there, an unterminated or an empty one.
    """
    answer, reason = extract_boxed(messages[-1]["content"])
    if answer is None:
        raise BadTrace({"no_box": "no box in the final turn", "unterminated_box": "an unterminated box"}[reason])
    if not answer.strip():
        raise BadTrace("an empty box")
    return answer


def check_answer(messages: list[dict], truth: str) -> Verdict:
    """The reward's verdict on the final turn."""
    return check(messages[-1]["content"], truth)


def truth_of(row: dict) -> str | None:
    """The ground truth that a row brings along, if it does."""
    reward = row.get("reward_model")
    found = [
        reward.get("ground_truth") if isinstance(reward, dict) else None,
        row.get("ground_truth"),
        row.get("answer"),
    ]
    return next((str(value).strip() for value in found if value is not None and str(value).strip()), None)


@dataclass(frozen=True)
class Rerun:
    """One recorded output beside what the code prints here.

    Attributes:
        verdict: `same` (up to white space at line ends), `same error` (both end in the same exception, told in other
            words), `differs`, or `not run` (the sandbox failed, which says nothing).
    """

    call: int
    verdict: str
    recorded: str
    real: str


async def run_again(messages: list[dict], box: Sandbox) -> list[Rerun]:
    """Run every call of a conversation and compare its recorded output with the real one; each call starts afresh."""
    calls = [call["function"]["arguments"]["code"] for turn in messages for call in turn.get("tool_calls", ())]
    recorded = [turn["content"] for turn in messages if turn["role"] == "tool"]
    reruns = []
    for number, (code, output) in enumerate(zip(calls, recorded, strict=True)):
        result = await box.run(code)
        if result.status in ("infra_error", "cancelled", "rejected"):
            reruns.append(Rerun(number, "not run", output, result.message))
            continue
        told = tool_text(result, MAX_OUTPUT)
        # Nothing printed is told to a model in words, which old recordings did not do.
        printed = result.stdout if result.status == "success" else told
        reruns.append(Rerun(number, compare_outputs(output, printed, result.status), output, told))
    return reruns


def compare_outputs(recorded: str, real: str, status: str) -> str:
    """`same`, `same error` or `differs`; see `Rerun`. `status` is the sandbox's."""
    left, right = ([line.rstrip() for line in text.strip().split("\n")] for text in (recorded, real))
    if left == right:
        return "same"
    return "same error" if status == "user_error" and left[-1] and left[-1] == right[-1] else "differs"
