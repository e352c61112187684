"""The scheduler as a service: conversations join at any time, from any thread, and tokens come as they are read."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from retool_jax.engine.conversation import Finish, SamplingParams, Tokens
from retool_jax.engine.pages import OutOfPages
from retool_jax.engine.scheduler import Service

from .chats import Chat, chats, play, quiet, run


def drawn(chat: Chat) -> list[int]:
    return [token for token, sampled in zip(chat.ids, chat.sampled, strict=True) if sampled]


@pytest.mark.parametrize("tool_lag", [-1, 1])
def test_a_conversation_may_join_while_others_draw(engines, reference, tool_lag):
    """The others are at all stages by then, and the draws equal those of a run in which all began together."""
    conversations = chats(delay=0.01)
    engine = engines(tool_lag=tool_lag)

    async def scenario() -> list[Finish]:
        async with Service(engine) as service:
            done = []
            for chat in conversations:
                done.append(service.submit(chat))
                await asyncio.sleep(0.005)
            return await asyncio.gather(*done)

    assert play(scenario) == [Finish.ENDED] * len(conversations) and quiet(engine)
    for ours, expected in zip(conversations, reference, strict=True):
        assert ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


def test_an_idle_service_waits_for_work_and_counts_what_it_did(engines):
    async def scenario() -> None:
        async with Service(engines()) as service:
            for chat in chats(3):
                await asyncio.sleep(0.02)
                await service.submit(chat)
                statistics = service.take_statistics()
                assert statistics.decoded_tokens == len(drawn(chat)) and statistics.total_s >= 0.01
            assert service.take_statistics().decoded_tokens == 0

    play(scenario)


def test_conversations_do_not_wait_for_tools_of_others(engines):
    """There is one slot, and a tool that answers only after a conversation that came later has ended."""
    other = Chat([4, 5, 6], 2, turns=1)
    late = asyncio.Event()

    class Waiting(Chat):
        async def answer(self) -> list[int] | None:
            late.set()
            while not other.ended:
                await asyncio.sleep(0.001)
            return await super().answer()

    async def scenario() -> None:
        async with Service(engines(slots=1, decode_steps=32, tool_lag=-1)) as service:
            first = service.submit(Waiting([1, 2, 3], 1, turns=2))
            await late.wait()
            await asyncio.sleep(0.02)  # now the service can only wait
            assert await service.submit(other) == await first == Finish.ENDED

    play(scenario)


def test_tokens_come_as_they_are_read_and_none_is_revoked(engines):
    """With turns that end in several tokens: no piece has tokens that were drawn after an end."""
    conversations = chats(halves=True)
    pieces: dict[int, list[Tokens]] = {chat.request: [] for chat in conversations}

    async def scenario() -> None:
        async with Service(engines(slots=16, decode_steps=1, tool_lag=0)) as service:
            done = [service.submit(chat, on_tokens=pieces[chat.request].append) for chat in conversations[1:]]
            async for piece in service.stream(conversations[0]):
                pieces[100].append(piece)
                assert not conversations[0].dropped
            await asyncio.gather(*done)

    play(scenario)
    for chat in conversations:
        assert [token for piece in pieces[chat.request] for token in piece.ids] == drawn(chat)
        logprobs = [value for piece in pieces[chat.request] for value in piece.logprobs]
        assert logprobs == [value for value, sampled in zip(chat.logprobs, chat.sampled, strict=True) if sampled]
        assert max(len(piece.ids) for piece in pieces[chat.request]) == 1


def test_a_conversation_is_dropped_when_its_stream_is_closed(engines):
    chat = Chat([1, 2, 3], 7, turns=4)
    engine = engines()

    async def scenario() -> None:
        async with Service(engine) as service:
            stream = service.stream(chat)
            await anext(stream)
            await stream.aclose()
            while not chat.dropped:
                await asyncio.sleep(0.001)

    play(scenario)
    assert chat.dropped == Finish.CANCELLED and quiet(engine)


# --- how a conversation draws -----------------------------------------------------------------------------------------


def test_each_conversation_draws_in_its_own_way(engines):
    """Together on one engine: greedy, top_k=1, and sampled with a seed."""
    greedy, top, plain, again = (Chat([9, 8, 7], request, turns=1) for request in (1, 2, 4, 4))
    ways = [SamplingParams(0.0), SamplingParams(1.0, top_k=1), None, SamplingParams()]

    async def scenario() -> None:
        async with Service(engines()) as service:
            together = zip((greedy, top, plain, again), ways, strict=True)
            await asyncio.gather(*[service.submit(chat, way) for chat, way in together])

    play(scenario)
    assert drawn(greedy) == drawn(top) and drawn(plain) == drawn(again) != drawn(greedy)


@pytest.fixture(scope="module")
def talker(engines) -> list[int]:
    """The longest turn of some requests, that of the first id in it: [request, *ids]."""
    talkers = [Chat([9, 8, 7], request, turns=1) for request in range(16)]
    run(engines(), talkers)
    longest = max(talkers, key=lambda chat: len(chat.ids))
    return [longest.request, *drawn(longest)]


@pytest.mark.parametrize("which", [[0], [3], [7], [8], [-2], [-1], [2, 5, 9, 11, 12, 13, 14, 15], []])
def test_a_turn_ends_on_the_device_at_ids_of_its_own(engines, talker, which):
    """Wherever in a dispatch they are, nothing is drawn after them; they hold for the next turn, and not for others."""
    request, *ids = talker
    assert len(ids) > 16, "more than two dispatches"
    own = frozenset(ids[place] for place in which)
    end = next((place + 1 for place, token in enumerate(ids) if token in own), len(ids))
    stopped, other = Chat([9, 8, 7], request, turns=2), Chat([9, 8, 7], request, turns=1)

    async def scenario() -> int:
        async with Service(engines()) as service:
            done = service.submit(stopped, SamplingParams(stop_ids=own)), service.submit(other)
            await asyncio.gather(*done)
            return service.take_statistics().decoded_tokens

    assert play(scenario) == len(drawn(stopped)) + len(drawn(other))
    assert drawn(other) == ids and drawn(stopped)[:end] == ids[:end] and not stopped.sampled[3 + end]
    second = drawn(stopped)[end:]
    assert second and not own.intersection(second[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5 must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop_ids": frozenset(range(9))}, r"stop_ids=\[0, .*, 8\] are 9; give at most 8"),
    ],
)
def test_an_impossible_way_to_draw_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


# --- ends and faults --------------------------------------------------------------------------------------------------


def test_every_end_has_its_name(engines):
    engine = engines(slots=2, tool_lag=-1)
    forever = asyncio.Event()

    class Waiting(Chat):
        async def answer(self) -> list[int] | None:
            await forever.wait()

    ended, cancelled, closed, new = Chat([1], 1, turns=1), Waiting([2], 2), Waiting([3], 3), Chat([4], 4)

    async def scenario() -> list[asyncio.Future]:
        async with Service(engine) as service:
            done = [service.submit(chat) for chat in (ended, cancelled, closed)]
            assert await done[0] == Finish.ENDED
            done[1].cancel()
            while not cancelled.dropped:
                await asyncio.sleep(0.001)
            done.append(service.submit(new))
        with pytest.raises(RuntimeError, match="takes no conversations"):
            service.submit(Chat([5], 5))
        return done

    _, second, third, fourth = play(scenario)
    assert second.cancelled() and (third.result(), fourth.result()) == (Finish.CLOSED, Finish.CLOSED)
    assert (ended.dropped, cancelled.dropped) == ("", "cancelled")
    assert (closed.dropped, new.dropped) == ("the scheduler was closed",) * 2 and quiet(engine)


@pytest.mark.parametrize("tool_lag", [-1, 1])
def test_a_fault_ends_its_own_conversation_and_no_other(engines, reference, tool_lag):
    """In each place where a conversation, its tool or its listener can fail."""
    conversations = chats(delay=0.005)

    def broken(*_: object) -> None:
        raise LookupError("broken")

    class Broken(Chat):
        async def answer(self) -> list[int] | None:
            broken()

    class Endless(Chat):
        async def answer(self) -> list[int] | None:
            return [1] * 200

    ill = [Chat([1, 2], i, turns=3) for i in range(4)] + [Broken([1, 2], 4, turns=3), Endless([1, 2], 5, turns=3)]
    ill[0].turn_budget = ill[1].stop_at = ill[2].end_turn = broken
    engine = engines(tool_lag=tool_lag)

    async def scenario() -> list:
        async with Service(engine) as service:
            done = []
            for i, chat in enumerate(conversations):
                done.append(service.submit(chat))
                if i < len(ill):
                    done.append(service.submit(ill[i], on_tokens=broken if i == 3 else None))
            return await asyncio.gather(*done, return_exceptions=True)

    results = play(scenario)
    faults = [result for result in results if isinstance(result, Exception)]
    assert len(faults) == 6 and results.count(Finish.ENDED) == len(conversations) and quiet(engine)
    assert [str(fault) for fault in faults if isinstance(fault, LookupError)] == ["broken"] * 5
    assert "request 5 would hold" in str(next(fault for fault in faults if isinstance(fault, ValueError)))
    assert [chat.ids for chat in conversations] == [chat.ids for chat in reference]


def test_what_cannot_be_run_is_refused_at_the_door(engines):
    engine = engines()

    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="takes no conversations") as refused:
            Service(engine).submit(Chat([1], 1))
        assert str(refused.value.__cause__) == "the scheduler is not running; use `async with`"
        async with Service(engine) as service:
            for prompt, request, message in (
                ([], 1, "request 1 has a prompt of 0 tokens; a row holds 1 to 96"),
                ([1] * 97, 1, "a prompt of 97 tokens"),
                ([1], -1, "request -1 must lie between 0 and"),
            ):
                with pytest.raises(ValueError, match=message):
                    service.submit(Chat(prompt, request))
            prefixes = [engine.write_prefix([1] * 96) for _ in range(4)]
            with pytest.raises(OutOfPages, match="others hold the pages that request 3 needs"):
                await service.submit(Chat([1], 3))
            for prefix in prefixes:
                prefix.release()
            assert quiet(engine)
            assert await service.submit(Chat([1], 3, turns=1)) == Finish.ENDED

    play(scenario)


def test_an_engine_error_reaches_all_conversations_and_ends_the_service(engines):
    """Here another thread has taken it over. Conversations without a seat get the error too."""
    engine = engines(slots=2)

    async def scenario() -> None:
        async with Service(engine) as service:
            with ThreadPoolExecutor(1, "other") as other:
                other.submit(engine.take_over).result()
            done = [service.submit(Chat([1, 2], i)) for i in range(3)]
            for fault in await asyncio.gather(*done, return_exceptions=True):
                assert isinstance(fault, RuntimeError) and "used by thread other_0" in str(fault)
            with pytest.raises(RuntimeError, match="takes no conversations"):
                service.submit(Chat([1], 9))
            engine.take_over()

    play(scenario)
    assert quiet(engine)
    run(engine, [chat := Chat([1], 1, turns=1)])
    assert chat.ended


@pytest.mark.parametrize(
    ("broken", "taken_over", "stubborn"),
    [({3}, False, False), ({4}, False, False), ({3, 4}, False, False), ({1, 2}, False, True), ((), True, True)],
)
def test_closing_completes_although_the_device_fails(engines, monkeypatch, broken, taken_over, stubborn):
    """With deleted results, or an engine of another thread: tools end, all get the error, and nothing is kept."""
    engine = engines(slots=2, tool_lag=-1)
    decode, dispatched, ended = engine.decode, [], []
    calling = asyncio.Event()

    def failing():
        dispatched.append(decode())
        if len(dispatched) in broken:
            dispatched[-1].ints.delete()
        return dispatched[-1]

    monkeypatch.setattr(engine, "decode", failing)

    class Waiting(Chat):
        async def answer(self) -> list[int] | None:
            calling.set()
            try:
                await asyncio.sleep(50)
            finally:
                ended.append(self.request)
                if stubborn:
                    raise LookupError("the tool does not end well")

        def drop(self, reason: str) -> None:
            super().drop(reason)
            if stubborn:
                raise LookupError("nor does its conversation")

    # One calls its tool in the first dispatch; the others share a prompt and continue; one of these has no seat.
    talks = [Waiting([9], 1, turn_limit=1), *(Chat([1, 2, 3], i, turns=99) for i in range(2, 6))]
    futures: list[asyncio.Future] = []

    async def scenario() -> None:
        async with Service(engine) as service:
            futures.extend(service.submit(chat) for chat in talks)
            if taken_over:
                await calling.wait()
                with ThreadPoolExecutor(1, "other") as other:
                    other.submit(engine.take_over).result()
            await asyncio.wait(futures)

    with pytest.raises(RuntimeError, match="used by thread other_0" if taken_over else "deleted"):
        play(scenario)
    assert all(isinstance(future.exception(), RuntimeError) for future in futures)
    assert ended == ([1] if calling.is_set() else []) and all(chat.dropped == Finish.CLOSED for chat in talks)
    engine.take_over()
    if taken_over:
        engine.clear()  # this thread could not free its rows then
    monkeypatch.undo()
    assert quiet(engine)
    run(engine, [chat := Chat([1], 1, turns=1)])
    assert chat.ended


# --- threads and weights ----------------------------------------------------------------------------------------------


def short(n: int) -> list[Chat]:
    rng = np.random.default_rng(0)
    return [Chat(rng.integers(1, 60, rng.integers(1, 30)).tolist(), i, turns=1, turn_limit=4) for i in range(n)]


def test_a_second_thread_runs_a_thousand_requests(many, params, compiles):
    """While the engine's own thread has requests too, and with new weights in between."""
    theirs, ours, expected = short(250) + short(250) + short(250) + short(250), short(100), short(250)
    run(many, expected)
    many.update_params(params)  # so that its program is compiled
    known = len(compiles)
    seen: set[str] = set()

    async def scenario() -> list[Finish]:
        async with Service(many) as service:

            def work() -> list[Finish]:
                with pytest.raises(RuntimeError, match="use submit_from_thread"):
                    service.submit(theirs[0])
                seen.add(threading.current_thread().name)
                done = [service.submit_from_thread(chat) for chat in theirs[:500]]
                results = [future.result(60) for future in done]
                service.from_thread(many.update_params, params).result(60)  # equal weights, so draws do not change
                done = [service.submit_from_thread(chat) for chat in theirs[500:]]
                return results + [future.result(60) for future in done]

            with ThreadPoolExecutor(1, "second") as pool:
                second = asyncio.get_running_loop().run_in_executor(pool, work)
                for chat in ours:
                    await service.submit(chat)
                return await second

    version = many.version
    assert play(scenario, 120) == [Finish.ENDED] * 1000 and seen == {"second_0"}
    assert many.version == version + 1 and len(compiles) == known and quiet(many)
    assert [chat.ids for chat in theirs] == 4 * [chat.ids for chat in expected]
    assert [chat.ids for chat in ours] == [chat.ids for chat in expected[:100]]
