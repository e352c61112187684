"""Which trajectories are selected, and their conversations."""

import json

import pytest

from retool_jax.errors import UserError
from retool_jax.export.records import Selection, chat, conversation, messages_of, read_records
from retool_jax.rollout.trajectory import End


def names(folder, **wanted) -> list[str]:
    return [record.name for record in read_records(folder, Selection(**wanted))]


def test_trajectories_are_chosen_by_split_step_and_draw(run):
    assert len(names(run)) == len(set(names(run))) == 8
    assert names(run, step=5, greedy=True) == [
        "dev-000005-greedy/dev-000000/1000",
        "dev-000005-greedy/dev-000001/1001",
    ]
    assert len(names(run, greedy=False)) == len(names(run, step=0)) == 4 and len(names(run, split="dev")) == 8
    with pytest.raises(UserError, match="there are: split=dev step=0; split=dev step=5"):
        names(run, split="test")


def test_an_evaluation_is_read_up_to_a_line_that_a_kill_tore(hostile):
    (record,) = read_records(hostile, Selection())
    assert record.name == "samples/../../x\\ud800/\x00" and record.values["problem"] == "lone \\udfff surrogate"
    assert record.values["sample"] == 3
    assert record.values["tool_calls"][0]["metrics"] == {"peak": None}


def test_of_a_sample_that_was_drawn_again_the_last_line_counts(hostile, tmp_path):
    line = json.loads((hostile / "samples.jsonl").read_text().splitlines()[0])
    drawn = [line | {"id": "a", "end": "sandbox_lost"}, line | {"id": "b"}, line | {"id": "a", "end": "answered"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in drawn))
    found = [(record.values["id"], record.values["end"]) for record in read_records(tmp_path, Selection())]
    assert found == [("b", "answered"), ("a", "answered")]


def test_a_line_that_is_no_trajectory_is_named(run, tmp_path):
    (tmp_path / "trajectories").mkdir()
    path = tmp_path / "trajectories" / "dev-000000.jsonl"
    good = (run / "trajectories" / "dev-000000.jsonl").read_text().splitlines()[0]
    for bad, named in (("{torn", "line 2 is not JSON"), ('{"id": 1}', "line 2 is no trajectory")):
        path.write_text("\n".join([good, bad, good]))
        with pytest.raises(UserError, match=named):
            names(tmp_path)


def test_a_record_is_a_conversation_with_each_output_at_its_call(tokenizer, make_trajectory):
    said = list(conversation(make_trajectory(0).record(tokenizer)))
    assert [(message["role"], message["content"]) for message in said] == [
        ("user", "12*34?"),
        ("assistant", "I see."),
        ("tool", "408"),
        ("assistant", ""),
        ("tool", "408.0"),
        ("tool", "no JSON"),
        ("assistant", "It is \\boxed{408}."),
    ]
    assert said[1]["reasoning"] == "by code" and said[6]["calls"] == []
    assert said[1]["calls"] == [
        {"id": "call_1_1", "name": "code_interpreter", "arguments": '{"code": "print(12 * 34)"}'}
    ]
    assert [(call["name"], call["arguments"]) for call in said[3]["calls"]] == [
        ("calculator", '{"expression": "12*34"}'),
        ("code_interpreter", '{"text": "{no"}'),
    ]
    assert [message["call_id"] for message in said if message["role"] == "tool"] == ["call_1_1", "call_2_1", "call_2_2"]


def test_a_call_that_nobody_answered_stays_in_the_text(tokenizer, make_trajectory):
    made = make_trajectory(0)
    made.segments, made.tool_uses, made.end = made.segments[:2], [], End.TURN_LIMIT
    _, turn = messages_of(made.record(tokenizer))
    assert turn.calls == [] and "<tool_call>" in turn.text and turn.reasoning == "by code"


def test_a_call_whose_answer_had_no_room_has_none(tokenizer, make_trajectory):
    made = make_trajectory(0)
    made.segments, made.tool_uses, made.end = made.segments[:2], made.tool_uses[:1], End.TOKEN_LIMIT
    _, turn = messages_of(made.record(tokenizer))
    assert [call.output for call in turn.calls] == [None]


def test_the_request_for_an_answer_is_a_users(tokenizer, make_trajectory):
    made = make_trajectory(0)
    record = made.record(tokenizer) | {"forced": True}
    record["segments"][4]["text"] = "\n<|im_start|>user\nGive the answer.<|im_end|>\n<|im_start|>assistant\n"
    asked = messages_of(record)
    assert [message.role for message in asked] == ["user", "assistant", "assistant", "user", "assistant"]
    assert asked[3].text == "Give the answer." and [call.output for call in asked[2].calls] == [None, None]


def test_programs_in_the_text_form_are_calls_too():
    segments = [
        {"role": "prompt", "start": 0, "stop": 2, "text": "User: 6*7?"},
        {"role": "policy", "start": 2, "stop": 5, "text": "So\n<code>\n```python\nprint(42)\n```\n</code>"},
        {"role": "tool", "start": 5, "stop": 6, "text": "\n<interpreter>\n42\n</interpreter>\n"},
        {"role": "policy", "start": 6, "stop": 8, "text": "\\boxed{42}"},
    ]
    use = {"turn": 0, "code": "print(42)", "output": "cut", "tool": "code_interpreter"}
    question, turn, answer = messages_of({"segments": segments, "tool_calls": [use]})
    assert (question.role, question.text, turn.text, answer.text) == ("user", "User: 6*7?", "So", "\\boxed{42}")
    assert [(call.arguments, call.output) for call in turn.calls] == [({"code": "print(42)"}, "42")]


def test_a_prompt_of_several_turns_is_taken_apart():
    text = "".join(f"<|im_start|>{role}\n{role} says<|im_end|>\n" for role in ("system", "user", "assistant", "tool"))
    assert chat(f"{text}<|im_start|>assistant\n<think>\n") == [
        ("system", "system says"),
        ("user", "user says"),
        ("assistant", "assistant says"),
        ("user", "tool says"),
    ]


def test_every_line_of_a_run_is_whole(run):
    """The files that the fixtures write are those that the command reads."""
    lines = [line for path in sorted(run.rglob("*.jsonl")) for line in path.read_text().splitlines()]
    assert [json.loads(line)["id"] for line in lines] == [name.split("/", 1)[1] for name in names(run)]
