"""A server under load: concurrent streams, clients that go away, limits, and an engine that is empty afterwards."""

import asyncio
import contextlib
import dataclasses
import json
from typing import Any

import pytest

from retool_jax.engine.engine import Engine

from .conftest import python

USER = {"role": "user", "content": "What is gcd(12, 18)?"}
CHAT = "/v1/chat/completions"


def body(seed: int = 7, **fields: Any) -> dict:
    return {"messages": [USER], "seed": seed, "return_token_ids": True, "max_tokens": 30} | fields


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    """The tiny model."""
    return make_engine(tool_lag=-1, token_buckets=(64,))


def ids_of(chunks: list[dict]) -> list[int]:
    return [index for chunk in chunks for choice in chunk["choices"] for index in choice.get("token_ids", [])]


def test_twenty_streams_side_by_side_give_the_ids_of_single_requests(serve, engine):
    engine.take_over()
    before = engine.counts()

    async def main() -> tuple[list[list[int]], list[list[int]]]:
        async with serve(engine) as client:
            streams = await asyncio.gather(*[client.stream(body(seed, stop="zzz")) for seed in range(20)])
            single = [await client.ask(body(seed)) for seed in range(4)]
            assert client.server.open == 0
            return list(map(ids_of, streams)), [answer["choices"][0]["token_ids"] for answer in single]

    streams, single = asyncio.run(main())
    assert streams[:4] == single and len({tuple(ids) for ids in streams}) > 10
    assert engine.counts() == before


def test_log_probabilities_are_those_of_a_fresh_forward(serve, engine, fresh_logits):
    import jax
    import numpy as np

    async def main() -> dict:
        async with serve(engine) as client:
            return await client.ask(body(logprobs=True, temperature=1))

    answer = asyncio.run(main())
    prompt, ids = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    logits = fresh_logits([[*prompt, *ids]])[0]
    plain = jax.nn.log_softmax(logits, axis=-1)[len(prompt) - 1 : -1]
    told = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]
    np.testing.assert_allclose(told, plain[np.arange(len(ids)), ids], atol=1e-4)


def test_usage_says_how_much_of_a_prompt_an_earlier_answer_had_written(serve, engine, monkeypatch):
    engine.take_over()
    before = engine.counts()
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, prefix_tokens=200))

    async def main() -> list[dict]:
        async with serve(engine) as client:
            return [await client.ask(body()) for _ in range(2)]

    first, second = asyncio.run(main())
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
    assert cached == [0, first["usage"]["prompt_tokens"] - 1]
    assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
    assert engine.counts() == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_its_row_back(serve, engine, stream):
    """While other answers are completed."""
    engine.take_over()
    before = engine.counts()

    async def main() -> None:
        async with serve(engine) as client:
            others = asyncio.gather(*[client.stream(body(seed, max_tokens=60)) for seed in range(3)])
            for seed in range(6):
                request = client.session.post(CHAT, json=body(seed, stream=stream, max_tokens=60))
                if stream:
                    async with request as response:
                        await response.content.readline()
                        response.close()
                else:
                    task = asyncio.create_task(request.__aenter__())
                    await asyncio.sleep(0.005 * (seed + 1))  # at one stage or another
                    task.cancel()
                    await asyncio.wait([task])
            assert all(await others)
            await client.becomes(lambda: client.server.open == 0)

    asyncio.run(main())
    assert engine.counts() == before


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_program(serve, scripted, stream):
    engine = scripted({7: [python("while True: pass")]}, slots=1)

    async def main() -> None:
        async with serve(engine, ["python"]) as client:
            box = client.server.tools.sandbox
            task = asyncio.create_task(client.ask(body(stream=stream, max_tokens=500)))
            await client.becomes(lambda: box.gauges()["slots_busy"] == 1)
            task.cancel()
            await client.becomes(lambda: client.server.open == 0)
            await client.becomes(lambda: box.gauges()["slots_busy"] == 0)
            assert client.server.service.gauges() == {"waiting": 0, "drawing": 0, "calling": 0}
            assert 'end="gone"} 1' in await client.get("/metrics")

    asyncio.run(main())
    assert len(engine.left) == 1 and not engine._held


def test_what_is_too_much_is_refused_and_the_rest_is_answered(serve, scripted):
    """One request at a time: a program that waits holds the place."""
    turns = {7: [python("import time\nwhile True: time.sleep(0.1)")], 8: ["Six.<|im_end|>"] * 2}
    engine = scripted(turns, slots=1)

    async def main() -> None:
        async with serve(engine, ["python"], streams=1) as client:
            box = client.server.tools.sandbox
            slow = asyncio.create_task(client.ask(body(max_tokens=500)))
            await client.becomes(lambda: box.gauges()["slots_busy"] == 1)
            busy = await client.ask(body(8), status=429)
            assert "1 requests are being answered (serve.streams)" in busy["error"]["message"]
            slow.cancel()
            await client.becomes(lambda: client.server.open == 0)
            assert (await client.ask(body(8)))["choices"][0]["message"]["content"] == "Six."
            client.server.closing = True
            async with client.session.post(CHAT, json=body(8)) as response:
                assert response.status == 503 and response.headers["Retry-After"] == "1"
            assert (await client.get("/health", status=503))["status"] == "closing"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_is_given_up_and_says_so(serve, scripted, stream):
    engine = scripted({7: [python("while True: pass")]}, slots=1)

    async def main() -> dict:
        async with serve(engine, ["python"], answer_s=0.3) as client:
            asked = body(max_tokens=500)
            last = (await client.stream(asked))[-1] if stream else await client.ask(asked, status=503)
            await client.becomes(lambda: client.server.service.gauges()["calling"] == 0)
            return last

    error = asyncio.run(main())["error"]
    assert error["code"] == "timeout" and "0.3 s (serve.answer_s)" in error["message"]
    assert len(engine.left) == 1


def test_an_engine_that_fails_ends_every_request_with_a_status(serve, scripted):
    engine = scripted({7: ["Six.<|im_end|>"], 8: ["Six.<|im_end|>"]}, slots=2)

    def fail() -> None:
        raise RuntimeError("the device is gone")

    engine.decode = fail
    told: list[str] = []

    async def main() -> None:
        async with serve(engine) as client:
            whole, stream = client.ask(body(), status=503), client.stream(body(8))
            error, events = await asyncio.gather(whole, stream)
            assert "fault of the server" in error["error"]["message"] and "error" in events[-1]
            assert (await client.get("/health", status=503))["status"] == "closing"
            assert "takes no conversations" in (await client.ask(body(), status=503))["error"]["message"]
            told.append("ended")

    with contextlib.suppress(RuntimeError):  # closing tells it once more
        asyncio.run(main())
    assert "ended" in told


def test_a_broken_connection_is_no_fault(serve, scripted):
    async def main() -> None:
        async with serve(scripted({7: ["Six.<|im_end|>"]})) as client:
            _, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
            await writer.drain()
            writer.close()
            assert (await client.ask(body()))["choices"][0]["message"]["content"] == "Six."

    asyncio.run(main())


def test_a_stream_is_written_to_at_once_and_then_with_what_came_meanwhile(serve, scripted, monkeypatch):
    """A dispatch draws three tokens; those of another one may be there when the first are written."""
    monkeypatch.setattr("retool_jax.serving.server._PIECE_S", 60.0)  # longer than the answer, on any machine
    engine = scripted({7: ["word " * 300 + "<|im_end|>"]})

    async def main() -> list[list[dict]]:
        async with serve(engine) as client:
            asked = body(stream=True, max_tokens=500)
            async with client.session.post(CHAT, json=asked) as response:
                parts, whole = [], b""
                async for data, ends in response.content.iter_chunks():
                    whole += data
                    if ends:
                        parts, whole = [*parts, whole], b""
        events = [[line[6:] for line in part.decode().split("\n\n") if line] for part in parts]
        assert events[-1][-1] == "[DONE]"
        return [[json.loads(each) for each in event if each != "[DONE]"] for event in events]

    writes = asyncio.run(main())
    assert 1 <= len(ids_of(writes[0])) <= 6
    told = len(ids_of([chunk for write in writes for chunk in write]))
    assert told > 250 and len(writes) <= 4
