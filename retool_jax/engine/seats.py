"""Which conversations have a slot, what their rows lack, and which rows are evicted when pages run out.

A `Talk` has the tokens that its row should hold and the number of those that are written. Seating it appends the rest:
first the prompt, later the last drawn token and a tool's answer, or everything if the row was evicted.
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
class Talk:
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
        self.waiting: OrderedDict[Talk, None] = OrderedDict()  # for a first seat; may be thousands, any may leave
        self.ready: list[Talk] = []  # had a seat before, and have something to write before they draw again
        self.live: dict[int, Talk] = {}  # drawing, by slot
        self.calls: dict[Talk, Call] = {}
        # Prompts that further conversations wait for, without the last token: writing that one yields the hidden state.
        self._prompts: dict[tuple[int, ...], Parked] = {}
        self._wanted: Counter[tuple[int, ...]] = Counter()  # conversations that wait, by prompt
        self._prefixes = Prefixes(engine)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.ready or self.live or self.calls)

    def add(self, talk: Talk) -> None:
        """Queue a new conversation for its first seat."""
        self.waiting[talk] = None
        self._wanted[tuple(talk.conversation.prompt)] += 1

    def seat(self, in_flight: int, piled_up: bool) -> list[Talk]:
        """Give free slots to conversations, those that have begun first, and write what their rows lack.

        Needs pages for the dispatches `in_flight` and one more. While calls are `piled_up`, no new conversation begins.
        """
        free = [slot for slot in range(self.engine.config.slots) if slot not in self.live]
        seated: list[Talk] = []
        pages = self._free_pages(seated, in_flight)
        for slot in free:
            talk, pages = self._next(pages, seated, in_flight, piled_up)
            if talk is None:
                break
            talk.slot, talk.seated_s = slot, time.perf_counter()
            seated.append(talk)
        self._write(seated)
        return seated

    def _next(self, pages: int, seated: list[Talk], in_flight: int, piled_up: bool) -> tuple[Talk | None, int]:
        """The next conversation to seat, if `pages` are enough for it, and the number of pages left after it.

        The oldest that has begun comes first, and may evict younger ones. A new one waits until there are enough pages
        and calls are not piled up. For both, rows of ended conversations are dropped if necessary.
        """
        begun = bool(self.ready)
        if not begun and (piled_up or not self.waiting):
            return None, pages
        talk = min(self.ready, key=lambda talk: talk.order) if begun else next(iter(self.waiting))
        if not begun and (shared := self._prefixes.share(talk.ids)):
            talk.parked, talk.written = shared, shared.length
        needed = self._pages_for(talk, in_flight)
        urgent = begun or not (self.live or seated)
        while needed > pages and (self.evict(talk) if urgent else self._prefixes.drop_oldest()):
            pages, needed = self._free_pages(seated, in_flight), self._pages_for(talk, in_flight)
        if needed > pages:
            if not begun:
                self._release(talk)
            return None, pages
        if begun:
            self.ready.remove(talk)
        else:
            del self.waiting[talk]
        return talk, pages - needed

    def _free_pages(self, seated: list[Talk], in_flight: int) -> int:
        """Free pages, less those that live and `seated` rows may still take."""
        taken = sum(self._pages_for(talk, in_flight) for talk in (*self.live.values(), *seated))
        return self.engine.pages.free_count - taken

    def _pages_for(self, talk: Talk, in_flight: int) -> int:
        """Additional pages that a row may need to be written and to draw in `in_flight` dispatches and one more."""
        steps = self.engine.config.decode_steps * (1 + in_flight)
        length = min(len(talk.ids) + steps, self.engine.config.max_length)
        name = talk.slot if talk.parked is None else talk.parked.name
        return self.engine.pages.needed(name, talk.written, length)

    def _write(self, seated: list[Talk]) -> None:
        """Append what rows lack. Conversations with the same prompt share its prefill, also those that come later."""
        owners: dict[tuple[int, ...], Talk] = {}
        forks: list[Talk] = []
        rows: list[Talk] = []
        for talk in seated:
            prompt = tuple(talk.conversation.prompt)
            fresh = talk.ids == talk.conversation.prompt and not talk.lost
            if fresh:
                self._decrement_wanted(prompt)
                if talk.parked is not None and (prompt in owners or prompt in self._prompts):  # these hold more of it
                    self.engine.drop(talk.parked)
                    talk.parked, talk.written = None, 0
            if not talk.written:
                talk.version = self.engine.version
            if fresh and prompt in owners:
                forks.append(talk)
                continue
            if fresh and prompt in self._prompts:
                talk.written = self._prompts[prompt].length
                self.engine.resume(self.engine.share(self._prompts[prompt], talk.written), talk.slot)
            elif fresh:
                owners[prompt] = talk
            if talk.parked is not None:
                self.engine.resume(talk.parked, talk.slot)
                talk.parked = None
                if fresh:
                    talk.version, talk.conversation.cached = self.engine.version, talk.written
                    self.stats.reused_tokens += talk.written
            rows.append(talk)
            self._count_tokens(talk)
        if rows:
            tokens, places = self.engine.written, self.engine.places
            self.engine.append([talk.slot for talk in rows], [talk.ids[talk.written :] for talk in rows])
            self.stats.written_tokens += self.engine.written - tokens
            self.stats.written_places += self.engine.places - places
        self.engine.fork([owners[tuple(talk.conversation.prompt)].slot for talk in forks], [t.slot for t in forks])
        for talk in seated:
            talk.written = len(talk.ids)
        for prompt, talk in owners.items():
            if prompt in self._wanted and len(prompt) > 1:
                self._prompts[prompt] = self.engine.share(talk.slot, len(prompt) - 1)
        self.drop_prompts(unwanted=True)

    def _count_tokens(self, talk: Talk) -> None:
        """Add the tokens that will be written to the statistics: rewritten ones, and those of a prompt or an answer."""
        stats, new = self.stats, len(talk.ids) - talk.written
        again = min(talk.lost, new)
        stats.rewritten_tokens += again
        talk.lost = 0
        if talk.ids == talk.conversation.prompt:
            stats.prefilled_tokens += new - again
        elif not talk.budget:  # after an answer; the first of the new tokens is the last drawn one
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

    def evict(self, keep: Talk) -> bool:
        """Free pages: of an ended conversation's row, else of all kept prompts, else of the youngest conversation.

        A conversation is evicted only if it is younger than `keep`. Returns False if there was nothing to free. A page
        that another row shares does not become free, but that row need not copy it any more.
        """
        if self._prefixes.drop_oldest():
            return True
        if self._prompts:
            self.drop_prompts()
            return True
        youngest = max(self._holders(), key=lambda talk: talk.order, default=keep)
        if youngest.order > keep.order:
            self._evict_row(youngest)
            return True
        return False

    def evict_any(self) -> bool:
        """`evict`, keeping the oldest conversation with pages."""
        return self.evict(min(self._holders(), key=lambda talk: talk.order))

    def _holders(self) -> list[Talk]:
        """Conversations with pages."""
        return [talk for talk in (*self.live.values(), *self.ready, *self.calls) if talk.written]

    def _evict_row(self, talk: Talk) -> None:
        """Free a row's pages, to be written again later; results in flight for it are ignored."""
        talk.lost = talk.written
        if talk.slot is not None:
            self.ready.append(talk)
        self._release(talk)

    def rewrite(self) -> None:
        """Evict every row, since the weights that wrote them are old."""
        self.drop_kept()
        for talk in self.begun():
            if talk.written:
                self._evict_row(talk)

    def begun(self) -> list[Talk]:
        """Conversations that have had a seat, including evicted ones."""
        return [*self.live.values(), *self.ready, *self.calls]

    def leave(self, talk: Talk, ended: bool = False) -> None:
        """Remove a conversation, wherever it is, and free its row. The caller cancels its call, if it has one.

        If it has `ended`, its row may be kept for conversations that continue it.
        """
        self.calls.pop(talk, None)
        if talk in self.ready:
            self.ready.remove(talk)
        elif talk in self.waiting:
            del self.waiting[talk]
            self._decrement_wanted(tuple(talk.conversation.prompt))
            self.drop_prompts(unwanted=True)
        if ended and talk.parked and self.engine.config.prefix_tokens and talk.version == self.engine.version:
            self._prefixes.keep(talk.ids[: talk.written], talk.parked)
            talk.parked = None
        self._release(talk)

    def park(self, talk: Talk) -> None:
        """Take a row whose turn has ended out of its slot; it keeps its pages."""
        self.stats.turn_s.append(time.perf_counter() - talk.seated_s)
        del self.live[talk.slot]
        talk.parked, talk.slot = self.engine.park(talk.slot), None

    def _release(self, talk: Talk) -> None:
        """Free a conversation's slot and pages."""
        if talk.parked is not None:
            self.engine.drop(talk.parked)
            talk.parked = None
        if talk.slot is not None:
            self.live.pop(talk.slot, None)
            self.engine.free(talk.slot)
            talk.slot = None
        talk.written = 0
