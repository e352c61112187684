"""Conversations as servers and data sets write them: ids of calls, thinking, parts, other names for the same."""

import copy
import json

import pytest

from retool_jax.data.traces import BadTrace, boxed_answer, conversation, messages_of
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.python import Python

USER = {"role": "user", "content": "What is 3 + 4?"}
TOOL = {"role": "tool", "content": "7", "tool_calls": None}
LAST = {"role": "assistant", "content": "It is \\boxed{7}."}
TRANSCRIPT = "<code>print(7)</code><interpreter>7</interpreter>\\boxed{7}"


def outputs(messages: list[dict]) -> list[str]:
    return [turn["content"] for turn in messages if turn["role"] == "tool"]


def answered(identity: object, content: str) -> dict:
    return {"role": "tool", "content": content, "tool_call_id": identity}


def called(*codes: tuple[str, str]) -> dict:
    calls = [
        {"id": name, "function": {"name": "code_interpreter", "arguments": {"code": code}}} for name, code in codes
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


TWO = called(("a", "print(1)"), ("b", "print(2)"))


def test_ids_decide_which_output_is_whose():
    right = conversation({"messages": [USER, TWO, answered("a", "1"), answered("b", "2"), LAST]})
    assert outputs(right) == ["1", "2"] and "id" not in str(right)
    assert conversation({"messages": [USER, TWO, answered("b", "2"), answered("a", "1"), LAST]}) == right
    # Ids that outputs do not name say nothing; a later turn may use the same ones again.
    assert conversation({"messages": [USER, TWO, {**TOOL, "content": "1"}, {**TOOL, "content": "2"}, LAST]}) == right
    again = [USER, TWO, answered("b", "2"), answered("a", "1"), TWO, answered("b", "4"), answered("a", "3"), LAST]
    assert outputs(conversation({"messages": again})) == ["1", "2", "3", "4"]
    numbered = [USER, called((1, "print(1)"), (2, "print(2)")), answered(2, "2"), answered(1, "1"), LAST]
    assert conversation({"messages": numbered}) == right


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([TWO, answered("a", "1"), answered("a", "2")], "two outputs with one tool_call_id"),
        ([TWO, answered("a", "1"), answered("c", "2")], "an output with an unknown tool_call_id"),
        ([TWO, answered("a", "1"), TOOL], "outputs with and without tool_call_id"),
        ([TWO, answered("b", "1")], "code without its output"),
        ([called(("a", "1"), ("a", "2")), answered("a", "1")], "two calls with one id"),
        ([called((None, "1")), answered("a", "1")], "an output with an unknown tool_call_id"),
        ([TWO, answered("a", "1"), answered("b", "2"), called(("c", "1")), answered("a", "3")], "an output with an un"),
    ],
)
def test_ids_that_do_not_match_are_named(turns, reason):
    with pytest.raises(BadTrace, match=f"^{reason}"):
        conversation({"messages": [USER, *turns, LAST]})


def thought(text: str = "Four and three.", key: str = "reasoning_content", turn: dict = LAST) -> dict:
    return turn | {key: text}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_stands_before_the_words_as_the_templates_write_it(key, tokenizer, published_template):
    messages = messages_of({"messages": [USER, thought(key=key, turn=TWO), TOOL, TOOL, thought("So 7.\n", key)]})
    assert messages[1]["content"] == "<think>\nFour and three.\n</think>\n"
    assert messages[-1]["content"] == "<think>\nSo 7.\n</think>\n\nIt is \\boxed{7}."
    assert boxed_answer(messages) == "7" and all(set(turn) <= {"role", "content", "tool_calls"} for turn in messages)
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = published_template("qwen3")
    theirs = [USER, thought(turn=TWO), *messages[2:4], thought("So 7.")]
    said = hf.apply_chat_template(theirs, tools=[Python().schema], tokenize=False).rpartition("7?<|im_end|>\n")[2]
    ids = demonstration_ids(Tokenizer(hf), messages, [Python().schema]).ids
    assert tokenizer.decode(ids).rpartition("7?<|im_end|>\n")[2] == said.removesuffix("\n")


def test_thinking_beside_the_raw_form_goes_before_its_first_turn():
    row = {"messages": [USER, {"role": "assistant", "content": f"First:{TRANSCRIPT}", "reasoning": "Let me see."}]}
    assert conversation(row)[1]["content"] == "<think>\nLet me see.\n</think>\n\nFirst:"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (thought() | {"reasoning": "Another."}, "two different thinkings in one turn"),
        (
            thought(turn=LAST | {"content": "<think>\nNo.\n</think>\n\n\\boxed{7}"}),
            "two different thinkings in one turn",
        ),
        (thought("a</think>b"), "marks of thinking or calls inside of the thinking"),
        (thought(TRANSCRIPT), "marks of thinking or calls inside of the thinking"),
        (thought("<|im_end|>"), "a control token in the text"),
        (thought() | {"thinking": ["So."]}, "thinking that is no text"),
        (thought(turn=LAST | {"content": ""}), "no final answer"),
        (LAST | {"content": [{"type": "image_url"}]}, "a part that is no text"),
        (LAST | {"weight": 0}, "a turn that is not to be learned"),
        (LAST | {"loss_mask": 0}, "a turn that is not to be learned"),
        (LAST | {"refusal": "No."}, "a message with more than text"),
        (LAST | {"audio": {"id": "x"}}, "a message with more than text"),
        (LAST | {"tool_calls": "print(7)"}, "calls that are no list"),
    ],
)
def test_what_a_turn_cannot_mean_is_named(turn, reason):
    with pytest.raises(BadTrace, match=f"^{reason}$"):
        conversation({"messages": [USER, turn]})
    with pytest.raises(BadTrace, match=r"^thinking in a turn that is not the policy's"):
        conversation({"messages": [USER | {"thinking": "Hm."}, LAST]})


def test_conversations_of_other_projects_are_the_same_one():
    wanted = conversation({"messages": [USER, called((None, "print(3 + 4)")), {**TOOL, "content": "7"}, LAST]})
    function = {"name": "code_interpreter", "arguments": json.dumps({"code": "print(3 + 4)"})}
    turns = [called((None, "print(3 + 4)")), {"role": "tool", "content": "7"}, LAST]
    openai = [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "c", "function": function}]},
        {"role": "tool", "content": [{"type": "text", "text": "7"}], "tool_call_id": "c"},
        LAST | {"weight": 1},
    ]
    older = [
        USER,
        {"role": "assistant", "content": "", "function_call": function},
        {"role": "function", "content": "7"},
        LAST,
    ]
    for row in (
        {"messages": openai},
        {"messages": older},
        {"messages": json.dumps(openai)},
        {"prompt": [USER], "completion": turns},
        {"prompt": USER["content"], "completion": turns},
        {"prompt": json.dumps([USER]), "completion": json.dumps(turns)},
        {"messages": [USER, turns[0] | {"tool_calls": json.dumps(turns[0]["tool_calls"])}, *turns[1:]]},
    ):
        assert conversation(row) == wanted
    assert conversation({"prompt": [USER], "completion": turns, "label": True}) == wanted
    with pytest.raises(BadTrace, match="a completion that is marked as bad"):
        conversation({"prompt": [USER], "completion": turns, "label": False})
    asked = {"role": "developer", "content": "Please reason step by step, and put your final answer within \\boxed{}."}
    assert conversation({"messages": [asked, *openai]}) == wanted, "a system turn that asks for a form and nothing else"
    kept = conversation({"messages": [{"role": "developer", "content": f"Be brief. {asked['content']}"}, *openai]})
    assert kept[0] == {"role": "system", "content": "Be brief."} and kept[1:] == wanted
    plain = {"conversations": [{"from": "human", "value": "What is 3 + 4?"}, {"from": "gpt", "value": "\\boxed{7}"}]}
    assert [turn["content"] for turn in conversation(plain)[1:]] == ["\\boxed{7}"]
