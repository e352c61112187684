"""The Open Responses specification, as in its six compliance cases: every object has the specification's form, and the
events of a stream add up to the response at its end. The policy's words come from a script."""

import asyncio
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .conftest import call_turn

PATH = "/v1/responses"
ANSWER = "Twelve and eighteen have \\boxed{6}."
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "What the weather is at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}


# --- the specification's objects: exactly these fields, of these types ---


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Logprob(Form):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Any]


class Text(Form):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class Thought(Form):
    type: Literal["reasoning_text"]
    text: str


Status = Literal["in_progress", "completed", "incomplete"]


class Message(Form):
    type: Literal["message"]
    id: Annotated[str, Field(pattern="^msg_")]
    status: Status
    role: Literal["assistant"]
    content: list[Text]


class Reasoning(Form):
    type: Literal["reasoning"]
    id: Annotated[str, Field(pattern="^rs_")]
    status: Status
    summary: list[Any]
    content: list[Thought]
    encrypted_content: None


class FunctionCall(Form):
    type: Literal["function_call"]
    id: Annotated[str, Field(pattern="^fc_")]
    call_id: Annotated[str, Field(pattern="^call_")]
    name: str
    arguments: str
    status: Status


Item = Annotated[Message | Reasoning | FunctionCall, Field(discriminator="type")]


class Cached(Form):
    cached_tokens: int


class Reasoned(Form):
    reasoning_tokens: int


class Usage(Form):
    input_tokens: int
    input_tokens_details: Cached
    output_tokens: int
    output_tokens_details: Reasoned
    total_tokens: int


class Function(Form):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class Response(Form):
    id: Annotated[str, Field(pattern="^resp_")]
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    incomplete_details: dict[str, str] | None
    error: dict[str, str] | None
    model: str
    previous_response_id: str | None
    instructions: str | None
    output: list[Item]
    tools: list[Function]
    tool_choice: Literal["auto", "none"]
    truncation: Literal["auto", "disabled"]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, None]
    temperature: float
    top_p: float
    top_logprobs: int
    presence_penalty: float
    frequency_penalty: float
    usage: Usage | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    store: bool
    background: bool
    service_tier: str
    metadata: dict[str, str]
    safety_identifier: str | None
    prompt_cache_key: str | None
    user: str | None


class Event(Form):
    sequence_number: int


class OfResponse(Event):
    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete"]
    response: Response


class OfItem(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Item


class InItem(Event):
    item_id: str
    output_index: int


class OfPart(InItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: Text | Thought


class TextDelta(InItem):
    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[Logprob]


class TextDone(InItem):
    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[Logprob]


class ThoughtDelta(InItem):
    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ThoughtDone(InItem):
    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ArgumentsDelta(InItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(InItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


KINDS = (
    OfResponse | OfItem | OfPart | TextDelta | TextDone | ThoughtDelta | ThoughtDone | ArgumentsDelta | ArgumentsDone
)
EVENT = TypeAdapter(Annotated[KINDS, Field(discriminator="type")])


def built(events: list[dict]) -> dict:
    """The response at the end of a stream, after checking the form of each event and that they add up to that
    response."""
    output: list[dict] = []
    for number, event in enumerate(events):
        EVENT.validate_python(event)
        assert event["sequence_number"] == number
        kind = event["type"].removeprefix("response.")
        if "output_index" in event:
            assert event["output_index"] == len(output) - (kind != "output_item.added")
        if "item_id" in event:
            assert event["item_id"] == output[-1]["id"] and output[-1]["status"] == "in_progress"
        if kind == "output_item.added":
            assert not output or output[-1]["status"] != "in_progress"
            output.append(event["item"] | {"content": []} if "content" in event["item"] else event["item"])
        elif kind == "content_part.added":
            assert event["content_index"] == len(output[-1]["content"]) and event["part"]["text"] == ""
            output[-1]["content"] = [*output[-1]["content"], event["part"]]
        elif kind == "function_call_arguments.delta":
            output[-1]["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            part = output[-1]["content"][event["content_index"]]
            part["text"] += event["delta"]
            part |= {"logprobs": part["logprobs"] + event["logprobs"]} if "logprobs" in event else {}
        elif kind == "output_item.done":
            assert event["item"] == output[-1] | {"status": event["item"]["status"]}
            assert event["item"]["id"] not in {item["id"] for item in output[:-1]}
            output[-1] = event["item"]
        elif kind.endswith("_part.done"):
            assert event["part"] == output[-1]["content"][event["content_index"]]
        elif kind.endswith(".done"):
            whole = output[-1] if "arguments" in event else output[-1]["content"][event["content_index"]]
            fields = ("arguments", "name") if "arguments" in event else ("text", "logprobs")
            assert {f: event[f] for f in fields if f in event} == {f: whole[f] for f in fields if f in whole}
    first, second, *_, last = events
    assert [first["type"], second["type"]] == ["response.created", "response.in_progress"]
    assert first["response"]["status"] == "in_progress" and first["response"]["output"] == []
    assert last["response"]["output"] == output and last["response"]["id"] == first["response"]["id"]
    assert last["type"] == f"response.{last['response']['status']}"
    return last["response"]


def user(text: str) -> dict:
    return {"type": "message", "role": "user", "content": text}


def body(**fields: Any) -> dict:
    return {"model": "tiny", "seed": 7, "input": [user("What is the gcd of 12 and 18?")]} | fields


@pytest.fixture
def both(serve, scripted):
    """A request's response, checked to be equal streamed and not, and the text of its conversation."""

    def ask(turns: list[str], asked: dict) -> tuple[dict, str]:
        async def main() -> tuple[dict, list[dict], dict]:
            async with serve(scripted({7: [turn + "<|im_end|>" for turn in [*turns, *turns]]})) as client:
                whole, events = await client.ask(asked, PATH), await client.stream(asked, PATH)
                return whole, events, await client.get(f"/v1/trajectories/{whole['id']}")

        whole, events, kept = asyncio.run(main())
        Response.model_validate(whole)
        streamed = built(events)
        own = {"id", "created_at", "completed_at"}

        def common(response: dict) -> dict:
            items = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
            return {k: v for k, v in response.items() if k not in own} | {"output": items}

        assert common(whole) == common(streamed)
        return whole, "".join(segment["text"] for segment in kept["data"][0]["segments"])

    return ask


def texts(response: dict) -> list[str]:
    return [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]


def test_basic_text_with_and_without_streaming(both):
    response, _ = both([ANSWER], body())
    assert (response["status"], texts(response)) == ("completed", [ANSWER])
    assert isinstance(response["completed_at"], int)
    assert (
        response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + response["usage"]["output_tokens"] > 0
    )


def test_thoughts_are_items_of_their_own_and_a_text_tells_of_its_tokens(both):
    asked = body(include=["message.output_text.logprobs"], metadata={"run": "1"}, temperature=0.5)
    response, _ = both([f"<think>\nLet me see.\n</think>\n\n{ANSWER}"], asked)
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    entries = response["output"][1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in entries).strip("\n") == ANSWER
    assert (response["metadata"], response["temperature"]) == ({"run": "1"}, 0.5)


@pytest.mark.parametrize("fields", [{"instructions": "Speak as a pirate."}, {}], ids=["instructions", "an item"])
def test_a_system_prompt_stands_before_the_conversation(both, fields):
    first = [] if fields else [{"type": "message", "role": "system", "content": "Speak as a pirate."}]
    response, conversation = both([ANSWER], body(**fields, input=[*first, user("Hello?")]))
    assert conversation.startswith("<|im_start|>system\nSpeak as a pirate.")
    assert response["instructions"] == fields.get("instructions")


def test_a_function_is_called_with_and_without_streaming(both):
    turn = call_turn(("weather", {"place": "Oslo"})).removesuffix("<|im_end|>")
    response, _ = both([turn], body(tools=[WEATHER]))
    *_, call = response["output"]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"place": "Oslo"}')
    assert (response["status"], call["status"]) == ("completed", "completed")
    assert response["tools"] == [WEATHER | {"strict": None}]


def test_several_turns_are_one_conversation(both):
    said = [user("I am Ada."), {"type": "message", "role": "assistant", "content": "Hello, Ada!"}, user("Who am I?")]
    _, conversation = both(["You are Ada."], body(input=said))
    places = [conversation.index(words) for words in ("I am Ada.", "Hello, Ada!", "Who am I?", "You are Ada.")]
    assert places == sorted(places)


def test_an_image_is_refused_and_the_refusal_says_what_is_served(serve, scripted):
    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    asked = body(input=[{"type": "message", "role": "user", "content": [image]}])

    async def main() -> list[dict]:
        async with serve(scripted({})) as client:
            return [await client.ask(asked | {"stream": stream}, PATH, status=400) for stream in (False, True)]

    for answer in asyncio.run(main()):
        error = answer["error"]
        assert "'input_image'; only text is served" in error["message"] and error["type"] == "invalid_request_error"
