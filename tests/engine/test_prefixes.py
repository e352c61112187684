"""A conversation that continues an ended one reuses its pages, and its draws do not change."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest

from retool_jax.engine.conversation import Finish, SamplingParams, Statistics
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import Service

PAGE = 16


@dataclass
class Ask:
    """One turn of at most `budget` tokens."""

    prompt: list[int]
    request: int = 0
    temperature: float = 0.0
    budget: int = 30
    turn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cancelled: bool = False
    cached: int = 0

    def turn_budget(self) -> int:
        return self.budget

    def stop_at(self, ids: list[int], seen: int) -> None:
        return None

    def end_turn(self, ids: list[int], logprobs: list[float]) -> None:
        self.turn, self.logprobs = ids, logprobs

    def drop(self, reason: str) -> None:
        pass

    def then(self, more: Sequence[int], **how) -> "Ask":
        """A conversation that continues this one after its end."""
        return replace(self, prompt=[*self.prompt, *self.turn, *more], cached=0, **how)


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine(
        0, [], slots=4, max_length=1100, page_size=PAGE, token_buckets=(16,), read_buckets=(1100,), tool_lag=-1
    )


@pytest.fixture
def serve(engine):
    """`serve(steps, prefix_tokens)`: one service, lists of conversations one after another, or functions that make one
    when it is its turn; what was counted in each."""

    def run(steps: Sequence[list[Ask] | Callable[[], list[Ask]]], prefix_tokens: int = 4000) -> list[Statistics]:
        async def work() -> list[Statistics]:
            counted = []
            async with Service(engine) as service:
                for step in steps:
                    await asyncio.gather(*[service.submit(ask) for ask in (step() if callable(step) else step)])
                    counted.append(service.take_statistics())
            return counted

        engine.clear()
        engine.config = replace(engine.config, prefix_tokens=prefix_tokens)
        before = engine.counts()
        counted = asyncio.run(work())
        assert engine.counts() == before, "pages and rows are as they were"
        return counted

    return run


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 60, count).tolist()


def assert_as_fresh(serve, *asks: Ask) -> None:
    """Tokens and log-probs of conversations equal those that they have alone, with nothing kept."""
    for ask in asks:
        fresh = replace(ask, cached=0)
        serve([[fresh]], prefix_tokens=0)
        assert ask.turn == fresh.turn and len(ask.turn) == ask.budget
        np.testing.assert_allclose(ask.logprobs, fresh.logprobs, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_turn_on_a_thousand_tokens_prefills_only_the_new_ones(serve, temperature):
    first = Ask(ids(970), temperature=temperature)
    second = None

    def follow() -> list[Ask]:
        nonlocal second
        second = first.then(ids(20, 1), request=7)
        return [second]

    one, two = serve([[first], follow])
    assert (one.prefilled_tokens, one.reused_tokens) == (970, 0)
    assert (two.prefilled_tokens, two.reused_tokens) == (1 + 20, 999)  # the last token of a turn is not written
    assert second.cached == 999 and len(second.prompt) == 1020
    assert_as_fresh(serve, first, second)


def test_branches_share_what_they_begin_with_and_write_apart(serve):
    """Two continue one at the same time; one continues from the middle of a page; one repeats the prompt."""
    first = Ask(ids(75))
    after: list[Ask] = []

    def branches() -> list[Ask]:
        after.extend([first.then(ids(9, 1), request=1), first.then(ids(30, 2), request=2)])
        after.append(Ask([*first.prompt[:45], *ids(8, 3)], request=3))
        after.append(Ask(first.prompt, request=4, temperature=1.0))
        return after

    _, counted = serve([[first], branches])
    assert [ask.cached for ask in after] == [104, 104, 45, 74]
    assert counted.reused_tokens == 104 + 104 + 45 + 74
    assert_as_fresh(serve, first, *after)


def test_a_group_writes_what_is_new_of_its_prompt_once(serve):
    first = Ask(ids(75))
    group: list[Ask] = []

    def follow() -> list[Ask]:
        group.extend(first.then(ids(40, 1), request=request, temperature=1.0) for request in range(6))
        return group

    _, counted = serve([[first], follow])
    assert counted.prefilled_tokens == 41 + 2, "and a token for each of the two that came after the four slots"
    assert_as_fresh(serve, *group)


def test_pages_of_older_weights_are_never_used(engine, params, serve):
    first = Ask(ids(75))
    second = None
    other = jax.tree.map(lambda x: x * 1.1, params)

    def follow() -> list[Ask]:
        nonlocal second
        engine.update_params(other)
        second = first.then(ids(9, 1))
        return [second]

    try:
        _, counted = serve([[first], follow])
        assert second.cached == counted.reused_tokens == 0 and counted.prefilled_tokens == len(second.prompt)
        assert_as_fresh(serve, second)
    finally:
        engine.update_params(params)


def test_a_row_that_old_weights_wrote_is_not_kept(engine, params, serve):
    """If `stale_rows` keeps them, it continues with them, but its row is not kept when it ends."""
    engine.config = replace(engine.config, stale_rows="keep")
    first = Ask(ids(75), budget=60)
    told: list[int] = []

    def stop_at(turn: list[int], seen: int) -> None:
        if not told:
            engine.update_params(params)
        told.append(seen)

    first.stop_at = stop_at
    try:
        _, counted = serve([[first], lambda: [first.then(ids(9, 1), request=1)]])
        assert len(told) > 1 and counted.reused_tokens == 0
    finally:
        engine.config = replace(engine.config, stale_rows="rewrite")


def test_the_least_recently_used_goes_first(serve):
    """There is room for two of three: the one used again stays, and one above the limit is not kept at all."""
    a, b, long = Ask(ids(50, 1)), Ask(ids(50, 2)), Ask(ids(170, 4))
    used, asked, asked_long = (Ask([*ask.prompt, 1], request=9, budget=1) for ask in (a, b, long))
    last: list[Ask] = []

    def follow() -> list[Ask]:
        last.append(a.then([1], budget=1))
        return last

    # Rows of 79 and 79 tokens, and of 51 where the first was used again.
    serve([[a], [b], [used], [long], follow, [asked], [asked_long]], prefix_tokens=165)
    assert used.cached == 50 and last[0].cached == 79
    assert asked.cached == asked_long.cached == 0


def test_live_rows_take_the_pages_of_kept_ones(make_engine):
    """In a pool for one long row, a kept row is dropped when a conversation needs its pages."""
    engine = make_engine(
        0, [], slots=2, max_length=96, page_size=PAGE, pages=7, prefix_tokens=500, token_buckets=(16,), tool_lag=-1
    )
    asks = [Ask(ids(50, seed), request=seed) for seed in range(5)]

    async def work() -> None:
        async with Service(engine) as service:
            for ask in asks:
                assert await service.submit(ask) is Finish.ENDED

    asyncio.run(work())
    assert all(len(ask.turn) == 30 for ask in asks) and engine.counts()["used"] == 0


def test_a_conversation_that_was_cancelled_leaves_nothing(engine, serve):
    gone = Ask(ids(75), budget=200)
    gone.stop_at = lambda turn, seen: setattr(gone, "cancelled", True)
    _, counted = serve([[gone], [Ask([*gone.prompt, 5], request=1)]])
    assert counted.reused_tokens == 0


def test_top_p_and_stops_are_those_of_the_request(engine, serve):
    """A kept row does not depend on the sampling parameters that drew it."""
    first = Ask(ids(75))
    again = Ask([*first.prompt, 3], request=5)

    async def work(prefix_tokens: int) -> list[int]:
        engine.clear()
        engine.config = replace(engine.config, prefix_tokens=prefix_tokens)
        async with Service(engine) as service:
            await service.submit(first, SamplingParams(1.0, top_k=3))
            await service.submit(again, SamplingParams(1.0, top_p=0.7, stop_ids=frozenset({1, 2, 3})))
        return again.turn

    assert asyncio.run(work(4000)) == asyncio.run(work(0)) and again.cached == 75
