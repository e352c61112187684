"""Which conversations have a slot, what their rows lack, and which rows are evicted when pages run out.

A `ConversationState` has the tokens that its row should hold and the number of those that are written. Seating it
appends the rest: first the prompt, later the last drawn token and a tool's answer, or everything if it was evicted.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from retool_jax.engine.conversation import Conversation, Finish, OnTokens, SamplingParams, Statistics
from retool_jax.engine.engine import Engine
from retool_jax.engine.prefixes import Prefixes
from retool_jax.engine.turns import Parked


@dataclass(eq=False)
class ConversationState:
    """The host's side of one conversation."""

    conversation: Conversation
    sampling: SamplingParams
    on_tokens: OnTokens | None
    done: asyncio.Future[Finish]
    order: int  # of submission; when pages run out, later ones are evicted first
    ids: list[int]  # the tokens that the row should hold, including the last drawn one
    written: int = 0  # how many of them the row holds
    slot: int | None = None
    parked: Parked | None = None  # its row, while it has no slot
    budget: int = 0  # left in this turn
    turn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    lost: int = 0  # tokens that were written before its row was evicted
    version: int = 0  # of the weights that wrote its row
    seated_s: float = 0.0


@dataclass
class Call:
    """A running tool, or its answer that is not due yet."""

    task: asyncio.Task[list[int] | None]
    due: int  # dispatch


class Seats:
    """Where each conversation is: in exactly one of `waiting`, `ready`, `live` and `calls`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = Statistics()
        self.waiting: OrderedDict[ConversationState, None] = OrderedDict()  # for a first seat; may be thousands
        self.ready: list[ConversationState] = []  # had a seat before, and have tokens to write before they draw again
        self.live: dict[int, ConversationState] = {}  # drawing, by slot
        self.calls: dict[ConversationState, Call] = {}
        # Prompts that further conversations wait for, without the last token: writing that one yields the hidden state.
        self._prompts: dict[tuple[int, ...], Parked] = {}
        self._wanted: Counter[tuple[int, ...]] = Counter()  # conversations that wait, by prompt
        self._prefixes = Prefixes(engine)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.ready or self.live or self.calls)

    def add(self, state: ConversationState) -> None:
        """Queue a new conversation for its first seat."""
        self.waiting[state] = None
        self._wanted[tuple(state.conversation.prompt)] += 1

    def seat(self, in_flight: int, piled_up: bool) -> list[ConversationState]:
        """Give free slots to conversations, those that have begun first, and write what their rows lack.

        Needs pages for the dispatches `in_flight` and one more. While calls are `piled_up`, no new conversation begins.
        """
        free = [slot for slot in range(self.engine.config.slots) if slot not in self.live]
        seated: list[ConversationState] = []
        pages = self._free_pages(seated, in_flight)
        for slot in free:
            state, pages = self._next(pages, seated, in_flight, piled_up)
            if state is None:
                break
            state.slot, state.seated_s = slot, time.perf_counter()
            seated.append(state)
        self._write(seated)
        return seated

    def _next(
        self, pages: int, seated: list[ConversationState], in_flight: int, piled_up: bool
    ) -> tuple[ConversationState | None, int]:
        """The next conversation to seat, if `pages` are enough for it, and the number of pages left after it.

        The oldest that has begun comes first, and may evict younger ones. A new one waits until there are enough pages
        and calls are not piled up. For both, rows of ended conversations are dropped if necessary.
        """
        begun = bool(self.ready)
        if not begun and (piled_up or not self.waiting):
            return None, pages
        state = min(self.ready, key=lambda state: state.order) if begun else next(iter(self.waiting))
        if not begun and (shared := self._prefixes.share(state.ids)):
            state.parked, state.written = shared, shared.length
        needed = self._pages_for(state, in_flight)
        urgent = begun or not (self.live or seated)
        while needed > pages and (self.evict(state) if urgent else self._prefixes.drop_oldest()):
            pages, needed = self._free_pages(seated, in_flight), self._pages_for(state, in_flight)
        if needed > pages:
            if not begun:
                self._release(state)
            return None, pages
        if begun:
            self.ready.remove(state)
        else:
            del self.waiting[state]
        return state, pages - needed

    def _free_pages(self, seated: list[ConversationState], in_flight: int) -> int:
        """Free pages, less those that live and `seated` rows may still take."""
        taken = sum(self._pages_for(state, in_flight) for state in (*self.live.values(), *seated))
        return self.engine.pages.free_count - taken

    def _pages_for(self, state: ConversationState, in_flight: int) -> int:
        """Additional pages that a row may need to be written and to draw in `in_flight` dispatches and one more."""
        steps = self.engine.config.decode_steps * (1 + in_flight)
        length = min(len(state.ids) + steps, self.engine.config.max_length)
        name = state.slot if state.parked is None else state.parked.name
        return self.engine.pages.needed(name, state.written, length)

    def _write(self, seated: list[ConversationState]) -> None:
        """Append what rows lack. Conversations with the same prompt share its prefill, also those that come later."""
        owners: dict[tuple[int, ...], ConversationState] = {}
        forks: list[ConversationState] = []
        rows: list[ConversationState] = []
        for state in seated:
            prompt = tuple(state.conversation.prompt)
            fresh = state.ids == state.conversation.prompt and not state.lost
            if fresh:
                self._decrement_wanted(prompt)
                if state.parked is not None and (prompt in owners or prompt in self._prompts):  # these hold more of it
                    self.engine.drop(state.parked)
                    state.parked, state.written = None, 0
            if not state.written:
                state.version = self.engine.version
            if fresh and prompt in owners:
                forks.append(state)
                continue
            if fresh and prompt in self._prompts:
                state.written = self._prompts[prompt].length
                self.engine.resume(self.engine.share(self._prompts[prompt], state.written), state.slot)
            elif fresh:
                owners[prompt] = state
            if state.parked is not None:
                self.engine.resume(state.parked, state.slot)
                state.parked = None
                if fresh:
                    state.version, state.conversation.cached = self.engine.version, state.written
                    self.stats.reused_tokens += state.written
            rows.append(state)
            self._count_tokens(state)
        if rows:
            tokens, places = self.engine.written, self.engine.places
            self.engine.append([state.slot for state in rows], [state.ids[state.written :] for state in rows])
            self.stats.written_tokens += self.engine.written - tokens
            self.stats.written_places += self.engine.places - places
        self.engine.fork([owners[tuple(state.conversation.prompt)].slot for state in forks], [t.slot for t in forks])
        for state in seated:
            state.written = len(state.ids)
        for prompt, state in owners.items():
            if prompt in self._wanted and len(prompt) > 1:
                self._prompts[prompt] = self.engine.share(state.slot, len(prompt) - 1)
        self.drop_prompts(unwanted=True)

    def _count_tokens(self, state: ConversationState) -> None:
        """Add the tokens that will be written to the statistics: rewritten ones, and those of a prompt or an answer."""
        stats, new = self.stats, len(state.ids) - state.written
        again = min(state.lost, new)
        stats.rewritten_tokens += again
        state.lost = 0
        if state.ids == state.conversation.prompt:
            stats.prefilled_tokens += new - again
        elif not state.budget:  # after an answer; the first of the new tokens is the last drawn one
            stats.appended_tokens += new - again - 1

    def _decrement_wanted(self, prompt: tuple[int, ...]) -> None:
        self._wanted[prompt] -= 1
        if not self._wanted[prompt]:
            del self._wanted[prompt]

    def drop_kept(self) -> None:
        """Drop all rows that are kept for other conversations."""
        self.drop_prompts()
        self._prefixes.clear()

    def drop_prompts(self, unwanted: bool = False) -> None:
        """Drop all kept prompts, or only those that no conversation waits for."""
        for prompt in [prompt for prompt in self._prompts if not (unwanted and prompt in self._wanted)]:
            self.engine.drop(self._prompts.pop(prompt))

    def evict(self, keep: ConversationState) -> bool:
        """Free pages: of an ended conversation's row, else of all kept prompts, else of the youngest conversation.

        A conversation is evicted only if it is younger than `keep`. Returns False if there was nothing to free. A page
        that another row shares does not become free, but that row need not copy it any more.
        """
        if self._prefixes.drop_oldest():
            return True
        if self._prompts:
            self.drop_prompts()
            return True
        youngest = max(self._holders(), key=lambda state: state.order, default=keep)
        if youngest.order > keep.order:
            self._evict_row(youngest)
            return True
        return False

    def evict_any(self) -> bool:
        """`evict`, keeping the oldest conversation with pages."""
        return self.evict(min(self._holders(), key=lambda state: state.order))

    def _holders(self) -> list[ConversationState]:
        """Conversations with pages."""
        return [state for state in (*self.live.values(), *self.ready, *self.calls) if state.written]

    def _evict_row(self, state: ConversationState) -> None:
        """Free a row's pages, to be written again later; results in flight for it are ignored."""
        state.lost = state.written
        if state.slot is not None:
            self.ready.append(state)
        self._release(state)

    def rewrite(self) -> None:
        """Evict every row, since the weights that wrote them are old."""
        self.drop_kept()
        for state in self.begun():
            if state.written:
                self._evict_row(state)

    def begun(self) -> list[ConversationState]:
        """Conversations that have had a seat, including evicted ones."""
        return [*self.live.values(), *self.ready, *self.calls]

    def leave(self, state: ConversationState, ended: bool = False) -> None:
        """Remove a conversation, wherever it is, and free its row. The caller cancels its call, if it has one.

        If it has `ended`, its row may be kept for conversations that continue it.
        """
        self.calls.pop(state, None)
        if state in self.ready:
            self.ready.remove(state)
        elif state in self.waiting:
            del self.waiting[state]
            self._decrement_wanted(tuple(state.conversation.prompt))
            self.drop_prompts(unwanted=True)
        if ended and state.parked and self.engine.config.prefix_tokens and state.version == self.engine.version:
            self._prefixes.keep(state.ids[: state.written], state.parked)
            state.parked = None
        self._release(state)

    def park(self, state: ConversationState) -> None:
        """Take a row whose turn has ended out of its slot; it keeps its pages."""
        self.stats.turn_s.append(time.perf_counter() - state.seated_s)
        del self.live[state.slot]
        state.parked, state.slot = self.engine.park(state.slot), None

    def _release(self, state: ConversationState) -> None:
        """Free a conversation's slot and pages."""
        if state.parked is not None:
            self.engine.drop(state.parked)
            state.parked = None
        if state.slot is not None:
            self.live.pop(state.slot, None)
            self.engine.free(state.slot)
            state.slot = None
        state.written = 0
