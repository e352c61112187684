"""ATIF-v1.7: what its validator checks, and the ids of each turn."""

import json

import pytest

import retool_jax
from retool_jax.export.command import main

# The fields of RFC 0001's validator: for each object the required ones first, then the optional ones.
FIELDS = {
    "trajectory": ({"schema_version", "agent", "steps"}, {"session_id", "trajectory_id", "final_metrics", "extra"}),
    "agent": ({"name", "version"}, {"model_name"}),
    "step": (
        {"step_id", "source", "message"},
        {"reasoning_content", "tool_calls", "observation", "metrics", "llm_call_count", "extra"},
    ),
    "call": ({"tool_call_id", "function_name", "arguments"}, {"extra"}),
    "result": (set(), {"source_call_id", "content", "extra"}),
}


def has_fields(kind: str, value: dict) -> bool:
    needed, more = FIELDS[kind]
    return needed <= value.keys() <= needed | more


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("atif") / "all.jsonl"
    main([f"run={run}", f"out={out}", "format=atif"])
    return [json.loads(line, parse_constant=refuse) for line in out.read_text().splitlines()]


def test_lines_are_as_the_specification_says(exported):
    assert len(exported) == 8 and len({line["trajectory_id"] for line in exported}) == 8
    for line in exported:
        assert line["schema_version"] == "ATIF-v1.7" and line["session_id"] == "mine"
        assert has_fields("trajectory", line) and has_fields("agent", line["agent"])
        assert [step["step_id"] for step in line["steps"]] == list(range(1, len(line["steps"]) + 1))
        for step in line["steps"]:
            assert has_fields("step", step) and step["source"] in ("user", "agent", "system")
            assert step["source"] == "agent" or not {"metrics", "tool_calls", "reasoning_content"} & step.keys()
            calls = step.get("tool_calls", [])
            results = step.get("observation", {}).get("results", [])
            assert all(has_fields("call", call) and isinstance(call["arguments"], dict) for call in calls)
            assert all(has_fields("result", result) for result in results)
            assert {result["source_call_id"] for result in results} <= {call["tool_call_id"] for call in calls}


def test_turns_have_the_ids_that_they_read_and_drew(exported, run):
    record = json.loads((run / "trajectories" / "dev-000000.jsonl").read_text().splitlines()[0])
    line = next(line for line in exported if line["trajectory_id"] == f"dev-000000/{record['id']}")
    turns = [step["metrics"] for step in line["steps"] if step["source"] == "agent"]
    drawn = [index for index, on in enumerate(record["sampled"]) if on]
    for key, of_record in (("completion_token_ids", "ids"), ("logprobs", "logprobs")):
        assert [value for turn in turns for value in turn[key]] == [record[of_record][index] for index in drawn]
    for turn in turns:
        assert turn["prompt_token_ids"] == record["ids"][: turn["prompt_tokens"]]
        assert turn["completion_tokens"] == len(turn["completion_token_ids"])
    assert line["final_metrics"]["total_completion_tokens"] == len(drawn)
    assert line["agent"]["version"] == retool_jax.__version__ and line["extra"]["reward"] == 1.0
    first = line["steps"][1]
    assert (first["message"], first["reasoning_content"]) == ("I see.", "by code")
    assert first["tool_calls"][0]["arguments"] == {"code": "print(12 * 34)"}
    assert first["observation"]["results"] == [{"source_call_id": "call_1_1", "content": "408"}]


def test_what_json_cannot_hold_is_left_out(hostile, tmp_path):
    main([f"run={hostile}", f"out={tmp_path / 'x.jsonl'}", "format=atif"])
    (line,) = (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    steps = json.loads(line, parse_constant=refuse)["steps"]
    assert "logprobs" in steps[1]["metrics"] and "logprobs" not in steps[-1]["metrics"]
    assert steps[1]["observation"]["results"][0]["content"].startswith("a\x00b")
