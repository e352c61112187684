"""Who has a slot: seats for conversations, what their rows lack, and pages where there are too few.

A conversation knows the tokens that its row should hold and how many of them it does hold, and seating it appends the
rest: the prompt, later the last drawn token and a tool's answer, or all of it where the row gave up its pages.
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
    order: int  # earlier ones keep their pages when there are too few
    ids: list[int]  # what the row should hold, the last drawn token included
    written: int = 0  # how many of them it does hold
    slot: int | None = None
    parked: Parked | None = None  # its pages, while it has no slot
    budget: int = 0  # left of this turn
    turn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    lost: int = 0  # tokens that were written before its pages were taken
    version: int = 0  # of the weights that wrote its row
    seated_s: float = 0.0


@dataclass
class Call:
    """A tool at work, or its answer that is not due yet."""

    task: asyncio.Task[list[int] | None]
    due: int  # dispatch


class Seats:
    """Where each conversation is: in exactly one of `waiting`, `ready`, `live` and `calls`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = Statistics()
        self.waiting: OrderedDict[Talk, None] = OrderedDict()  # thousands, of which any may leave
        self.ready: list[Talk] = []  # begun, and with something to write before they draw on
        self.live: dict[int, Talk] = {}  # by slot
        self.calls: dict[Talk, Call] = {}
        # A prompt that more conversations wait for is kept but for its last token, whose writing brings the hidden
        # state along.
        self._prompts: dict[tuple[int, ...], Parked] = {}
        self._wanted: Counter[tuple[int, ...]] = Counter()
        self._prefixes = Prefixes(engine)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.ready or self.live or self.calls)

    def add(self, talk: Talk) -> None:
        """Let a new conversation wait for its first seat."""
        self.waiting[talk] = None
        self._wanted[tuple(talk.conversation.prompt)] += 1

    def seat(self, in_flight: int, piled_up: bool) -> list[Talk]:
        """Give free slots to conversations, those that have begun first, and write what their rows lack.

        Pages are counted for the dispatches `in_flight` and one more. Nobody new begins while calls are `piled_up`.
        """
        free = [slot for slot in range(self.engine.config.slots) if slot not in self.live]
        seated: list[Talk] = []
        pages = self._room(seated, in_flight)
        for slot in free:
            talk, pages = self._next(pages, seated, in_flight, piled_up)
            if talk is None:
                break
            talk.slot, talk.seated_s = slot, time.perf_counter()
            seated.append(talk)
        self._write(seated)
        return seated

    def _next(self, pages: int, seated: list[Talk], in_flight: int, piled_up: bool) -> tuple[Talk | None, int]:
        """The next conversation to seat, if the cache has `pages` left for it, and what is left then.

        The oldest that has begun is next, and may take the pages of younger ones; a new one waits until there are
        enough, and while calls pile up. Rows that are kept for later make way for both.
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
            pages, needed = self._room(seated, in_flight), self._pages_for(talk, in_flight)
        if needed > pages:
            if not begun:
                self._let_go(talk)
            return None, pages
        if begun:
            self.ready.remove(talk)
        else:
            del self.waiting[talk]
        return talk, pages - needed

    def _room(self, seated: list[Talk], in_flight: int) -> int:
        """Free pages beyond those that rows which draw, or are about to be written, may take."""
        taken = sum(self._pages_for(talk, in_flight) for talk in (*self.live.values(), *seated))
        return self.engine.pages.free_count - taken

    def _pages_for(self, talk: Talk, in_flight: int) -> int:
        """Pages that a row may take beyond those it has, to be written and to draw for one dispatch more."""
        steps = self.engine.config.decode_steps * (1 + in_flight)
        length = min(len(talk.ids) + steps, self.engine.config.max_length)
        name = talk.slot if talk.parked is None else talk.parked.name
        return self.engine.pages.needed(name, talk.written, length)

    def _write(self, seated: list[Talk]) -> None:
        """Append what rows lack; neighbours with one prompt share its prefill, and so do those that come later."""
        owners: dict[tuple[int, ...], Talk] = {}
        forks: list[Talk] = []
        rows: list[Talk] = []
        for talk in seated:
            prompt = tuple(talk.conversation.prompt)
            fresh = talk.ids == talk.conversation.prompt and not talk.lost
            if fresh:
                self._want_no_more(prompt)
                if talk.parked is not None and (prompt in owners or prompt in self._prompts):  # which have all of it
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
            self._count(talk)
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

    def _count(self, talk: Talk) -> None:
        """Whose tokens these are that get written: a prompt's, a tool's, or ones that were there before."""
        stats, new = self.stats, len(talk.ids) - talk.written
        again = min(talk.lost, new)
        stats.rewritten_tokens += again
        talk.lost = 0
        if talk.ids == talk.conversation.prompt:
            stats.prefilled_tokens += new - again
        elif not talk.budget:  # after an answer; the first of them was drawn
            stats.appended_tokens += new - again - 1

    def _want_no_more(self, prompt: tuple[int, ...]) -> None:
        self._wanted[prompt] -= 1
        if not self._wanted[prompt]:
            del self._wanted[prompt]

    def drop_kept(self) -> None:
        """Let go of everything that is kept for conversations to come."""
        self.drop_prompts()
        self._prefixes.clear()

    def drop_prompts(self, unwanted: bool = False) -> None:
        """Let go of kept prompts: of all, or of those that nobody waits for."""
        for prompt in [prompt for prompt in self._prompts if not (unwanted and prompt in self._wanted)]:
            self.engine.drop(self._prompts.pop(prompt))

    def evict(self, keep: Talk) -> bool:
        """Let go of a kept row, then of the kept prompts, then of the youngest row that is younger than `keep`; False
        where there is none of them.

        A page that another row shares is not free then, but that row need not copy it any more.
        """
        if self._prefixes.drop_oldest():
            return True
        if self._prompts:
            self.drop_prompts()
            return True
        youngest = max(self._holders(), key=lambda talk: talk.order, default=keep)
        if youngest.order > keep.order:
            self._give_up(youngest)
            return True
        return False

    def evict_any(self) -> bool:
        """`evict` whoever is younger than the oldest that has pages."""
        return self.evict(min(self._holders(), key=lambda talk: talk.order))

    def _holders(self) -> list[Talk]:
        """Conversations with pages."""
        return [talk for talk in (*self.live.values(), *self.ready, *self.calls) if talk.written]

    def _give_up(self, talk: Talk) -> None:
        """Let go of what a row holds, to be written again; what is in flight for it does not count."""
        talk.lost = talk.written
        if talk.slot is not None:
            self.ready.append(talk)
        self._let_go(talk)

    def rewrite(self) -> None:
        """Let every row give up what it holds, which is of old weights."""
        self.drop_kept()
        for talk in self.begun():
            if talk.written:
                self._give_up(talk)

    def begun(self) -> list[Talk]:
        """Conversations that had a seat, also where they have given up their pages."""
        return [*self.live.values(), *self.ready, *self.calls]

    def leave(self, talk: Talk, ended: bool = False) -> None:
        """Take a conversation out, wherever it is, with what it holds; a call is the caller's to cancel.

        The row of one that has `ended` may be kept for those that go on from it.
        """
        self.calls.pop(talk, None)
        if talk in self.ready:
            self.ready.remove(talk)
        elif talk in self.waiting:
            del self.waiting[talk]
            self._want_no_more(tuple(talk.conversation.prompt))
            self.drop_prompts(unwanted=True)
        if ended and talk.parked and self.engine.config.prefix_tokens and talk.version == self.engine.version:
            self._prefixes.keep(talk.ids[: talk.written], talk.parked)
            talk.parked = None
        self._let_go(talk)

    def park(self, talk: Talk) -> None:
        """Take a row whose turn has ended out of its slot; its pages stay."""
        self.stats.turn_s.append(time.perf_counter() - talk.seated_s)
        del self.live[talk.slot]
        talk.parked, talk.slot = self.engine.park(talk.slot), None

    def _let_go(self, talk: Talk) -> None:
        """Give back what a conversation holds."""
        if talk.parked is not None:
            self.engine.drop(talk.parked)
            talk.parked = None
        if talk.slot is not None:
            self.live.pop(talk.slot, None)
            self.engine.free(talk.slot)
            talk.slot = None
        talk.written = 0
