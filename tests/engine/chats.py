"""Conversations with tools for tests of the scheduler."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from retool_jax.engine.conversation import Statistics
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse

ROOM = 96


@dataclass
class Chat:
    """A conversation whose tool answers each turn with random tokens, a function of only (request, turn)."""

    prompt: list[int]
    request: int
    temperature: float = 1.0
    turns: int = 4
    delay: float = 0.0  # the most seconds that a tool takes
    turn_limit: int = ROOM  # tokens of a turn
    halves: bool = False  # a turn also ends where an odd id follows an id that is a multiple of three

    ids: list[int] = field(init=False)
    sampled: list[bool] = field(init=False)
    logprobs: list[float] = field(init=False)
    answered: int = 0  # number of tool answers so far
    cancelled: bool = False
    dropped: str = ""  # the reason
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


def chats(n: int = 10, **changes) -> list[Chat]:
    """Groups of three that share a prompt, of unequal lengths."""
    prompts = [np.random.default_rng(i // 3).integers(1, 60, 3 + 4 * (i // 3)).tolist() for i in range(n)]
    return [Chat(prompt, 100 + i, **{"turns": 2 + i % 4} | changes) for i, prompt in enumerate(prompts)]


def run(engine: Engine, conversations: Sequence[Chat]) -> Statistics:
    return asyncio.run(asyncio.wait_for(converse(engine, conversations), 60))


def play(scenario, seconds: float = 60):
    """Run a coroutine function, with a time limit."""
    return asyncio.run(asyncio.wait_for(scenario(), seconds))


def quiet(engine: Engine) -> bool:
    """Whether all pages are free."""
    counts = engine.counts()
    return counts["free"] == engine.pages.count and not counts["rows"]
