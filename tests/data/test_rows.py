"""Rows of other projects: each is read correctly, or refused with the name of the wrong column."""

import json

import pytest

from retool_jax.data.instructions import INSTRUCTION
from retool_jax.data.problems import to_problem, to_row
from retool_jax.data.rows import asks_and_answers, plain_integer, rename_columns
from retool_jax.errors import UserError


@pytest.mark.parametrize(
    ("row", "index", "answer"),
    [
        ({"ID": "2024-I-4", "Problem": "Q?", "Solution": "s", "Answer": 33}, "2024-I-4", "33"),
        ({"id": 7, "problem": "Q?", "answer": "336^\\circ"}, "7", "336"),
        ({"problem": "Q?", "answer": "\\frac{1}{2}", "unique_id": "test/a/1.json"}, "test/a/1.json", "\\frac{1}{2}"),
        ({"question": "Q?", "answer": "She has 2 * <<2*617=1234>>1,234 eggs.\n#### 1,234"}, "here", "1234"),
        ({"input": "Q?", "output": "045"}, "here", "45"),
        ({"prompt": "Q?", "label": "-5"}, "here", "-5"),
        ({"prompt": [{"role": "user", "content": "Q?"}], "label": "5"}, "here", "5"),
    ],
)
def test_columns_of_published_sets_are_mapped(row, index, answer):
    problem = to_problem(row, "here")
    assert (problem.id, problem.ground_truth) == (index, answer)
    assert problem.question == ("Q?" if "label" in row else f"Q?\n\n{INSTRUCTION}")
    assert to_problem(to_row(problem, "mine"), "x") == problem


@pytest.mark.parametrize("row", [{"problem": "Q?"}, {"problem": " ", "answer": "1"}, {"problem": "Q?", "answer": None}])
def test_a_mapped_row_is_checked_like_any_other(row):
    with pytest.raises(UserError, match=r"^here"):
        to_problem(row, "here")


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("336^\\circ", "336"),
        ("90^{\\circ}", "90"),
        ("1,234", "1234"),
        ("12{,}345{,}678", "12345678"),
        ("$042$", "42"),
        ("7.0", "7"),
        ("-0", "0"),
        ("\u22125", "-5"),
        ("9" * 1000, "9" * 1000),
        ("9" * 5000, "9" * 5000),
        ("1,2", "1,2"),
        ("7.5", "7.5"),
        ("x+1", "x+1"),
        ("\u0663", "\u0663"),
    ],
)
def test_integers_have_one_spelling(given, plain):
    assert plain_integer(given) == plain


# ---------------------------------------------------------------------------------------------------- forms of others

ASK = [{"role": "user", "content": "Q?"}]
REPLY = {"role": "assistant", "content": "It is \\boxed{7}."}
BOXED = "First $2 \\cdot 3 = 6$.\nThen \\boxed{6} and one: \\boxed{7}."


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        # verl
        ({"prompt": ASK, "reward_model": {"ground_truth": "7", "style": "rule"}, "extra_info": {"index": 3}}, "7"),
        ({"prompt": json.dumps(ASK), "reward_model": '{"ground_truth": "7"}', "extra_info": '{"index": 3}'}, "7"),
        ({"prompt": ASK, "reward_model": {"ground_truth": '["7"]'}, "extra_info": {"index": 3}}, "7"),  # Skywork-OR1
        ({"prompt": ASK, "reward_model": {"ground_truth": ["7"]}}, "7"),
        # slime and miles
        ({"prompt": "Q?", "label": "7"}, "7"),
        ({"prompt": json.dumps(ASK), "label": 7, "metadata": {}}, "7"),
        # open-r1
        ({"prompt": "Q?", "solution": "7", "reward_model": {"ground_truth": "7"}}, "7"),
        ({"problem": "Q?", "solution": BOXED, "answer": "7", "messages": [*ASK, REPLY]}, "7"),
        ({"problem": "Q?", "solution": BOXED}, "7"),
        ({"problem": "Q?", "answer": "7", "label": 1, "solution": "\\boxed{8}"}, "7"),
        ({"problem": "Q?", "solution": "<think> 6 </think> <answer> 7 </answer>"}, "7"),
        # TRL
        ({"prompt": ASK, "solution": "$7$"}, "7"),
        ({"prompt": ASK, "ground_truth": "\\boxed{7}"}, "7"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}], "answer": 7.0}, "7"),
        # Tunix
        ({"prompts": "<start_of_turn>user\nQ?<end_of_turn>", "question": "Q?", "answer": "#### 7"}, "7"),
        ({"question": "Q?", "final_answer": "7", "difficulty": 5.0}, "7"),
        # OpenAI
        ({"messages": ASK, "answer": "7"}, "7"),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *ASK], "reference_answer": "7"}, "7"),
        ({"messages": json.dumps([*ASK, REPLY]), "answer": "7"}, "7"),
        ({"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "7"}], "answer": "7"}, "7"),
        # what only looks like JSON is a text
        ({"prompt": "[1, 2] and [3, 4]: Q?", "label": "7"}, "7"),
        ({"problem": "Q?", "answer": "[3]"}, "[3]"),
        ({"problem": "Q?", "answer": "(1,2]"}, "(1,2]"),
        ({"prompt": None, "messages": None, "question": "Q?", "answer": "7"}, "7"),
        ({"problem": "Q?", "answer": "\\{1, 2\\}"}, "\\{1, 2\\}"),
    ],
)
def test_rows_of_other_projects_are_read(row, answer):
    problem = to_problem(row, "here")
    assert problem.ground_truth == answer
    assert problem.question.endswith(("Q?", f"Q?\n\n{INSTRUCTION}")) and problem.messages[-1]["role"] == "user"
    assert [turn["role"] for turn in problem.messages[:-1]] in ([], ["system"])
    assert to_problem(to_row(problem, "mine"), "x") == problem


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ASK, "reward_model": {"ground_truth": {"target": 98, "numbers": [44, 19]}}}, "is an object"),
        ({"prompt": ASK, "reward_model": {"ground_truth": '{"inputs": ["1"], "outputs": ["2"]}'}}, "is an object"),
        ({"prompt": ASK, "reward_model": {"ground_truth": ["7", "8"]}}, "ground_truth does not hold one answer"),
        ({"prompt": "Q?", "completion": "7", "label": True}, "its label is true or false"),
        ({"problem": "Q?", "solution": "Then $x = 7$.\nThat is all."}, "its solution has no answer in a box"),
        ({"problem": "Q?", "solution": "It is \\boxed{7"}, "its solution has no answer in a box"),
        ({"prompt": ASK, "answer": float("nan")}, "has an empty answer; every problem needs an answer"),
        ({"prompt": ASK, "answer": float("inf")}, "cannot be scored: its answer is no finite number"),
        ({"prompt": ASK, "answer": "\\boxed{7"}, "cannot be scored: the box in its answer has no end"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": None}]}], "answer": "7"},
            "no usable prompt",
        ),
        ({f"column{i:02}": 1 for i in range(30)}, "column19 and 10 more"),
        ({"prompt": ASK, "completion": [REPLY]}, "has no column 'reward_model'; it has completion, prompt"),
        ({"chosen": "a", "rejected": "b"}, "has no column 'prompt'; it has chosen, rejected"),
        ({"messages": [REPLY], "answer": "7"}, "has no usable messages"),
        ({"messages": "Q?", "answer": "7"}, "has no usable messages"),
        ({"prompt": [*ASK, REPLY], "answer": "7"}, "it ends in a turn of assistant, not the user's"),
        ({"messages": [*ASK, {"role": "tool", "content": "7"}], "answer": "7"}, "it ends in a turn of tool"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "Q?"}]}]},
            "has no usable prompt",
        ),
        ({"prompt": ASK, "reward_model": '["7"]'}, "reward_model and extra_info must be objects"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(row, message):
    with pytest.raises(UserError) as caught:
        to_problem(row, "mine.jsonl row 3")
    assert str(caught.value).startswith("mine.jsonl row 3") and message in str(caught.value)


def test_a_row_with_turns_of_a_policy_can_be_a_demonstration():
    for row in (
        {"messages": [*ASK, REPLY]},
        {"messages": json.dumps([*ASK, REPLY]), "answer": "7"},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "7"}]},
        {"prompt": "Q?", "completion": "7"},
        {"prompt": ASK, "completion": [REPLY]},
    ):
        assert asks_and_answers(row)
    for row in ({"messages": ASK, "answer": "7"}, {"prompt": ASK, "label": "7"}, {"messages": []}, {"messages": "Q?"}):
        assert not asks_and_answers(row)


def test_columns_that_a_config_names_count_before_all_others():
    row = {"prompt": "other?", "problem": "other?", "text": "Q?", "answer": "1", "solution": "2", "gold": 42, "nr": 7}
    columns = {"question": "text", "answer": "gold", "id": "nr"}
    problem = to_problem(rename_columns(row, "here", columns), "here")
    assert (problem.id, problem.question, problem.ground_truth) == ("7", f"Q?\n\n{INSTRUCTION}", "42")
    chat = row | {"text": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]}
    assert [turn["role"] for turn in to_problem(rename_columns(chat, "here", columns), "here").messages] == [
        "system",
        "user",
    ]
    only = to_problem(rename_columns(row, "here", {"question": "", "answer": "gold", "id": ""}), "here")
    assert (only.id, only.question, only.ground_truth) == ("here", "other?", "42"), "the others are found as ever"
    assert rename_columns(row, "here", {"question": "", "answer": "", "id": ""}) == row


@pytest.mark.parametrize(("value", "kind"), [({}, "no"), ({"gold": None}, "an empty")])
def test_a_column_that_a_config_names_must_be_there(value, kind):
    with pytest.raises(UserError, match=f"^here has {kind} 'gold', which data.answer=gold names; it has "):
        rename_columns({"text": "Q?"} | value, "here", {"question": "text", "answer": "gold", "id": ""})
