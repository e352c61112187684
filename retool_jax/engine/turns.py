"""The inputs and outputs of an engine: turns to draw, their results, and rows without a slot."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

STOPS = 8  # the most stop ids that a turn may have of its own


class Turn(NamedTuple):
    """What a row draws next, until a stop id or its budget ends the turn."""

    request: int  # uint32: names the stream of random draws
    budget: int  # tokens; with 0 the row does not draw
    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    stop_ids: Collection[int] = ()  # at most `STOPS`, in addition to the engine's


@dataclass(eq=False)
class Drawn:
    """The results of a decode dispatch on their way to the host; `Engine.read` waits for them."""

    ints: jax.Array  # int32 [B, 2n+1]: tokens, whether they are real, the row's length
    floats: jax.Array  # float32 [B, 2n]: `logprobs` and `plain_logprobs` of `Turns`
    live: np.ndarray  # bool [B]: rows whose results count
    steps: int  # at most


class Turns(NamedTuple):
    """The results of a dispatch on the host."""

    tokens: np.ndarray  # int32 [B,n]
    logprobs: np.ndarray  # float32 [B,n]: of the distribution drawn from
    plain_logprobs: np.ndarray  # float32 [B,n]: of softmax(logits / temperature)
    counts: np.ndarray  # int32 [B]: how many of the n are real
    ended: np.ndarray  # bool [B]: the row drew a stop id or the last token of its budget, so its turn is over


@dataclass(eq=False)
class Prefix:
    """Tokens that were written outside the slots.

    Its pages are freed when the object is garbage-collected or `release` is called, in any thread.
    """

    length: int
    hidden: jax.Array  # [R,D], last hidden states of a write
    at: int  # its row in `hidden`
    name: object  # its row in the page tables
    release: Callable[[], object] = lambda: None  # call it when the prefix will not be placed any more


@dataclass(eq=False)
class Parked:
    """A row without a slot: how many tokens it holds, and its name in the page tables."""

    length: int
    name: object = field(default_factory=object)
