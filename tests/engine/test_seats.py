"""With few slots and pages, slow tools and new weights, rows are evicted and come back, and draws do not change."""

import asyncio
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest

from retool_jax.engine.scheduler import converse
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import token_logprobs

from .chats import ROOM, Chat, chats, quiet, run

# --- memory: pages on demand, shared prompts, eviction ----------------------------------------------------------------


@pytest.mark.parametrize("tool_lag", [-1, 1])
def test_a_small_cache_changes_the_schedule_and_no_draw(make_engine, model, reference, tool_lag):
    """There are pages for two full rows: the youngest are evicted, come back, and their draws do not change."""
    stops = range(0, model.vocab_size, 16)
    engine = make_engine(0, stops, slots=4, page_size=8, pages=24, tool_lag=tool_lag)
    conversations = chats(delay=0.005)
    stats = run(engine, conversations)
    for ours, expected in zip(conversations, reference, strict=True):
        assert ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)
    assert stats.rewritten_tokens > 0 and quiet(engine)
    told = sum(len(chat.ids) - len(chat.prompt) - sum(chat.sampled) for chat in conversations)
    assert stats.appended_tokens == told, "what is written again is counted apart"


@pytest.mark.parametrize("page_size", [8, 96])
def test_a_row_may_take_the_whole_cache_whoever_shared_its_prompt(make_engine, model, reference, page_size):
    """When the kept prompt is dropped, no page becomes free, but the row that shared its page needs no copy of it."""
    stops = range(0, model.vocab_size, 16)
    pages = -(-96 // page_size)
    engine = make_engine(0, stops, slots=4, page_size=page_size, pages=pages, decode_steps=96, tool_lag=0)
    conversations = chats()
    run(engine, conversations)
    assert [chat.ids for chat in conversations] == [chat.ids for chat in reference] and quiet(engine)


def test_more_conversations_than_slots_decode_while_others_wait_for_tools(engines):
    """With two slots and four conversations with slow tools, two draw while the other two wait."""
    out: set[int] = set()
    drew_meanwhile = []

    class Slow(Chat):
        async def answer(self) -> list[int]:
            out.add(self.request)
            await asyncio.sleep(0.2)
            out.discard(self.request)
            return await super().answer()

        def end_turn(self, ids, logprobs):
            drew_meanwhile.append(len(out))
            return super().end_turn(ids, logprobs)

    run(engines(slots=2, tool_lag=-1), [Slow([1, 2, 3], i, turns=2) for i in range(4)])
    assert max(drew_meanwhile) >= 2


def test_a_group_shares_its_prompt_whenever_its_members_come(engines):
    """Sixteen samples on four slots need one prefill, and one token for each member after the first four."""
    engine = engines()
    prompt = np.random.default_rng(5).integers(1, 60, 37).tolist()
    shared = []

    class Watching(Chat):
        def end_turn(self, ids, logprobs):
            shared.append(engine.counts()["shared"])
            return super().end_turn(ids, logprobs)

    group = [Watching(prompt, i, turns=2) for i in range(16)]
    stats = run(engine, group)
    assert stats.prefilled_tokens == 37 + 12
    assert min(shared[:-4]) >= 2, "the two full pages of the prompt belong to all"
    alone = [Chat(prompt, i, turns=2) for i in range(16)]
    for chat in alone:
        run(engine, [chat])
    assert [chat.ids for chat in group] == [chat.ids for chat in alone] and quiet(engine)


def test_eight_turns_pay_for_their_context_once(make_engine):
    """By the engine's counters: 13 tokens of prompt, then 8 drawn tokens and an answer of 2 in each turn."""
    engine = make_engine(0, (), slots=2)

    class Long(Chat):
        def turn_budget(self) -> int:
            return 8

        def end_turn(self, ids, logprobs):
            self._add(ids, logprobs)
            self.answered += 1
            return self.answer() if self.answered < 8 else None

        async def answer(self) -> list[int]:
            self._add([5] * 2, None)
            return [5] * 2

    chat = Long([3] * 13, 0)
    stats = run(engine, [chat])
    assert (stats.prefilled_tokens, stats.appended_tokens, stats.rewritten_tokens) == (13, 7 * 2, 0)
    assert stats.decoded_tokens == 64 and len(chat.ids) == 13 + 8 * 8 + 7 * 2


# --- cancellation and back-pressure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_lag", [-1, 1])
def test_a_cancelled_conversation_lets_go_and_the_others_do_not_notice(engines, reference, tool_lag):
    conversations = chats(delay=0.01)

    class Cancelling(Chat):
        def end_turn(self, ids, logprobs):
            for i in (1, 4, 9):
                conversations[i].cancelled = True
            return super().end_turn(ids, logprobs)

    conversations[0] = Cancelling(conversations[0].prompt, 100, turns=2)
    engine = engines(tool_lag=tool_lag)
    run(engine, conversations)
    assert quiet(engine)
    for i, (ours, expected) in enumerate(zip(conversations, reference, strict=True)):
        assert (ours.ids == expected.ids and ours.ended) != (i in (1, 4, 9))
        assert ours.dropped == ("cancelled" if i in (1, 4, 9) else "")


def test_only_the_next_waiting_conversation_is_checked_for_cancellation(engines):
    """They are looked at before each dispatch, and thousands may wait."""
    asked = Counter()

    class Counted(Chat):
        begun = False

        @property
        def cancelled(self) -> bool:
            asked[self.begun] += 1
            return False

        @cancelled.setter
        def cancelled(self, value: bool) -> None:
            pass

        def turn_budget(self) -> int:
            self.begun = True
            return super().turn_budget()

    run(engines(16, 1, tool_lag=-1), [Counted([3, 5], request, turns=1) for request in range(100)])
    assert 0 < asked[False] < asked[True]


def test_no_more_tools_run_at_once_than_allowed(engines, reference):
    running, most = 0, 0

    class Counted(Chat):
        async def answer(self) -> list[int] | None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                await asyncio.sleep(0.01)
                return await super().answer()
            finally:
                running -= 1

    conversations = [Counted(chat.prompt, chat.request, turns=chat.turns) for chat in chats()]
    asyncio.run(asyncio.wait_for(converse(engines(16, 1, tool_lag=-1), conversations, tools_at_once=2), 60))
    assert most == 2
    assert [chat.ids for chat in conversations] == [chat.ids for chat in reference]


def test_two_thousand_trajectories_leave_nothing_behind(many, compiles, alive):
    """With cancellations, tools that give up and budgets that run out, in a cache that is too small for all slots."""
    rng = np.random.default_rng(0)

    class Wild(Chat):
        def turn_budget(self) -> int:
            return min(int(rng.integers(1, 9)), ROOM - len(self.ids))

        async def answer(self) -> list[int] | None:
            fate = rng.random()
            if fate < 0.1:
                self.cancelled = True
            await asyncio.sleep(0.2 * (fate < 0.5))  # long enough for others to need its pages
            return None if fate > 0.9 else await super().answer()

    memory, known = [], len(compiles)
    rewritten = cancelled = 0
    for batch in range(4):
        prompts = [rng.integers(1, 60, rng.integers(1, 40)).tolist() for _ in range(125)]
        wild = [Wild(prompts[i // 4], 1000 * batch + i, turns=int(rng.integers(1, 5))) for i in range(500)]
        rewritten += run(many, wild).rewritten_tokens
        cancelled += sum(chat.dropped == "cancelled" for chat in wild)
        assert quiet(many)
        memory.append(alive())
    assert len(compiles) == known and rewritten > 0 and cancelled > 100
    assert memory[-1] <= memory[1], "no array is kept"


# --- new weights while conversations run ------------------------------------------------------------------------------


@pytest.fixture
def updating(make_engine, model, params):
    """`updating(**config)`: an engine, the weights that come when the first turn of request 100 ends, and chats."""

    def build(**config):
        engine = make_engine(0, range(0, model.vocab_size, 16), **config)
        newer = jax.tree.map(lambda x: x * 1.1, params)

        class Updating(Chat):
            swapped_at = 0  # tokens that it had then

            def end_turn(self, ids, logprobs):
                call = super().end_turn(ids, logprobs)
                if self.request == 100 and not self.swapped_at:
                    self.swapped_at = len(self.ids)
                    engine.update_params(newer)
                return call

        return engine, newer, [Updating(chat.prompt, chat.request, turns=4) for chat in chats(6)]

    return build


def test_rows_are_written_again_under_new_weights(updating, model):
    """Tokens drawn after the swap have the log-probabilities that the trainer computes with the new weights."""
    engine, newer, conversations = updating(slots=4)
    stats = run(engine, conversations)
    assert stats.rewritten_tokens > 0 and all(chat.ended for chat in conversations) and quiet(engine)
    chat = conversations[0]
    batch = pack([Example(chat.ids, chat.sampled, {"old_logprobs": chat.logprobs})], ROOM, 1, 1)
    rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    values, _ = jax.jit(partial(token_logprobs, model, newer, temperature=1.0))(batch=rows)
    after = rows.sampled[0] & (np.arange(ROOM) >= chat.swapped_at)
    difference = np.abs(np.asarray(values)[0] - rows.columns["old_logprobs"][0])
    assert after.sum() > 5 and difference[after].max() <= 1e-4
    assert difference[rows.sampled[0] & ~after].max() > 1e-2, "the turn before it was drawn with the old ones"


def test_rows_of_old_weights_can_be_discarded(updating):
    engine, _, conversations = updating(slots=2, pages=72, stale_rows="discard")
    stats = run(engine, conversations)
    assert stats.rewritten_tokens == 0 and quiet(engine)
    assert not conversations[0].ended and conversations[5].ended
    for chat in conversations:
        assert chat.ended != (chat.dropped == "new weights came (engine.stale_rows=discard)"), "each has one end"


def test_old_weights_are_discarded_also_where_a_row_has_given_up_its_pages(make_engine, model, params):
    """All that have begun are dropped, and no others: the outcome does not depend on the size of the cache."""
    engine = make_engine(0, range(0, model.vocab_size, 16), page_size=8, pages=24, stale_rows="discard")
    newer = jax.tree.map(lambda x: x * 1.1, params)
    begun: dict[int, Chat] = {}
    under_way: list[int] = []
    turns = 0

    class Updating(Chat):
        def turn_budget(self) -> int:
            begun[self.request] = self
            return super().turn_budget()

        def end_turn(self, ids, logprobs):
            nonlocal turns
            call, turns = super().end_turn(ids, logprobs), turns + 1
            if turns == 7:
                under_way.extend(request for request, chat in begun.items() if not chat.ended)
                engine.update_params(newer)
            return call

    conversations = [Updating(chat.prompt, chat.request, turns=chat.turns) for chat in chats()]
    stats = run(engine, conversations)
    assert stats.rewritten_tokens > 0 and quiet(engine)
    assert [chat.request for chat in conversations if chat.dropped] == sorted(under_way)
    assert all(chat.ended for chat in conversations if not chat.dropped)
