"""`openai`, the most common client, against both endpoints: its types can read the answers."""

import asyncio
import json
from types import ModuleType

import pytest

from .conftest import call_turn, python

ASKED = [{"role": "user", "content": "What is gcd(12, 18)?"}]
SHOUT = {"name": "shout", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
TURNS = [python("print(5)"), python("print(6)"), "So \\boxed{6}.<|im_end|>"]


@pytest.fixture(scope="module")
def openai() -> ModuleType:
    """Imported only when a test needs it: each worker reads this file, and the import takes half a second."""
    return pytest.importorskip("openai", reason="the client is absent: pip install 'openai>=3.57,<4'")


@pytest.fixture(scope="module")
def client_of(openai):
    """The client of a server: `client_of(served)`."""
    return lambda served: openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="secret", max_retries=0
    )


def test_a_chat_streams_an_answer_with_two_programs(serve, scripted, client_of):
    async def main() -> tuple[list, object]:
        async with serve(scripted({7: TURNS * 2}), ["python"], token="secret") as served, client_of(served) as client:
            options = {"model": "tiny", "messages": ASKED, "seed": 7, "logprobs": True}
            stream = await client.chat.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
            return [chunk async for chunk in stream], await client.chat.completions.create(**options)

    chunks, whole = asyncio.run(main())
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    (choice,) = whole.choices
    assert text == choice.message.content and text.endswith("So \\boxed{6}.") and choice.finish_reason == "stop"
    outputs = [call["output"] for call in choice.message.model_extra["server_tool_calls"]]
    assert outputs == ["5", "6"]
    assert chunks[-1].usage == whole.usage and whole.usage.total_tokens > whole.usage.completion_tokens
    assert {entry.logprob for entry in choice.logprobs.content} == {-0.5}


def test_functions_of_the_client_round_trip(serve, scripted, client_of):
    turn = call_turn(("shout", {"text": "six"}), ("shout", {"text": "two"}))

    async def main() -> tuple[object, object]:
        async with serve(scripted({7: [turn, TURNS[-1]]})) as served, client_of(served) as client:
            options = {"model": "tiny", "seed": 7, "tools": [{"type": "function", "function": SHOUT}]}
            async with client.chat.completions.stream(messages=ASKED, **options) as stream:
                async for _ in stream:
                    pass
                first = (await stream.get_final_completion()).choices[0]
            told = [{"role": "tool", "tool_call_id": c.id, "content": "SIX"} for c in first.message.tool_calls]
            messages = [*ASKED, first.message.model_dump(exclude_none=True), *told]
            return first, await client.chat.completions.create(messages=messages, **options)

    first, second = asyncio.run(main())
    assert first.finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments)["text"] for call in first.message.tool_calls] == ["six", "two"]
    assert second.choices[0].message.content == "So \\boxed{6}."


def test_a_response_streams_its_programs_and_goes_on(serve, scripted, client_of):
    async def main() -> tuple[list, object, object]:
        engine = scripted({7: [*TURNS, "Yes.<|im_end|>"]})
        async with serve(engine, ["python"]) as served, client_of(served) as client:
            options = {"model": "tiny", "extra_body": {"seed": 7}}
            code = {"type": "code_interpreter", "container": {"type": "auto"}}
            include = ["code_interpreter_call.outputs"]
            asked = client.responses.stream(input=ASKED[0]["content"], tools=[code], include=include, **options)
            async with asked as stream:
                kinds = [event.type async for event in stream]
                first = await stream.get_final_response()
            second = await client.responses.create(input="Sure?", previous_response_id=first.id, **options)
            return kinds, first, second

    kinds, first, second = asyncio.run(main())
    assert kinds.count("response.code_interpreter_call.completed") == 2 and kinds[-1] == "response.completed"
    calls = [item for item in first.output if item.type == "code_interpreter_call"]
    assert [call.outputs[0].logs for call in calls] == ["5", "6"]
    assert first.output_text.endswith("So \\boxed{6}.") and second.output_text == "Yes."


def test_refusals_are_the_clients_own_errors(serve, scripted, client_of, openai):
    async def main() -> None:
        async with serve(scripted({}), token="secret") as served, client_of(served) as client:
            with pytest.raises(openai.BadRequestError, match="temperature is 1500"):
                await client.chat.completions.create(model="tiny", messages=ASKED, temperature=1.5e3)
            with pytest.raises(openai.NotFoundError, match="is no response that is kept"):
                await client.responses.create(model="tiny", input="x", previous_response_id="resp_x")
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong").models.list()
            assert [model.id async for model in await client.models.list()] == ["tiny"]

    asyncio.run(main())
