"""A draw depends on its request alone, log-probabilities are the trainer's, and conversations end as they should."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import jax
import numpy as np
import pytest

from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import Statistics, converse
from retool_jax.errors import UserError
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import token_logprobs

ROOM = 96


@dataclass
class Chat:
    """A conversation whose tool answers each turn with random tokens that follow from (request, turn) alone."""

    prompt: list[int]
    request: int
    temperature: float = 1.0
    turns: int = 4
    delay: float = 0.0  # seconds: the longest that a tool takes
    turn_limit: int = ROOM  # tokens of a turn
    halves: bool = False  # a turn also ends where an odd id follows an id that is a multiple of three

    ids: list[int] = field(init=False)
    sampled: list[bool] = field(init=False)
    logprobs: list[float] = field(init=False)
    answered: int = 0  # tool answers given
    cancelled: bool = False
    dropped: str = ""  # why
    ended: bool = False

    def __post_init__(self) -> None:
        self.ids, self.sampled = list(self.prompt), [False] * len(self.prompt)
        self.logprobs = [0.0] * len(self.prompt)

    def turn_budget(self) -> int:
        return min(ROOM - len(self.ids), self.turn_limit)

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        pairs = enumerate(pairwise(ids[max(seen - 1, 0) :]), max(seen - 1, 0) + 2)
        return next((end for end, (a, b) in pairs if a % 3 == 0 and b % 2), None) if self.halves else None

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        self._add(ids, logprobs)
        if self.answered + 1 >= self.turns or len(self.ids) >= ROOM - 12:
            self.ended = True
            return None
        return self.answer()

    def drop(self, reason: str) -> None:
        assert not self.dropped and not self.ended
        self.dropped = reason

    async def answer(self) -> list[int] | None:
        await asyncio.sleep(np.random.default_rng().uniform(0, self.delay))
        rng = np.random.default_rng([self.request, self.answered])
        segment = rng.integers(1, 60, rng.integers(1, 10)).tolist()
        self.answered += 1
        self._add(segment, None)
        return segment

    def _add(self, ids: list[int], logprobs: list[float] | None) -> None:
        self.ids += ids
        self.sampled += [logprobs is not None] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)


@pytest.fixture(scope="module")
def engines(make_engine, model):
    """`engines(slots, decode_steps, seed)`, each built once; every 16th id ends a turn."""
    built: dict[tuple[int, int, int], Engine] = {}

    def get(slots: int = 4, decode_steps: int = 8, tool_lag: int = 1, seed: int = 0) -> Engine:
        key = (slots, decode_steps, seed)
        if key not in built:
            stops = range(0, model.vocab_size, 16)
            built[key] = make_engine(seed, stops, slots=slots, decode_steps=decode_steps)
        built[key].config = replace(built[key].config, tool_lag=tool_lag)
        return built[key]

    return get


def chats(n: int = 10, **changes) -> list[Chat]:
    """Groups of three that share a prompt, of unequal lengths."""
    prompts = [np.random.default_rng(i // 3).integers(1, 60, 3 + 4 * (i // 3)).tolist() for i in range(n)]
    return [Chat(prompt, 100 + i, **{"turns": 2 + i % 4} | changes) for i, prompt in enumerate(prompts)]


def run(engine: Engine, conversations: Sequence[Chat]) -> Statistics:
    return asyncio.run(asyncio.wait_for(converse(engine, conversations), 60))


@pytest.fixture(scope="module")
def reference(engines) -> list[Chat]:
    conversations = chats()
    run(engines(), conversations)
    return conversations


@pytest.mark.parametrize(
    ("slots", "decode_steps", "tool_lag", "delay"),
    [
        (4, 8, 0, 0.01),
        (4, 8, 3, 0.01),
        (4, 8, -1, 0.02),
        (2, 8, -1, 0.01),
        (2, 8, 1, 0.0),
        (1, 32, -1, 0.01),
        (16, 32, 0, 0.01),
        (16, 1, 0, 0.01),
        (16, 1, -1, 0.01),
    ],
)
def test_a_draw_depends_on_its_request_alone(engines, reference, slots, decode_steps, tool_lag, delay):
    conversations = chats(delay=delay)
    order = np.random.default_rng(slots + tool_lag).permutation(len(conversations))
    run(engines(slots, decode_steps, tool_lag), [conversations[i] for i in order])
    for ours, expected in zip(conversations, reference, strict=True):
        assert ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)


def test_these_conversations_have_many_turns_of_one_dispatch_and_of_several(reference):
    assert sum(chat.answered for chat in reference) > len(reference)
    lengths = [sum(chat.sampled) / (chat.answered + 1) for chat in reference]
    assert min(lengths) < 8 < max(lengths)


def test_an_end_of_several_tokens_ends_a_turn_wherever_dispatches_end(engines):
    """What was drawn behind it is given back: nothing of it is recorded, and nothing later depends on it."""
    runs = []
    for slots, decode_steps, tool_lag in ((4, 8, 1), (2, 8, -1), (16, 1, 0)):
        conversations = chats(halves=True)
        stats = run(engines(slots, decode_steps, tool_lag), conversations)
        recorded = sum(sum(chat.sampled) for chat in conversations)
        assert stats.decoded_tokens - stats.returned_tokens == recorded
        assert (stats.returned_tokens > 0) == (decode_steps > 1)
        runs.append(conversations)
    for ours, expected in zip(runs[0] * 2, runs[1] + runs[2], strict=True):
        assert ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)
    ends = 0
    for chat in runs[0]:
        spoken = list(zip(chat.ids, chat.sampled, strict=True))
        for at in range(1, len(spoken)):
            (a, drawn_a), (b, drawn_b) = spoken[at - 1 : at + 1]
            if drawn_a and drawn_b and a % 3 == 0 and b % 2:
                ends += 1
                assert at + 1 == len(spoken) or not spoken[at + 1][1], "nothing was drawn behind the end"
    assert ends > len(runs[0])


def test_requests_and_seeds_differ(engines, reference):
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for chat in reference:
        by_prompt.setdefault(tuple(chat.prompt), []).append(chat.ids)
    for group in by_prompt.values():
        assert len({tuple(ids) for ids in group}) == len(group)
    others = chats()
    run(engines(seed=1), others)
    assert all(ours.ids != expected.ids for ours, expected in zip(others, reference, strict=True))


@pytest.mark.parametrize(("temperature", "halves"), [(1.0, False), (0.7, False), (1.0, True)])
def test_logprobs_at_sampling_time_are_the_trainers(engines, model, params, temperature, halves):
    """Through tool appends and ends of several tokens, against one packed forward with the trainer's function."""
    conversations = chats(temperature=temperature, halves=halves)
    run(engines(), conversations)
    examples = [Example(chat.ids, chat.sampled, {"old_logprobs": chat.logprobs}) for chat in conversations]
    batch = pack(examples, 2 * ROOM, 6, 1)
    rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    ours, _ = jax.jit(partial(token_logprobs, model, params, temperature=temperature))(batch=rows)
    difference = np.abs(np.asarray(ours) - rows.columns["old_logprobs"])[rows.sampled]
    assert difference.size == sum(sum(chat.sampled) for chat in conversations) > 100
    assert difference.max() <= 1e-4
    print(f"largest difference {difference.max():.1e} over {difference.size} tokens")


def test_the_schedule_follows_from_the_tokens_when_answers_have_a_due_time(engines):
    """Latency changes nothing at all: same steps on the device, same bits."""
    results = []
    for delay in (0.0, 0.03):
        conversations = chats(delay=delay)
        stats = run(engines(tool_lag=1), conversations)
        results.append((stats.row_steps, [(chat.ids, chat.logprobs) for chat in conversations]))
    assert results[0] == results[1]


def test_statistics_add_up(engines):
    conversations = chats(9)
    stats = run(engines(slots=16, decode_steps=1), conversations)
    assert all(chat.ended for chat in conversations)
    sampled = sum(sum(chat.sampled) for chat in conversations)
    assert stats.decoded_tokens == sampled
    # All are admitted at once, so that each of the three prompts is prefilled once.
    assert stats.prefilled_tokens == sum(len(chat.prompt) for chat in conversations[::3])
    told = sum(len(chat.ids) - len(chat.prompt) - sum(chat.sampled) for chat in conversations)
    assert stats.appended_tokens == told
    assert stats.row_steps % 16 == 0 and stats.row_steps >= sampled
    assert stats.decode_s > 0 and stats.decode_s + stats.tool_wait_s <= stats.total_s


def test_a_second_identical_batch_compiles_nothing(engines, compiles):
    run(engines(), chats())
    known = len(compiles)
    run(engines(), chats())
    assert len(compiles) == known


def test_a_tool_may_end_its_conversation(engines):
    class Ending(Chat):
        async def answer(self) -> None:
            await asyncio.sleep(0.005)
            self.ended = True

    conversations = [
        (Ending if i % 2 else Chat)(chat.prompt, chat.request, turn_limit=20) for i, chat in enumerate(chats(9))
    ]
    for lag in (-1, 0, 1):
        run(engines(tool_lag=lag), conversations)
        assert all(chat.ended for chat in conversations)
        conversations = [type(chat)(chat.prompt, chat.request) for chat in conversations]


@pytest.mark.parametrize("tool_lag", [-1, 0, 1])
def test_a_failing_tool_ends_the_batch_and_cancels_the_others(engines, reference, tool_lag):
    class Waiting(Chat):
        async def answer(self) -> list[int]:
            if self.request == 100:
                await asyncio.sleep(0.01)
                raise RuntimeError("the tool broke")
            started.append(self.request)
            try:
                await asyncio.sleep(50)
            except asyncio.CancelledError:
                cancelled.append(self.request)
                raise

    started, cancelled = [], []
    # Turns of one token: all four call at once, and the first answer waited for is the one that never comes.
    waiting = [Waiting(chat.prompt, chat.request, turn_limit=1) for chat in chats(6)]
    with pytest.raises(RuntimeError, match="the tool broke"):
        run(engines(tool_lag=tool_lag), waiting)
    # Those that wait have left their slots, so that with answers as they come the other two have called as well.
    assert cancelled == started == [101, 102, 103, *([104, 105] if tool_lag < 0 else [])]
    again = chats()
    assert quiet(engines(tool_lag=tool_lag))
    run(engines(tool_lag=tool_lag), again)  # the engine is as good as new
    assert [chat.ids for chat in again] == [chat.ids for chat in reference]


def test_a_row_is_filled_to_its_last_token(make_engine, fresh_logits):
    """No stop ids: every turn ends at its budget, the last at the row's end."""
    engine = make_engine(stop_ids=(), slots=2)
    conversations = chats(5, turns=10**9, turn_limit=13)
    for chat in conversations:
        chat.end_turn = partial(fill, chat)
    engine.warm_up()
    stats = run(engine, conversations)
    assert engine.compiles == 0
    assert [len(chat.ids) for chat in conversations] == [ROOM] * 5
    assert stats.decoded_tokens == sum(sum(chat.sampled) for chat in conversations)
    for chat, values in zip(conversations, fresh_logits([chat.ids for chat in conversations]), strict=True):
        values = values.astype(np.float64)[:-1]
        expected = (values - np.log(np.exp(values).sum(-1, keepdims=True)))[np.arange(ROOM - 1), chat.ids[1:]]
        np.testing.assert_allclose(
            np.where(chat.sampled, chat.logprobs, 0.0)[1:], np.where(chat.sampled[1:], expected, 0.0), atol=1e-4
        )


def fill(chat: Chat, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int]] | None:
    """Go on until the row is full, with answers as long as fit before one more sampled token."""
    chat._add(ids, logprobs)

    async def answer() -> list[int]:
        segment = [7] * min(5, ROOM - 1 - len(chat.ids))
        chat._add(segment, None)
        return segment

    return answer() if len(chat.ids) < ROOM else None


@pytest.mark.parametrize("budget", [0, -3, ROOM])
def test_an_impossible_turn_is_an_error_and_not_a_hang(engines, budget):
    chat = chats(1)[0]
    chat.turn_budget = lambda: budget
    with pytest.raises(ValueError, match=f"request 100 .* turn of {budget}"):
        run(engines(), [chat])


def test_nothing_to_do_is_done_at_once(engines):
    assert run(engines(), []).decoded_tokens == 0


# --- memory: pages on demand, shared prompts, rows that have to give way ----------------------------------------------


def quiet(engine: Engine) -> bool:
    """Nobody holds a page."""
    counts = engine.counts()
    return counts["free"] == engine.pages.count and not counts["rows"]


@pytest.mark.parametrize("tool_lag", [-1, 1])
def test_a_small_cache_changes_the_schedule_and_no_draw(make_engine, model, reference, tool_lag):
    """Pages for two full rows: the youngest give theirs up, come back, and draw what they would have drawn."""
    stops = range(0, model.vocab_size, 16)
    engine = make_engine(0, stops, slots=4, page_size=8, pages=24, tool_lag=tool_lag)
    conversations = chats(delay=0.005)
    stats = run(engine, conversations)
    for ours, expected in zip(conversations, reference, strict=True):
        assert ours.ids == expected.ids
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-5)
    assert stats.evictions > 0 and stats.rewritten_tokens > 0 and quiet(engine)
    told = sum(len(chat.ids) - len(chat.prompt) - sum(chat.sampled) for chat in conversations)
    assert stats.appended_tokens == told, "what is written again is counted apart"


def test_more_conversations_than_slots_decode_while_others_wait_for_tools(engines):
    """Two slots, and four conversations whose tools take long: while two wait, the other two draw."""
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


def test_a_group_shares_its_prompt_whenever_its_members_come(make_engine, model):
    """Sixteen samples over three slots: one prefill, and one token for each member that comes after the first three."""
    engine = make_engine(0, range(0, model.vocab_size, 16), slots=3, page_size=8)
    prompt = np.random.default_rng(5).integers(1, 60, 37).tolist()
    shared = []

    class Watching(Chat):
        def end_turn(self, ids, logprobs):
            shared.append(engine.counts()["shared"])
            return super().end_turn(ids, logprobs)

    group = [Watching(prompt, i, turns=2) for i in range(16)]
    stats = run(engine, group)
    assert stats.prefilled_tokens == 37 + 13
    assert min(shared[:-3]) >= 4, "the four full pages of the prompt belong to all"
    alone = [Chat(prompt, i, turns=2) for i in range(16)]
    for chat in alone:
        run(engine, [chat])
    assert [chat.ids for chat in group] == [chat.ids for chat in alone] and quiet(engine)


def test_eight_turns_pay_for_their_context_once(make_engine):
    """The engine's own counter: 200 tokens of prompt, 100 drawn and 20 told a turn."""
    engine = make_engine(0, (), slots=1, max_length=1160, decode_steps=25, chunk_rows=1, read_buckets=(1160,))

    class Long(Chat):
        def turn_budget(self) -> int:
            return 100

        def end_turn(self, ids, logprobs):
            self._add(ids, logprobs)
            self.answered += 1
            return self.answer() if self.answered < 8 else None

        async def answer(self) -> list[int]:
            self._add([5] * 20, None)
            return [5] * 20

    chat = Long([3] * 200, 0)
    stats = run(engine, [chat])
    assert (stats.prefilled_tokens, stats.appended_tokens, stats.rewritten_tokens) == (200, 7 * 20, 0)
    assert stats.decoded_tokens == 800 and len(chat.ids) == 200 + 8 * 100 + 7 * 20


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
    stats = run(engine, conversations)
    assert stats.cancelled == 3 and quiet(engine)
    for i, (ours, expected) in enumerate(zip(conversations, reference, strict=True)):
        assert (ours.ids == expected.ids and ours.ended) != (i in (1, 4, 9))
        assert ours.dropped == ("cancelled" if i in (1, 4, 9) else "")


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
    asyncio.run(asyncio.wait_for(converse(engines(slots=16, tool_lag=-1), conversations, tools_at_once=2), 60))
    assert most == 2
    assert [chat.ids for chat in conversations] == [chat.ids for chat in reference]


def test_five_thousand_trajectories_leave_nothing_behind(make_engine, model):
    """With cancellations, tools that give up and budgets that end, in a cache that is too small for all slots."""
    engine = make_engine(
        0, range(0, model.vocab_size, 4), slots=64, decode_steps=4, page_size=8, pages=200, tool_lag=-1
    )
    engine.warm_up()
    rng = np.random.default_rng(0)

    class Wild(Chat):
        def turn_budget(self) -> int:
            return min(int(rng.integers(1, 9)), ROOM - len(self.ids))

        async def answer(self) -> list[int] | None:
            fate = rng.random()
            if fate < 0.1:
                self.cancelled = True
            await asyncio.sleep(0.01 * (fate < 0.02))
            return None if fate > 0.9 else await super().answer()

    memory = []
    evictions = cancelled = 0
    for batch in range(5):
        prompts = [rng.integers(1, 60, rng.integers(1, 40)).tolist() for _ in range(250)]
        stats = run(
            engine, [Wild(prompts[i // 4], 1000 * batch + i, turns=int(rng.integers(1, 5))) for i in range(1000)]
        )
        evictions, cancelled = evictions + stats.evictions, cancelled + stats.cancelled
        assert quiet(engine)
        memory.append(sum(x.nbytes for x in jax.live_arrays()))
    assert engine.compiles == 0 and evictions > 0 and cancelled > 100
    assert memory[-1] <= memory[1], "no array is kept"


# --- new weights under way --------------------------------------------------------------------------------------------


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
    """What is drawn after the swap has the log-probabilities that the trainer computes with the new weights."""
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
    assert stats.cancelled > 0 and stats.rewritten_tokens == 0 and quiet(engine)
    assert not conversations[0].ended and conversations[5].ended
    for chat in conversations:
        assert chat.ended != (chat.dropped == "new weights came (engine.stale_rows=discard)"), "each has one end"
    with pytest.raises(UserError, match="stale_rows=keep is not one of: rewrite, discard"):
        updating(stale_rows="keep")


def test_old_weights_are_discarded_also_where_a_row_has_given_up_its_pages(make_engine, model, params):
    """Whoever has begun is dropped, and nobody else: the outcome does not depend on the size of the cache."""
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
    assert stats.evictions > 0 and quiet(engine)
    assert [chat.request for chat in conversations if chat.dropped] == sorted(under_way)
    assert all(chat.ended for chat in conversations if not chat.dropped)
