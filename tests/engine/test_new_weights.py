"""New weights while conversations run: which weights draw which tokens, and what happens to old conversations."""

import asyncio
from dataclasses import replace

import jax
import numpy as np
import pytest

from retool_jax.engine.conversation import Finish, Tokens
from retool_jax.engine.scheduler import Service, converse
from retool_jax.models.decoder import Params

from .chats import Chat, play, quiet, run


@pytest.fixture(scope="module")
def newer(params) -> Params:
    return jax.tree.map(lambda x: x * 1.1, params)


def test_tokens_say_which_weights_drew_them(make_engine, model, params):
    """Conversations submitted after new weights came use only those, as on an engine that never had others."""
    stops = range(0, model.vocab_size, 16)
    newer = jax.tree.map(lambda x: x * 1.1, params)
    engine, fresh = make_engine(0, stops), make_engine(0, stops)
    fresh.update_params(newer)
    before, after, expected = (Chat([5, 6, 7], 1, turns=2) for _ in range(3))
    run(fresh, [expected])

    async def scenario() -> tuple[list[Tokens], list[Tokens]]:
        async with Service(engine) as service:
            first = [piece async for piece in service.stream(before)]
            engine.update_params(newer)
            return first, [piece async for piece in service.stream(after)]

    first, second = play(scenario)
    assert {piece.version for piece in first} == {0} and {piece.version for piece in second} == {1}
    assert after.ids == expected.ids != before.ids
    np.testing.assert_allclose(after.logprobs, expected.logprobs, atol=1e-5)


def test_a_waiting_conversation_is_discarded_by_new_weights_with_that_reason(engines):
    engine = engines(tool_lag=-1)
    engine.config = replace(engine.config, stale_rows="discard")
    called = asyncio.Event()

    class Waiting(Chat):
        async def answer(self) -> list[int] | None:
            called.set()
            await asyncio.sleep(50)

    waiting, other = Waiting([1, 2], 1), Chat([3], 2, turns=1)

    async def scenario() -> tuple[Finish, Finish]:
        async with Service(engine) as service:
            first = service.submit(waiting)
            await called.wait()
            engine.version += 1  # as update_params does
            return await service.submit(other), await first

    assert play(scenario) == (Finish.ENDED, Finish.DISCARDED)
    assert waiting.dropped == "new weights came (engine.stale_rows=discard)"


def test_kept_rows_draw_on_from_what_they_hold(engines, params, reference):
    """Here the new weights equal the old ones, so no draw changes, and nothing is written again."""
    engine = engines(slots=16, decode_steps=1)
    engine.config = replace(engine.config, stale_rows="keep")

    class Updating(Chat):
        def end_turn(self, ids, logprobs):
            engine.update_params(params)
            return super().end_turn(ids, logprobs)

    conversations = [Updating(chat.prompt, chat.request, turns=chat.turns) for chat in reference]
    stats = run(engine, conversations)
    assert stats.rewritten_tokens == 0 and quiet(engine)
    for ours, expected in zip(conversations, reference, strict=True):
        assert ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


def test_conversations_that_begin_after_new_weights_use_only_those(make_engine, model, params, newer):
    """Its group began earlier and kept its prompt for it; those that began earlier continue with the new weights."""
    prompt = list(range(1, 40))
    stops = range(0, model.vocab_size, 16)
    kept = make_engine(0, stops, slots=1, decode_steps=32, pages=48, stale_rows="keep")  # pages for all at once
    kept.update_params(newer)
    run(kept, fresh := [Chat(prompt, request, turns=2) for request in range(3)])
    kept.update_params(params)
    first = kept.version
    run(kept, old := [Chat(prompt, 0, turns=2)])

    class Updating(Chat):
        def end_turn(self, ids, logprobs):
            if kept.version == first:
                kept.update_params(newer)
            return super().end_turn(ids, logprobs)

    pieces: list[list[Tokens]] = [[], [], []]
    conversations = [Updating(prompt, request, turns=2) for request in range(3)]
    listeners = [piece.append for piece in pieces]
    asyncio.run(asyncio.wait_for(converse(kept, conversations, on_tokens=listeners), 60))
    turn = len(prompt) + len(pieces[0][0].ids)  # where the first turn of the first one ends
    assert {tokens.version for tokens in pieces[0]} == {first, first + 1}
    assert conversations[0].ids[:turn] == old[0].ids[:turn]
    assert conversations[0].logprobs not in (old[0].logprobs, fresh[0].logprobs)
    for ours, expected, piece in zip(conversations[1:], fresh[1:], pieces[1:], strict=True):
        assert {tokens.version for tokens in piece} == {first + 1} and ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


def test_weights_that_come_while_an_answer_is_waited_for_are_taken_before_the_next_dispatch(engines, params, newer):
    """A row is written again before its next token, as if the weights had come before the call."""
    engine = engines(slots=1, decode_steps=32)
    engine.config = replace(engine.config, read_late=0)

    class Before(Chat):
        def end_turn(self, ids, logprobs):
            if not self.answered:
                engine.update_params(newer)
            return super().end_turn(ids, logprobs)

    class Meanwhile(Chat):
        async def answer(self) -> list[int] | None:
            await asyncio.sleep(0.02)
            engine.update_params(newer)
            return await super().answer()

    runs = []
    for kind in (Before, Meanwhile):
        chat = kind([5, 6, 7], 101, turns=2)
        stats = run(engine, [chat])
        assert stats.rewritten_tokens > 0 and chat.answered == 1
        runs.append(chat)
        engine.update_params(params)
    engine.config = replace(engine.config, read_late=1)
    assert runs[0].ids == runs[1].ids
    np.testing.assert_allclose(runs[0].logprobs, runs[1].logprobs, atol=1e-5)
