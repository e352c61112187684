"""What goes into an engine and comes out of it: turns to draw, what was drawn, and rows without a slot."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

STOPS = 8  # ids of its own that a turn may stop at


class Turn(NamedTuple):
    """What a row draws next, until a stop id or its budget ends it; a row of the host's changes."""

    request: int  # uint32: names the stream of random draws
    budget: int  # tokens; 0 parks the row
    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    stop_ids: Collection[int] = ()  # at most `STOPS`, beside the engine's


@dataclass(eq=False)
class Drawn:
    """A decode dispatch's results on their way to the host; `Engine.read` waits for them."""

    ints: jax.Array  # int32 [B, 2n+1]: tokens, whether they are real, the row's length
    floats: jax.Array  # float32 [B, 2n]: log-probs of the distribution drawn from, and plain ones
    live: np.ndarray  # bool [B]: rows whose results count
    steps: int  # at most


class Turns(NamedTuple):
    """What a dispatch drew, on the host."""

    tokens: np.ndarray  # int32 [B,n]
    logprobs: np.ndarray  # float32 [B,n]: of the distribution drawn from
    plain_logprobs: np.ndarray  # float32 [B,n]: of softmax(logits / temperature)
    counts: np.ndarray  # int32 [B]: how many of the n are real
    ended: np.ndarray  # bool [B]: the row drew a stop id or the last token of its budget, and is parked


@dataclass(eq=False)
class Prefix:
    """A written list of tokens outside the slots.

    Its pages are given back when nobody refers to it any more, or after `let_go`; any thread may do either.
    """

    length: int
    hidden: jax.Array  # [R,D] of a chunk
    at: int  # its row in that chunk
    name: object  # its row in the page tables
    let_go: Callable[[], object] = lambda: None  # to be called when it will not be placed any more


@dataclass(eq=False)
class Parked:
    """A row without a slot: how many tokens it holds, and its name in the page tables."""

    length: int
    name: object = field(default_factory=object)
