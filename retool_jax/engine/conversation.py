"""What the scheduler is told and tells: conversations, how they draw, what comes of them, and counters."""

import math
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import NamedTuple, Protocol

from retool_jax.engine.turns import STOPS


class Conversation(Protocol):
    """What the scheduler asks of a trajectory in the making."""

    prompt: list[int]
    request: int  # names the stream of random draws: unique in a run
    temperature: float
    cancelled: bool
    """May be set at any time: nobody wants the rest, and it is dropped, at the latest when a seat is free for it. Who
    cancels its future has it dropped at once."""
    cached: int  # set by the scheduler: tokens of the prompt that an earlier conversation had written

    def turn_budget(self) -> int:
        """Tokens that the next turn may draw, at least 1."""

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        """How many of a turn's ids, of which `seen` were shown before, stand before an end that is no stop id."""

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        """Take a finished turn. None ends the conversation; a coroutine returns what to append, or None to end it."""

    def drop(self, reason: str) -> None:
        """It is let go before its end, for a reason that is not its own. Nothing more is asked of it."""


@dataclass(frozen=True)
class SamplingParams:
    """How a conversation draws; its seed is its `request`, and ids that end every turn are the engine's own.

    Log-probabilities are those of softmax(logits / temperature), whatever top_k and top_p leave out; at temperature 0,
    which is greedy, those of temperature 1.
    """

    temperature: float = 1.0
    top_k: int = 0  # only the k most likely tokens; 0 is off
    top_p: float = 1.0  # only the most likely tokens that together reach p; 1 is off
    stop_ids: frozenset[int] = frozenset()  # that also end a turn, `STOPS` at most

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a finite number of at least 0, which is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0, which is off")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, which is off")
        if len(self.stop_ids) > STOPS:
            raise ValueError(f"stop_ids={sorted(self.stop_ids)} are {len(self.stop_ids)}; give at most {STOPS}")


class Finish(StrEnum):
    """Why a conversation left the scheduler; all but the first are told to `Conversation.drop`. A fault is raised."""

    ENDED = "ended"  # by itself
    CANCELLED = "cancelled"
    DISCARDED = "new weights came (engine.stale_rows=discard)"
    CLOSED = "the scheduler was closed"


class Tokens(NamedTuple):
    """Tokens of one conversation as they come, without those behind a stop."""

    ids: list[int]
    logprobs: list[float]
    version: int  # of the weights that they were drawn with, as `Engine.version` counts


OnTokens = Callable[[Tokens], None]


@dataclass
class Statistics:
    """Counters of a scheduler; seconds are wall clock."""

    decoded_tokens: int = 0  # with those behind a stop string, which are given back
    prefilled_tokens: int = 0  # of prompts; a group's is written once
    reused_tokens: int = 0  # of prompts, that an earlier conversation had written
    appended_tokens: int = 0  # of tools' answers
    rewritten_tokens: int = 0  # of rows that gave up their pages and came back
    written_tokens: int = 0  # of all these, and the last one of each turn
    written_places: int = 0  # that the model was run on for them, padding included
    row_steps: int = 0  # slots x decode steps: decoded / row_steps is the fill
    decode_s: float = 0.0  # waiting for the device
    tool_wait_s: float = 0.0  # the device had nothing to do but wait for tools
    tool_s: float = 0.0  # calls were out
    total_s: float = 0.0
    turn_s: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))  # from a seat to the turn's end, each

    def __add__(self, other: "Statistics") -> "Statistics":
        """Counts and times of both together, as of two stretches of time one after another."""
        return Statistics(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def fill(self) -> float:
        """Share of the decode steps' rows that drew a token."""
        return self.decoded_tokens / max(self.row_steps, 1)

    @property
    def write_waste(self) -> float:
        """Share of the places that were written from known tokens, and were padding."""
        return 1.0 - self.written_tokens / self.written_places if self.written_places else 0.0

    @property
    def tool_hidden(self) -> float:
        """Share of the time with calls out in which the device had other work."""
        return 1.0 - self.tool_wait_s / self.tool_s if self.tool_s else 1.0
