"""A draw depends only on its request, log-probabilities equal the trainer's, and conversations end as they should."""

import asyncio
from collections.abc import Coroutine
from functools import partial

import jax
import numpy as np
import pytest

from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import Outputs

from .chats import ROOM, Chat, chats, quiet, run


@pytest.mark.parametrize(
    ("slots", "decode_steps", "tool_lag", "delay"),
    [
        (4, 8, 0, 0.01),
        (4, 8, 3, 0.01),
        (4, 8, -1, 0.02),
        (2, 8, -1, 0.01),
        (2, 8, 1, 0.0),
        (1, 32, -1, 0.01),
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
    """Tokens drawn after it are discarded: they are not recorded, and nothing later depends on them."""
    runs = []
    for slots, decode_steps, tool_lag in ((4, 8, 1), (2, 8, -1), (16, 1, 0)):
        conversations = chats(halves=True)
        stats = run(engines(slots, decode_steps, tool_lag), conversations)
        recorded = sum(sum(chat.sampled) for chat in conversations)
        assert (stats.decoded_tokens > recorded) == (decode_steps > 1)
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


@pytest.mark.parametrize(("temperature", "halves"), [(1.0, False), (0.6, False), (1.4, False), (1.0, True)])
def test_logprobs_at_sampling_time_are_the_trainers(engines, model, params, temperature, halves):
    """Across tool appends and ends of several tokens, compared with the trainer's function on one packed forward."""
    conversations = chats(temperature=temperature, halves=halves)
    run(engines(), conversations)
    examples = [Example(chat.ids, chat.sampled, {"old_logprobs": chat.logprobs}) for chat in conversations]
    batch = pack(examples, 2 * ROOM, 6, 1)
    rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    ours = jax.jit(Outputs(model, ("logprobs",), temperature).of)(params, rows)["logprobs"]
    difference = np.abs(np.asarray(ours) - rows.columns["old_logprobs"])[rows.sampled]
    assert difference.size == sum(sum(chat.sampled) for chat in conversations) > 100
    assert difference.max() <= 1e-4
    print(f"largest difference {difference.max():.1e} over {difference.size} tokens")


def test_the_schedule_follows_from_the_tokens_when_answers_have_a_due_time(engines):
    """Latency of tools changes nothing: the device makes the same steps with the same bits."""
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
    # All are seated at once, so that each of the three prompts is prefilled once.
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
    # With turns of one token all four call at once, and the first answer that is waited for never comes.
    waiting = [Waiting(chat.prompt, chat.request, turn_limit=1) for chat in chats(6)]
    with pytest.raises(RuntimeError, match="the tool broke"):
        run(engines(tool_lag=tool_lag), waiting)
    # Those that wait have left their slots, so that with answers as they come the other two have called as well.
    assert cancelled == started == [101, 102, 103, *([104, 105] if tool_lag < 0 else [])]
    again = chats()
    assert quiet(engines(tool_lag=tool_lag))
    run(engines(tool_lag=tool_lag), again)  # the engine works as before
    assert [chat.ids for chat in again] == [chat.ids for chat in reference]


def test_a_row_is_filled_to_its_last_token(make_engine, fresh_logits, compiles):
    """Without stop ids every turn ends at its budget, and the last turn at the end of its row."""
    engine = make_engine(stop_ids=(), slots=2)
    conversations = chats(5, turns=10**9, turn_limit=13)
    for chat in conversations:
        chat.end_turn = partial(fill, chat)
    engine.warm_up()
    known = len(compiles)
    stats = run(engine, conversations)
    assert len(compiles) == known
    assert [len(chat.ids) for chat in conversations] == [ROOM] * 5
    assert stats.decoded_tokens == sum(sum(chat.sampled) for chat in conversations)
    for chat, values in zip(conversations, fresh_logits([chat.ids for chat in conversations]), strict=True):
        values = values.astype(np.float64)[:-1]
        expected = (values - np.log(np.exp(values).sum(-1, keepdims=True)))[np.arange(ROOM - 1), chat.ids[1:]]
        np.testing.assert_allclose(
            np.where(chat.sampled, chat.logprobs, 0.0)[1:], np.where(chat.sampled[1:], expected, 0.0), atol=1e-4
        )


def fill(chat: Chat, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int]] | None:
    """A conversation that continues until its row is full, with answers that leave room for one sampled token."""
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
