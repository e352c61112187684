"""Published trajectories become messages with calls, or are refused with a reason; verification finds false outputs."""

import asyncio
import json

import pytest

from retool_jax.answers import check
from retool_jax.data.instructions import INSTRUCTION
from retool_jax.data.traces import (
    BadTrace,
    boxed_answer,
    compare_outputs,
    conversation,
    messages_of,
    rerun_calls,
    truth_of,
)
from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.grammar import tool_calls
from retool_jax.tokens.tokenizer import R1
from retool_jax.tools.python import Python

# The prompt of ReTool-SFT: the part in every row, and what the raw rows have around it.
QUESTION = (
    "Answer the following Math Problem and put the answer in the format of \\boxed{answer}\n\n%s\n\n\n"
    "Remember to place the final answer in the last part using the format: \n"
)
PROMPT = (
    "Solve the following problem step by step. You now have the ability to selectively write executable Python code to "
    "enhance your reasoning process. The Python code will be executed by an external sandbox, and the output (wrapped "
    "in `<interpreter>output_str</interpreter>`) can be returned to aid your reasoning and help you arrive at the "
    "final answer. The Python code should be complete scripts, including necessary imports. \n"
    "Each code snippet is wrapped with `<code>\n```python\ncode snippet\n```\n</code>`.\n"
    "The last part of your response should be in the following format:\n"
    "<answer>\n\\boxed{'The final answer goes here.'}\n</answer>\n\n"
    f"*user question:*\n{QUESTION}<answer>\n\\boxed{{'The final answer goes here.'}}\n</answer>"
)


def step(code: str, output: str, after: str = "\n\n") -> str:
    return f"\n<code>\n```python\n{code}\n```\n</code>\n<interpreter>\n{output}\n</interpreter>{after}"


def end(answer: str = "\\boxed{7}") -> str:
    return f"So it is 7.\n\n<answer>\n{answer}\n</answer>"


def raw(text: str, question: str = "What is 3 + 4?") -> dict:
    messages = [{"role": "user", "content": PROMPT % question}, {"role": "assistant", "content": text}]
    return {"messages": messages}


def shape(messages: list[dict]) -> list[tuple]:
    """(content, code) of a policy turn and (output,) of a tool turn."""
    shapes = []
    for turn in messages[1:]:
        codes = [call["function"]["arguments"]["code"] for call in turn.get("tool_calls", ())]
        shapes.append((turn["content"], *codes) if turn["role"] == "assistant" else (turn["content"], None))
    return shapes


ROWS = {
    "several calls": (
        "First:" + step("print(3)", "3") + "Then:" + step("x = 4\nprint(3 + x)", "7") + end(),
        [("First:", "print(3)"), ("3", None), ("Then:", "x = 4\nprint(3 + x)"), ("7", None)],
    ),
    "two code blocks in a row": (
        step("print(1)", "1", after="\n") + step("print(2)", "2") + end(),
        [("", "print(1)"), ("1", None), ("", "print(2)"), ("2", None)],
    ),
    "an error": (
        "Try:" + step("print(y)", "NameError: name 'y' is not defined") + end(),
        [("Try:", "print(y)"), ("NameError: name 'y' is not defined", None)],
    ),
    "no call": ("By heart. " + end(), []),
    "Chinese": (
        "用程序。" + step("print('检查: é')", "检查: é") + end(),
        [("用程序。", "print('检查: é')"), ("检查: é", None)],
    ),
    "an empty output": (step("x = 7", "") + end(), [("", "x = 7"), ("", None)]),
    "no fence": ("<code>print(7)</code><interpreter>7</interpreter>" + end(), [("", "print(7)"), ("7", None)]),
    "indented code": (
        step("for i in (7,):\n    print(i)\n", "7") + end(),
        [("", "for i in (7,):\n    print(i)"), ("7", None)],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_raw_form_becomes_turns_and_calls(name, tokenizer):
    text, wanted = ROWS[name]
    messages = conversation(raw(text))
    assert messages[0] == {"role": "user", "content": f"What is 3 + 4?\n\n{INSTRUCTION}"}
    final = shape(messages)[-1][0]
    assert shape(messages)[:-1] == wanted and final.endswith("\\boxed{7}") and "<answer>" not in final
    assert boxed_answer(messages) == "7"
    assert conversation({"messages": messages}) == messages == messages_of({"messages": messages})
    # The policy's text contains the calls as a rollout would read them.
    tokens = demonstration_ids(tokenizer, messages, [Python().schema])
    said = [index for index, sampled in zip(tokens.ids, tokens.sampled, strict=True) if sampled]
    codes = [code for _, code in wanted if code is not None]
    assert [call.code for call in tool_calls(tokenizer.decode(said))] == codes
    assert said.count(tokenizer.control_tokens["<|im_end|>"]) == len(codes) + 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<code>\n```python\nprint(7)\n" + end(), "unfinished code"),
        ("<code>\nprint(7)\n<code>\n</code>" + end(), "unfinished code"),
        ("print(7)\n</code>" + end(), "</code> without <code>"),
        ("<code>\nprint(7)\n</code>\n" + end(), "code without its output"),
        ("<code>print(7)</code> so <interpreter>7</interpreter>" + end(), "code without its output"),
        ("<code>print(7)</code><interpreter>7" + end(), "code without its output"),
        ("<interpreter>7</interpreter>" + end(), "a tag without its partner"),
        ("It is 7. <answer>\\boxed{7}", "a tag without its partner"),
        (end() + " Or is it?", "text after the answer"),
        ("<code> </code><interpreter>7</interpreter>" + end(), "empty code"),
        (step("print(1)\n```\n```python\nprint(2)", "1") + end(), "several fences in one code"),
        (step("print(7)", "7"), "no final answer"),
        ("", "no final answer"),
        ("It is 7.<|im_end|>" + end(), "a control token in the text"),
        (f"It is 7.{R1.turn_end}" + end(), "a control token in the text"),
        (step("print('<tool_call>')", "7") + end(), "a control token in the text"),
        ("It is 7.", "no box in the final turn"),
        ("It is \\boxed{7", "an unterminated box"),
        (end("\\boxed{ }"), "an empty box"),
        (step("print('\\\\boxed{7}')", "\\boxed{7}") + "It is 7.", "no box in the final turn"),
    ],
)
def test_a_row_that_cannot_be_converted_has_a_reason(text, reason):
    with pytest.raises(BadTrace, match=f"^{reason}$".replace("\\", "\\\\")):
        boxed_answer(conversation(raw(text)))


def test_an_output_may_hold_any_tag():
    """It is data: only the policy's words open and close calls."""
    messages = conversation(raw(step("print(chr(60) + 'code>')", "<code> <|im_end|> \\boxed{9}") + end()))
    assert shape(messages)[1] == ("<code> <|im_end|> \\boxed{9}", None) and boxed_answer(messages) == "7"


def assistant(content: str | None, *codes: object, name: str = "code_interpreter") -> dict:
    calls = [{"type": "function", "function": {"name": name, "arguments": code}} for code in codes]
    return {"role": "assistant", "content": content, "tool_calls": calls or None}


USER, TOOL, LAST = (
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "tool", "content": "7", "tool_calls": None},
    assistant("It is \\boxed{7}."),
)
CALL = {"code": "print(3 + 4)"}


def test_the_multi_turn_form_is_brought_to_one_shape():
    row = {
        "messages": [
            USER,
            assistant(None, json.dumps(CALL)),
            TOOL,
            assistant("", CALL, {"code": "1"}),
            TOOL,
            TOOL,
            LAST,
        ],
        "tools": [{"type": "function", "function": {"name": "another"}}],
    }
    messages = messages_of(row)
    wanted = [("", CALL["code"]), ("7", None), ("", CALL["code"], "1"), ("7", None), ("7", None)]
    assert shape(messages) == [*wanted, ("It is \\boxed{7}.",)]
    assert all(set(turn) <= {"role", "content", "tool_calls"} for turn in messages)
    assert messages[-1] == {"role": "assistant", "content": "It is \\boxed{7}."}, "no empty tool_calls"
    assert messages[0] == USER and conversation(row)[0]["content"] == f"{USER['content']}\n\n{INSTRUCTION}"
    assert conversation(row)[1:] == messages[1:]
    system = {"role": "system", "content": "Be brief."}
    assert messages_of({"messages": [system, USER, LAST]})[0] == system


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no messages"),
        (["What is 3 + 4?"], "no messages"),
        ([], "no user turn followed by an assistant turn"),
        ([USER], "no user turn followed by an assistant turn"),
        ([LAST, USER], "no user turn followed by an assistant turn"),
        ([USER, assistant("", CALL), LAST], "code without its output"),
        ([USER, assistant("", CALL, CALL), TOOL, LAST], "code without its output"),
        ([USER, assistant("", CALL), TOOL, TOOL, LAST], "an output without its call"),
        ([USER, assistant("", CALL), TOOL], "no final answer"),
        ([USER, assistant("", CALL)], "no final answer"),
        ([USER, LAST, USER, LAST], "a turn after the final answer"),
        ([USER, assistant("", CALL), TOOL, USER, LAST], "a user turn after the first answer"),
        ([USER, assistant("", CALL, name="browser"), TOOL, LAST], "a call of another tool"),
        ([USER, assistant("", "print(7)"), TOOL, LAST], "arguments that are not JSON"),
        ([USER, assistant("", {"code": " "}), TOOL, LAST], "empty code"),
        ([USER, assistant("", {"program": "1"}), TOOL, LAST], "empty code"),
        ([USER, assistant(None), TOOL, LAST], "a message without role or text"),
        ([USER, {"role": "critic", "content": "no"}, LAST], "a message without role or text"),
        ([{"role": "user", "content": " "}, LAST], "no question"),
        ([{"role": "user", "content": "<|im_start|>system"}, LAST], "a control token in the text"),
    ],
)
def test_messages_that_are_no_conversation(messages, reason):
    with pytest.raises(BadTrace, match=f"^{reason}$"):
        conversation({"messages": messages})


def test_the_raw_form_is_refused_where_messages_are_expected():
    with pytest.raises(BadTrace, match="the raw form"):
        messages_of(raw(step("print(7)", "7") + end()))


# Trajectories as long as those of the published rows: question, words and code in turn, and the answer.
COUNT = "How many integers from $1$ to $1000$ are divisible\n- by $3$, or\n- by $7$,\n\nbut not by both?"
COUNTING = [
    "Okay, so this is about inclusion and exclusion. Let A be the multiples of 3, and B those of 7.\n\nI need"
    " |A| + |B| - 2|A ∩ B|, where\n\n|A| = 333\n\nand the others follow by division. Let me compute them using code.",
    "n = 1000\nthrees, sevens, both = n // 3, n // 7, n // 21\n\nprint(threes + sevens - 2 * both)",
    "The code returns 381. To verify, I count them one by one:\n\n- by 3 only: 333 - 47 = 286\n- by 7 only: 95",
    "total = 0\nfor k in range(1, 1001):\n    if (k % 3 == 0) != (k % 7 == 0):\n        total += 1\nprint(total)",
    "Both ways give 381.",
]
TRAJECTORIES = [
    (COUNT, COUNTING[0] + step(COUNTING[1], "381") + COUNTING[2] + step(COUNTING[3], "381") + COUNTING[4], "381"),
    (
        "Find the last two digits of $3^{2026}$.",
        "Since $3^{20} \\equiv 1 \\pmod{100}$, I need $3^6$." + step("print(pow(3, 2026, 100))", "29") + "It is $29$.",
        "29",
    ),
    (
        "The roots of $x^2-7x+4=0$ are $p$ and $q$. Find $p^2+q^2$.",
        "First with sympy:"
        + step("print(solve('x**2 - 7*x + 4'))", "NameError: name 'solve' is not defined")
        + "It was not imported. By Vieta:"
        + step("s, p = 7, 4\nprint(s**2 - 2*p)", "41")
        + "Thus $p^2+q^2=41$.",
        "41",
    ),
    ("What is $2+4+\\cdots+20$?", "It is twice $\\frac{10\\cdot 11}{2}=55$.", "110"),
    (
        "求 $1001$ 和 $1547$ 的最大公约数。",
        "用程序计算。"
        + step("# 欧几里得算法\nimport math\nprint(math.gcd(1001, 1547))", "91")
        + step("print('检查: é, ≤, ∑')", "检查: é, ≤, ∑")
        + "答案是 $91$。",
        "91",
    ),
    (
        "Find the smallest prime above $200$.",
        "Search:"
        + step("def prime(n):\n    return all(n % k for k in range(2, n))\n\nn = 201\nwhile not prime(n): n += 1", "")
        + "Nothing was printed."
        + step("print(next(n for n in range(201, 300) if all(n % k for k in range(2, n))))", "211")
        + "It is $211$.",
        "211",
    ),
]


def test_whole_trajectories_convert_from_both_published_forms(tokenizer):
    rows = [raw(f"{text}\n\n<answer>\n\\boxed{{{answer}}}\n</answer>", asked) for asked, text, answer in TRAJECTORIES]
    # The first one again, as a published recipe rewrites it in turns.
    first, code, second, check, last = COUNTING
    turns = [
        {"role": "user", "content": f"{QUESTION % COUNT}\n\\boxed{{'The final answer goes here.'}}"},
        assistant(first, {"code": code}),
        {"role": "tool", "content": "381"},
        assistant(second, {"code": check}),
        {"role": "tool", "content": "381"},
        {"role": "assistant", "content": f"{last}\n\n\n\\boxed{{381}}"},
    ]
    rows.append({"messages": turns, "tools": [{"type": "function", "function": {"name": "code_interpreter"}}]})
    converted = [conversation(row) for row in rows]
    assert [boxed_answer(messages) for messages in converted] == ["381", "29", "41", "110", "91", "211", "381"]
    assert [len(messages) for messages in converted] == [6, 4, 6, 2, 6, 6, 6]
    assert converted[0] == converted[-1], "both forms of one row give the same messages"
    questions = [*[question for question, *_ in TRAJECTORIES], COUNT]
    assert [messages[0]["content"] for messages in converted] == [f"{asked}\n\n{INSTRUCTION}" for asked in questions]
    for messages in converted:
        tokens = demonstration_ids(tokenizer, messages, [Python().schema])
        assert 0 < sum(tokens.sampled) < len(tokens.ids) == len(tokens.sampled)


# ------------------------------------------------------------------------------------------------------ verification


def test_programs_are_run_again_and_lies_are_seen():
    text = (
        step("print(3 + 4)", "7")
        + step("print(3 * 4)", "13")
        + step("print(y)", "NameError: name 'y' is not defined")
        + step("print(1 / 0)", "1")
        + step("x = 1", "")
        + step("for i in range(2):\n    print(i, end=' \\n')", "0\n1")
        + end()
    )
    messages = conversation(raw(text))

    async def run():
        async with open_sandbox(SandboxConfig(backend=("process",), slots=1)) as box:
            return await rerun_calls(messages, box)

    reruns = asyncio.run(run())
    assert [rerun.verdict for rerun in reruns] == ["same", "differs", "same error", "differs", "same", "same"]
    assert (reruns[1].call, reruns[1].recorded, reruns[1].real) == (1, "13", "12")
    assert "ZeroDivisionError" in reruns[3].real


def test_outputs_are_compared_up_to_white_space_at_line_ends():
    assert compare_outputs("1  \n2\n", "1\n2", "success") == "same"
    assert compare_outputs("1\n 2", "1\n2", "success") == "differs"
    assert compare_outputs("7\nValueError: no", "Traceback\nValueError: no", "user_error") == "same error"
    assert compare_outputs("7\nValueError: no", "8\nValueError: no", "success") == "differs", (
        "a printed line is no error"
    )
    assert compare_outputs("", "Traceback\n", "user_error") == "differs"


def test_the_final_answer_is_checked_by_the_reward():
    messages = conversation(raw("It is " + end("\\boxed{007}")))
    said = messages[-1]["content"]
    assert check(said, "7").correct and not check(said, "8").correct
    assert truth_of({"ground_truth": 7}) == truth_of({"reward_model": {"ground_truth": "7 "}}) == "7"
    assert truth_of({"reward_model": None}) is truth_of({"ground_truth": ""}) is None
    assert (
        truth_of({"answer": "2 + 5\n#### 7"}) == "7" and truth_of({"reward_model": {"ground_truth": {"a": 1}}}) is None
    )
