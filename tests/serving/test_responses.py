"""`/v1/responses` over HTTP: events in order, programs run by the server, and continued conversations."""

import asyncio
import json
from collections import defaultdict
from typing import Any

import pytest

from .conftest import call_turn, python

QUESTION = "What is gcd(12, 18)?"
CODE = {"type": "code_interpreter", "container": {"type": "auto"}}
SHOUT = {
    "type": "function",
    "name": "shout",
    "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
}
ANSWER = "The answer is \\boxed{6}.<|im_end|>"
PATH = "/v1/responses"
LOGS = "code_interpreter_call.outputs"


def body(**fields: Any) -> dict:
    return {"model": "tiny", "input": QUESTION, "seed": 7} | fields


def checked(events: list[dict]) -> dict:
    """The last event's response, after checking that all events are in the specification's order and agree with it."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] in ("completed", "incomplete", "failed") and kinds[-1] not in kinds[:-1]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]
    of_item = defaultdict(list)
    for event in events[2:-1]:
        of_item[event["output_index"]].append(event)
    assert list(of_item) == list(range(len(last["output"])))
    for index, item in enumerate(last["output"]):
        first, *between, end = of_item[index]
        assert (first["type"], end["type"]) == ("response.output_item.added", "response.output_item.done")
        assert first["item"]["status"] == "in_progress" and end["item"] == item
        assert {event.get("item_id") for event in between} <= {item["id"]} == {first["item"]["id"]}
        names = [event["type"].removeprefix("response.") for event in between]
        deltas = "".join(event["delta"] for event in between if event["type"].endswith(".delta"))
        if item["type"] in ("message", "reasoning"):
            name = {"message": "output_text", "reasoning": "reasoning_text"}[item["type"]]
            assert names[0] == "content_part.added" and names[-2:] == [f"{name}.done", "content_part.done"]
            assert set(names[1:-2]) == {f"{name}.delta"}
            (part,) = item["content"]
            assert deltas == part["text"] == between[-2]["text"] and between[-1]["part"] == part
        elif item["type"] == "function_call":
            assert names[-1] == "function_call_arguments.done" and deltas == item["arguments"]
            assert set(names[:-1]) == {"function_call_arguments.delta"}
        else:
            parts = ["call.in_progress", "call_code.delta", "call_code.done", "call.interpreting", "call.completed"]
            expected = [f"code_interpreter_{part}" for part in parts]
            assert names == [name for name in expected if name in names] and deltas == item["code"]
    return last


def texts(response: dict) -> list[str]:
    return [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]


def without_ids(value: Any) -> Any:
    """What two responses to the same request have in common."""
    if isinstance(value, list):
        return [without_ids(each) for each in value]
    names = ("id", "call_id", "container_id", "created_at", "completed_at")
    return {k: without_ids(v) for k, v in value.items() if k not in names} if isinstance(value, dict) else value


def test_a_program_runs_in_the_middle_and_both_forms_are_one(serve, scripted, tokenizer):
    turns = [
        "<think>\nHm.\n</think>\n\n" + python("print(6)"),
        call_turn(("code_interpreter", {"code": "1/0"})),
        ANSWER,
    ]
    asked = body(tools=[CODE], include=[LOGS, "message.output_text.logprobs"])
    engine = scripted({7: turns * 2})

    async def main() -> tuple[dict, dict, dict]:
        async with serve(engine, ["python"]) as client:
            whole = await client.ask(asked, PATH)
            kept = await client.get(f"/v1/trajectories/{whole['id']}")
            return whole, checked(await client.stream(asked, PATH)), kept

    whole, streamed, kept = asyncio.run(main())
    assert without_ids(whole) == without_ids(streamed)
    kinds = [item["type"] for item in whole["output"]]
    call = "code_interpreter_call"
    assert kinds == ["reasoning", "message", call, "message", call, "message"] and whole["status"] == "completed"
    first, second = (item for item in whole["output"] if item["type"] == call)
    assert (first["code"], first["outputs"]) == ("print(6)", [{"type": "logs", "logs": "6"}])
    assert "ZeroDivisionError" in second["outputs"][0]["logs"] and second["status"] == "completed"
    assert first["container_id"] == second["container_id"]
    assert texts(whole)[-1] == "The answer is \\boxed{6}."
    (last,) = whole["output"][-1]["content"]
    assert "".join(entry["token"] for entry in last["logprobs"]).strip("\n") == last["text"]
    assert {entry["logprob"] for entry in last["logprobs"]} == {-0.5}
    usage, (trajectory,) = whole["usage"], kept["data"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"] == len(trajectory["ids"])
    assert usage["output_tokens"] == sum(trajectory["sampled"])
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


def test_what_is_not_asked_for_is_not_told(serve, scripted):
    async def main() -> dict:
        async with serve(scripted({7: [python("print(6)"), ANSWER]}), ["python"]) as client:
            return await client.ask(body(tools=[CODE], store=False), PATH)

    response = asyncio.run(main())
    call = next(item for item in response["output"] if item["type"] == "code_interpreter_call")
    assert call["outputs"] is None and response["output"][0]["content"][0]["logprobs"] == []
    assert response["store"] is False


def test_functions_of_the_client_round_trip_by_the_ids_that_were_kept(serve, scripted, tokenizer):
    turn = call_turn(("shout", {"text": "six"}), ("code_interpreter", {"code": "print(6)"}), ("shout", {"text": "é"}))
    engine = scripted({7: [turn, python("print(7)"), "Well.<|im_end|>"], 8: ["Once more.<|im_end|>"]})

    async def main() -> tuple[list[dict], list[dict]]:
        async with serve(engine, ["python"]) as client:
            one = checked(await client.stream(body(tools=[SHOUT, CODE]), PATH))
            calls = [item["call_id"] for item in one["output"] if item["type"] == "function_call"]
            told = [
                {"type": "function_call_output", "call_id": call, "output": said}
                for call, said in zip(reversed(calls), ("É", "SIX"), strict=True)
            ]
            asked = body(previous_response_id=one["id"], input=[*told, {"role": "user", "content": "And now?"}])
            lacking = await client.ask(asked | {"input": told[:1]}, PATH, status=400)
            assert "send one function_call_output for each" in lacking["error"]["message"]
            two = await client.ask(asked, PATH)
            three = await client.ask(body(previous_response_id=two["id"], input="Again?", seed=8), PATH)
            kept = [(await client.get(f"/v1/trajectories/{each['id']}"))["data"][0] for each in (one, two, three)]
            return [one, two, three], kept

    (one, two, three), kept = asyncio.run(main())
    assert [item["type"] for item in one["output"]] == ["message", "function_call", "function_call"]
    assert [json.loads(item["arguments"]) for item in one["output"][1:]] == [{"text": "six"}, {"text": "é"}]
    assert texts(two) == ["Let me see.", "Well."]
    assert three["previous_response_id"] == two["id"] and texts(three) == ["Once more."]
    ids = [each["ids"] for each in kept]
    assert ids[1][: len(ids[0])] == ids[0] and ids[2][: len(ids[1])] == ids[1], "nothing is encoded again"
    totals = [each["usage"]["total_tokens"] for each in (one, two, three)]
    assert totals == [len(each) for each in ids], "outputs of earlier programs count once"
    said = tokenizer.decode(ids[1][len(ids[0]) :])
    assert said.index("SIX") < said.index("not run: ") < said.index("É") < said.index("And now?")
    drawn = [i for i, sampled in zip(kept[2]["ids"], kept[2]["sampled"], strict=True) if sampled]
    whole = turn + python("print(7)") + "Well.<|im_end|>" + "Once more.<|im_end|>"
    assert drawn == tokenizer.encode(whole)
    assert [segment["role"] for segment in kept[2]["segments"]].count("prompt") == 3
    assert len(kept[2]["tool_calls"]) == 1 and len(kept[2]["logprobs"]) == len(kept[2]["ids"])
    # The whole conversation is what the template writes.
    messages = kept_messages(turn)
    assert tokenizer.decode(ids[1]).startswith(tokenizer.render(messages, None, False).rstrip("\n"))


def kept_messages(turn: str) -> list[dict]:
    """The first two turns as messages, up to the user's second message."""
    words = turn.removesuffix("<|im_end|>")
    told = ("SIX", "not run: a turn that calls a function of the caller's runs no other call; call it again", "É")
    outputs = [{"role": "tool", "content": each} for each in told]
    last = {"role": "user", "content": "And now?"}
    return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": words}, *outputs, last]


def test_a_conversation_may_be_sent_as_items(serve, scripted, tokenizer):
    items = [
        {"type": "message", "role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "shout", "arguments": '{"text": "six"}'},
        {"type": "function_call", "call_id": "c2", "name": "shout", "arguments": '{"text": "two"}'},
        {"type": "function_call_output", "call_id": "c2", "output": "TWO"},
        {"type": "function_call_output", "call_id": "c1", "output": "SIX"},
        {"type": "code_interpreter_call", "id": "ci_1", "code": "print(6)", "outputs": [{"type": "logs", "logs": "6"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "So 6."}]},
        {"role": "user", "content": "Sure?"},
    ]

    async def main() -> dict:
        async with serve(scripted({7: [ANSWER]}), ["python"]) as client:
            response = await client.ask(body(input=items, tools=[SHOUT, CODE], instructions="Be brief."), PATH)
            return (await client.get(f"/v1/trajectories/{response['id']}"))["data"][0]

    kept = asyncio.run(main())
    prompt = kept["segments"][0]["text"]
    order = ["Be brief.", "Be kind.", QUESTION, '"six"', '"two"', "SIX", "TWO", "print(6)", "So 6.", "Sure?"]
    places = [prompt.index(words) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("turn", "tokens", "last"),
    [
        (ANSWER, 4, "message"),
        (call_turn(("shout", {"text": "six" * 20})), 60, "function_call"),
        (python("print(6)"), -4, "code_interpreter_call"),
    ],
)
def test_tokens_that_run_out_leave_an_incomplete_item(serve, scripted, tokenizer, turn, tokens, last):
    tokens = tokens if tokens > 0 else len(tokenizer.encode(turn)) + tokens
    asked = body(tools=[SHOUT, CODE], max_output_tokens=tokens)

    async def main() -> tuple[dict, dict, dict]:
        async with serve(scripted({7: [turn, turn, "Yes.<|im_end|>"]}), ["python"]) as client:
            whole, streamed = await client.ask(asked, PATH), checked(await client.stream(asked, PATH))
            after = await client.ask(body(previous_response_id=whole["id"], input="Go on."), PATH)
            return whole, streamed, after

    whole, streamed, after = asyncio.run(main())
    assert without_ids(whole) == without_ids(streamed)
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (whole["output"][-1]["type"], whole["output"][-1]["status"]) == (last, "incomplete")
    assert whole["usage"]["output_tokens"] == tokens and texts(after)[-1] == "Yes."


def test_a_fault_of_the_machinery_ends_the_stream_as_failed(serve, scripted):
    async def main() -> dict:
        engine = scripted({7: [python("while True: pass")]})
        async with serve(engine, ["python"], answer_s=0.3) as client:
            response = checked(await client.stream(body(tools=[CODE]), PATH))
            await client.get(f"/v1/trajectories/{response['id']}", status=404)
            return response

    response = asyncio.run(main())
    assert response["status"] == "failed" and response["error"]["code"] == "timeout"
    assert response["output"][-1]["status"] == "incomplete"


def test_a_container_keeps_an_interpreter_for_those_who_name_it(serve, scripted):
    """A program that ends its interpreter, or is stopped with its request, destroys its state."""
    programs = ["x = 6", "print(x)", "print('x' in globals())", "print(x)", "while True: pass"]
    engine = scripted({n: [python(program), ANSWER] for n, program in enumerate(programs)}, slots=1)

    async def main() -> list[str]:
        async with serve(engine, ["python_session"], answer_s=20) as client:

            async def said(seed: int, container: object = CODE["container"], **fields: Any) -> tuple[str, dict]:
                tools = [] if container is None else [CODE | {"container": container}]
                response = await client.ask(body(seed=seed, tools=tools, include=[LOGS], **fields), PATH)
                call = next(item for item in response["output"] if item["type"] == "code_interpreter_call")
                return call["outputs"][0]["logs"], response | {"container": call["container_id"]}

            _, first = await said(0)
            logs = [(await said(1, first["container"]))[0], (await said(2))[0]]
            logs.append((await said(3, None, previous_response_id=first["id"]))[0])
            box = client.server.tools.sandbox
            task = asyncio.create_task(said(4, first["container"]))
            await client.becomes(lambda: box.gauges()["slots_busy"] == 1)
            task.cancel()
            await client.becomes(lambda: client.server.open == 0)
            gone = await client.ask(body(tools=[CODE | {"container": first["container"]}]), PATH, status=404)
            assert "there is no container" in gone["error"]["message"]
            client.server.containers.close()
            await client.becomes(lambda: box.gauges()["sessions_open"] == 0)
            return logs

    assert asyncio.run(main()) == ["6", "False", "6"]


REFUSED: dict[str, tuple[dict, int, str]] = {
    "an unknown response": ({"previous_response_id": "resp_x"}, 404, "is no response that is kept"),
    "no input": ({"input": None}, 400, "input is None; it must be a list"),
    "an item": ({"input": [{"type": "image_generation_call"}]}, 400, "input[0].type is 'image_generation_call'"),
    "an item of another type": ({"input": [3]}, 400, "input[0] is 3; it must be an object"),
    "a tool": ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type is 'web_search'"),
    "a tool of another type": ({"tools": [3]}, 400, "tools[0] is 3"),
    "a container": ({"tools": [CODE | {"container": "cntr_x"}]}, 404, "there is no container"),
    "tokens": ({"max_output_tokens": 0}, 400, "max_output_tokens is 0"),
    "background": ({"background": True}, 400, "background is True, which is not served"),
    "a call without an answer": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
        400,
        "the call 'c' has no answer",
    ),
}


def test_what_is_not_served_is_refused(serve, scripted):
    async def main() -> None:
        async with serve(scripted({7: [ANSWER] * 2}), ["python"], keep=1) as client:
            for name, (fields, status, words) in REFUSED.items():
                error = (await client.ask(body(**fields), PATH, status=status))["error"]
                assert words in error["message"], (name, error)
            first = await client.ask(body(tools=[SHOUT], instructions="Be kind."), PATH)
            previous = {"previous_response_id": first["id"]}
            for fields, words in (
                ({"tools": [CODE]}, "leave tools and tool_choice out"),
                ({"tool_choice": "none"}, "leave tools and tool_choice out"),
                ({"instructions": "Be brief."}, "instructions differ"),
                ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, "waits for []"),
                ({"input": []}, "input is empty"),
            ):
                assert words in (await client.ask(body(**previous, **fields), PATH, status=400))["error"]["message"]
            second = await client.ask(body(), PATH)
            await client.ask(body(**previous), PATH, status=404)
            await client.get(f"/v1/trajectories/{second['id']}")
            assert client.server.open == 0

    asyncio.run(main())
