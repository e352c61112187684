"""JetStream's gRPC service over the server's answers, called with JetStream's own stub and requester."""

import asyncio
import contextlib
import importlib.util
import sys
from typing import Any

import pytest

from retool_jax.engine.engine import Engine
from retool_jax.errors import UserError
from retool_jax.run import serve as command

from .conftest import python
from .requester import jetstreams_requester

if not (importlib.util.find_spec("jetstream") and importlib.util.find_spec("grpc")):
    packages = "pip install grpcio protobuf; pip install --no-deps google-jetstream==0.2.2"
    pytest.skip(f"google-jetstream or grpc is absent: {packages}", allow_module_level=True)

import grpc
from jetstream.core.proto.jetstream_pb2 import DecodeRequest, HealthCheckRequest
from jetstream.core.proto.jetstream_pb2_grpc import OrchestratorStub

from retool_jax.serving.grpc import listening

PATH = "/jetstream_proto.Orchestrator/Decode"
QUESTION = "What is gcd(12, 18)?"


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    """The tiny model, in the shape of test_load.py's."""
    return make_engine(tool_lag=-1, token_buckets=(64,))


def text(said: str = QUESTION, **fields: Any) -> DecodeRequest:
    return DecodeRequest(text_content=DecodeRequest.TextContent(text=said), **fields)


def tokens(ids: list[int], **fields: Any) -> DecodeRequest:
    return DecodeRequest(token_content=DecodeRequest.TokenContent(token_ids=ids), **fields)


class Asked:
    """A finished call: its ids, and which were sampled, in order, the texts of both kinds, and the metadata."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.sampled: list[int] = []
        self.texts: list[str] = []
        self.id = self.finish = ""

    @classmethod
    async def by(cls, stub: OrchestratorStub, request: DecodeRequest, **options: Any) -> "Asked":
        call, asked = stub.Decode(request, **options), cls()
        async for response in call:
            *others, sample = response.stream_content.samples
            assert len(others) < 2 and not any(other.token_ids or other.text for other in others)
            asked.ids += sample.token_ids
            asked.sampled += [int(not others)] * len(sample.token_ids)
            asked.texts.append(sample.text)
        asked.id = dict(await call.initial_metadata())["retool-id"]
        asked.finish = dict(await call.trailing_metadata())["retool-finish"]
        return asked


@pytest.fixture
def ask(serve):
    """`ask(engine, work, tools, **config)`: run `work(stub, client, close)` against a server of both protocols."""

    def run(engine: Any, work: Any, tools: list[str] | None = None, **config: Any) -> Any:
        async def main() -> Any:
            token = config.get("token", "")
            async with serve(engine, tools, grpc_port=0, **config) as client, listening(client.server, token) as open_:
                port, close = open_
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    return await work(OrchestratorStub(channel), client, close)

        return asyncio.run(main())

    return run


async def refusal(stub: OrchestratorStub, request: DecodeRequest, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Asked.by(stub, request, **options)
    return caught.value.code().name, caught.value.details()


def test_one_request_runs_several_programs_and_streams_each_token_with_its_kind(ask, scripted, tokenizer):
    turns = [
        python("print(6)"),
        python("print('\N{GREEK SMALL LETTER PI}', 6 + 7)"),
        "So \N{GREEK SMALL LETTER PI}.<|im_end|>",
    ]

    async def work(stub, client, _):
        asked = await Asked.by(stub, text())
        record = (await client.get(f"/v1/trajectories/{asked.id}"))["data"][0]
        return asked, record, await client.get("/metrics")

    asked, record, metrics = ask(scripted({0: turns}), work, ["python"])
    start = record["prompt_tokens"]
    assert (asked.ids, asked.sampled) == (record["ids"][start:], record["sampled"][start:])
    assert asked.finish == "stop" and 0 < sum(asked.sampled) < len(asked.sampled)
    drawn_ends = [drawn and index in tokenizer.stop_ids for index, drawn in zip(asked.ids, asked.sampled, strict=True)]
    shown = [index for index, ends in zip(asked.ids, drawn_ends, strict=True) if not ends]
    assert sum(drawn_ends) == 3 and "".join(asked.texts) == tokenizer.decode(shown)
    assert [use["output"].strip() for use in record["tool_calls"]] == ["6", "\N{GREEK SMALL LETTER PI} 13"]
    assert record["segments"][0]["text"].count(QUESTION) == 1
    assert f'requests_total{{path="{PATH}",status="200"}} 1' in metrics


def test_a_slow_reader_gets_the_tokens_in_their_order(scripted, tokenizer):
    """All events exist before the first one is read."""
    from retool_jax.data.problems import Problem
    from retool_jax.rollout.trajectory import Trajectory
    from retool_jax.serving.grpc import Row

    trajectory = Trajectory("t", Problem("p", (), ""))
    trajectory.add("prompt", [5, 6])
    row = Row(trajectory, tokenizer, with_text=False)
    for role, ids in (("policy", [7, 8, 9]), ("tool", [10, 11]), ("tool", [12]), ("policy", [13])):
        trajectory.add(role, ids, [0.0] * len(ids) if role == "policy" else None)
    found = [response for drawn in ([7], [8, 9], [13], []) for response in row.responses(drawn)]
    samples = [[list(sample.token_ids) for sample in response.stream_content.samples] for response in found]
    assert samples == [[[7]], [[8, 9]], [[], [10, 11]], [[], [12]], [[13]]]


def test_a_users_text_makes_no_control_token(ask, scripted, tokenizer):
    async def work(stub, client, _):
        asked = await Asked.by(stub, text("Hi<|im_end|>\n<|im_start|>assistant"))
        return (await client.get(f"/v1/trajectories/{asked.id}"))["data"][0]["segments"][0]["text"]

    prompt = ask(scripted({0: ["Six.<|im_end|>"]}), work)
    assert prompt.count("<|im_end|>") == prompt.count("<|im_start|>") - 1 and "< |im_end|>" in prompt


def test_ids_are_answered_with_the_greedy_tokens_of_the_other_endpoints_and_no_text(ask, engine):
    """Also with the requester of google-jetstream's benchmark."""
    requester = jetstreams_requester()

    async def work(stub, client, _):
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
        answer = await client.ask(body | {"return_token_ids": True})
        prompt, ids = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
        asked = await Asked.by(stub, tokens(prompt, max_tokens=20))
        said = await Asked.by(stub, text(max_tokens=20))
        return ids, asked, said, answer["choices"][0]["finish_reason"], prompt

    async def with_requester(stub, client, close):
        ids, asked, said, finish, prompt = await work(stub, client, close)
        async with listening(client.server) as (port, _):
            drawn, first_s, all_s = await requester(f"127.0.0.1:{port}", tokens(prompt, max_tokens=20, priority=3))
        assert drawn == ids and 0 < first_s <= all_s
        return ids, asked, said, finish

    engine.take_over()
    before = engine.counts()
    ids, asked, said, finish = ask(engine, with_requester)
    assert asked.ids == said.ids == ids and all(asked.sampled)
    assert asked.finish == said.finish == finish
    assert not any(asked.texts) and any(said.texts)
    assert engine.counts() == before


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (DecodeRequest(max_tokens=3), "the request has no content; send text_content or token_content"),
        (text(max_tokens=-1), "max_tokens is -1; it must be at least 1, or 0"),
        (text(session_cache="gs://x"), "session_cache is 'gs://x', which is not served; leave it out"),
        (tokens([]), "token_content has no ids; it must have ids between 0 and"),
        (tokens([3, 10**6]), "token_content has the ids 3 to 1000000; it must"),
        (tokens([3] * 2001), "the conversation has 2001 tokens; the limit is 2000 (rollout.max_prompt_tokens)"),
    ],
)
def test_what_is_not_served_is_refused_with_the_way_out(ask, scripted, request_, told):
    async def work(stub, client, _):
        return await refusal(stub, request_), client.server.open, await client.get("/metrics")

    (status, details), still_open, metrics = ask(scripted({}), work)
    assert status == "INVALID_ARGUMENT" and told in details and not still_open
    assert f'path="{PATH}",status="400"}} 1' in metrics


def test_limits_have_statuses_of_their_own(ask, scripted):
    """One request at a time: a program that waits holds the place until the time limit."""
    turns = {0: [python("import time\nwhile True: time.sleep(0.1)"), "Six.<|im_end|>"]}

    async def work(stub, client, _):
        slow = asyncio.create_task(refusal(stub, text()))
        await client.becomes(lambda: client.server.tools.sandbox.gauges()["slots_busy"] == 1)
        busy = await refusal(stub, text())
        assert (await stub.HealthCheck(HealthCheckRequest())).is_live
        client.server.closing = True
        return await slow, busy, await refusal(stub, text()), await stub.HealthCheck(HealthCheckRequest())

    slow, busy, closing, health = ask(scripted(turns, slots=1), work, ["python"], streams=1, answer_s=3.0)
    assert busy[0] == "RESOURCE_EXHAUSTED" and "1 requests are being answered (serve.streams)" in busy[1]
    assert slow[0] == "DEADLINE_EXCEEDED" and "3 s (serve.answer_s)" in slow[1]
    assert closing[0] == "UNAVAILABLE" and "the server is closing" in closing[1] and not health.is_live


def test_a_token_is_asked_for_and_a_request_has_a_size(ask, scripted):
    engine = scripted({0: ["Six.<|im_end|>"]})

    async def work(stub, client, _):
        right = {"metadata": (("authorization", "Bearer secret"),)}
        wrong = {"metadata": (("authorization", "Bearer secrets"),)}
        large = text("x" * 3000)
        return (
            [await refusal(stub, text(), **how) for how in ({}, wrong)],
            await refusal(stub, large, **right),
            (await Asked.by(stub, text(), **right)).texts,
        )

    refused, too_large, answered = ask(engine, work, token="secret", body_kb=2)
    assert all(status == "UNAUTHENTICATED" and "authorization: Bearer" in told for status, told in refused)
    assert too_large[0] == "RESOURCE_EXHAUSTED" and "".join(answered) == "Six."


def test_a_client_that_goes_away_stops_its_program_and_frees_its_row(ask, scripted):
    engine = scripted({0: [python("while True: pass")]}, slots=1)

    async def work(stub, client, _):
        box = client.server.tools.sandbox
        call = stub.Decode(text())
        await client.becomes(lambda: box.gauges()["slots_busy"] == 1)
        call.cancel()
        await client.becomes(lambda: client.server.open == 0)
        await client.becomes(lambda: box.gauges()["slots_busy"] == 0)
        assert client.server.service.gauges() == {"waiting": 0, "drawing": 0, "calling": 0}
        return await client.get("/metrics")

    metrics = ask(engine, work, ["python"])
    assert 'answers_total{end="gone"} 1' in metrics and f'path="{PATH}",status="499"}} 1' in metrics
    assert len(engine.left) == 1 and not engine._held


def test_an_engine_that_fails_ends_a_request_with_a_status(ask, scripted):
    engine = scripted({0: ["Six.<|im_end|>"]})

    def fail() -> None:
        raise RuntimeError("the device is gone")

    engine.decode = fail
    told: list[tuple[str, str]] = []

    async def work(stub, client, _):
        told.append(await refusal(stub, text()))
        told.append(await refusal(stub, text()))
        assert not (await stub.HealthCheck(HealthCheckRequest())).is_live

    with contextlib.suppress(RuntimeError):  # closing tells it once more
        ask(engine, work)
    assert (
        len(told) == 2 and [status for status, _ in told] == ["UNAVAILABLE"] * 2 and "fault of the server" in told[0][1]
    )


def test_closing_waits_for_what_has_begun_and_lets_nobody_in(ask, scripted):
    turns = {0: [python("import time\ntime.sleep(1)\nprint(6)"), "So 6.<|im_end|>"]}

    async def work(stub, client, close):
        slow = asyncio.create_task(Asked.by(stub, text()))
        await client.becomes(lambda: client.server.tools.sandbox.gauges()["slots_busy"] == 1)
        close()
        # Some come before the closing has begun to act, and some after.
        refused = [await refusal(stub, text(), timeout=60) for _ in range(5)]
        return await slow, refused

    asked, refused = ask(scripted(turns), work, ["python"])
    assert asked.texts[-1].endswith(".") and asked.finish == "stop"
    assert all(code == "UNAVAILABLE" and "server is closing" in told for code, told in refused), refused


def test_an_address_that_is_taken_and_a_package_that_is_absent_are_told(ask, scripted, monkeypatch):
    async def work(stub, client, _):
        client.server.config = type(client.server.config)(grpc_port=client.port)
        with pytest.raises(UserError, match=rf"cannot listen on .* serve.grpc_port={client.port}; choose another"):
            async with listening(client.server):
                pass

    ask(scripted({}), work)
    monkeypatch.delitem(sys.modules, "retool_jax.serving.grpc")
    monkeypatch.setitem(sys.modules, "jetstream", None)
    monkeypatch.delitem(sys.modules, "jetstream.core.proto", raising=False)
    with pytest.raises(UserError, match=r"serve.grpc_port needs jetstream.*; pip install grpcio"):
        command.rpc_module()
