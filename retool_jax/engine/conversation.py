"""The scheduler's interface: conversations, sampling parameters, results and statistics."""

import math
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import NamedTuple, Protocol

from retool_jax.engine.turns import STOPS


class Conversation(Protocol):
    """A trajectory that the scheduler is drawing."""

    prompt: list[int]
    request: int  # seed of its random draws, unique in a run
    temperature: float
    cancelled: bool
    """May be set at any time: the conversation is then dropped, at the latest when a seat is free for it. Cancelling
    its future drops it at once."""
    cached: int  # set by the scheduler: tokens of the prompt that an earlier conversation had written

    def turn_budget(self) -> int:
        """The number of tokens that the next turn may draw, at least 1."""

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        """How many of a turn's ids to keep if they contain a stop other than a stop id, such as a stop string.

        The first `seen` ids were already passed in an earlier call.
        """

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        """Take a finished turn. Returns None to end the conversation, or a coroutine that calls the tool.

        The coroutine returns the ids to append, or None to end the conversation.
        """

    def drop(self, reason: str) -> None:
        """Called when the conversation is dropped before its end. No other method is called after it."""


@dataclass(frozen=True)
class SamplingParams:
    """How a conversation draws. Its seed is its `request`; the engine has further stop ids that end every turn.

    Log-probabilities are those of softmax(logits / temperature), without top_k and top_p. Temperature 0 is greedy, with
    the log-probabilities of temperature 1.
    """

    temperature: float = 1.0
    top_k: int = 0  # only the k most likely tokens; 0 is off
    top_p: float = 1.0  # only the most likely tokens that together reach p; 1 is off
    stop_ids: frozenset[int] = frozenset()  # these also end a turn; at most `STOPS`

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
    """Why a conversation left the scheduler; all but the first are passed to `Conversation.drop`. Errors are raised."""

    ENDED = "ended"  # by its own decision
    CANCELLED = "cancelled"
    DISCARDED = "new weights came (engine.stale_rows=discard)"
    CLOSED = "the scheduler was closed"


class Tokens(NamedTuple):
    """Tokens of one conversation as they come, without those after a stop."""

    ids: list[int]
    logprobs: list[float]
    version: int  # `Engine.version` of the weights that drew them


OnTokens = Callable[[Tokens], None]


@dataclass
class Statistics:
    """Counters of a scheduler; seconds are wall clock."""

    decoded_tokens: int = 0  # including those after a stop string, which are discarded
    prefilled_tokens: int = 0  # of prompts; a group's prompt is written once
    reused_tokens: int = 0  # of prompts, already written by an earlier conversation
    appended_tokens: int = 0  # of tools' answers
    rewritten_tokens: int = 0  # of rows that were evicted and written again
    written_tokens: int = 0  # all of these, and the last token of each turn
    written_places: int = 0  # positions that the model computed for them, padding included
    row_steps: int = 0  # slots x decode steps: decoded / row_steps is the fill
    decode_s: float = 0.0  # waiting for the device
    tool_wait_s: float = 0.0  # the device was idle and waited for tools
    tool_s: float = 0.0  # at least one call was open
    total_s: float = 0.0
    turn_s: deque[float] = field(default_factory=lambda: deque(maxlen=100_000))  # of each turn, from seat to end

    def __add__(self, other: "Statistics") -> "Statistics":
        """Counts and times added up, as for two consecutive periods."""
        return Statistics(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def fill(self) -> float:
        """The share of rows in decode steps that drew a token."""
        return self.decoded_tokens / max(self.row_steps, 1)

    @property
    def write_waste(self) -> float:
        """The share of padding among the positions that were computed to write known tokens."""
        return 1.0 - self.written_tokens / self.written_places if self.written_places else 0.0

    @property
    def tool_hidden(self) -> float:
        """The share of the time with open calls in which the device had other work."""
        return 1.0 - self.tool_wait_s / self.tool_s if self.tool_s else 1.0
