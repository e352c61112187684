"""Continuous batching with parking: many conversations over few slots, none waiting for another's tool.

One loop drives the device: seat conversations in free slots and write what their rows lack, decode a few tokens, hand
finished turns to their conversations. A row whose conversation waits for a tool leaves its slot and keeps its pages, so
that others decode meanwhile; its answer is appended wherever a slot is free. Tools run beside the loop as asyncio
tasks, and results are read while the device works on the next dispatch.

Everything is written by one rule: a conversation knows the tokens that its row should hold and how many of them it does
hold, and seating it appends the rest. That is the prompt at first, later the last drawn token and a tool's answer, and
all of it again where the cache was too small and the row had to give up its pages.

With `tool_lag >= 0` an answer is appended that many dispatches after its call was read, and waited for if it is late:
the schedule then follows from the tokens alone, and a run can be repeated bit for bit. With -1 answers are appended
as they come, which hides long and uneven tools better.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jax

from retool_jax.engine.engine import Drawn, Engine, Parked, Turn, Turns
from retool_jax.engine.pages import OutOfPages


class Conversation(Protocol):
    """What the scheduler asks of a trajectory in the making."""

    prompt: list[int]
    request: int  # names the stream of random draws: unique in a run
    temperature: float
    cancelled: bool  # may be set at any time: nobody wants the rest, and it is dropped

    def turn_budget(self) -> int:
        """Tokens that the next turn may draw, at least 1."""

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        """How many of a turn's ids, of which `seen` were shown before, stand before an end that is no stop id."""

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        """Take a finished turn. None ends the conversation; a coroutine returns what to append, or None to end it."""

    def drop(self, reason: str) -> None:
        """It is let go before its end, for a reason that is not its own. Nothing more is asked of it."""


@dataclass
class Statistics:
    """Counters of one `converse` call; seconds are wall clock."""

    decoded_tokens: int = 0
    returned_tokens: int = 0  # of these, drawn after a stop string and given back
    prefilled_tokens: int = 0  # of prompts; a group's is written once
    appended_tokens: int = 0  # of tools' answers
    rewritten_tokens: int = 0  # of rows that gave up their pages and came back
    row_steps: int = 0  # slots x decode steps: decoded / row_steps is the fill
    evictions: int = 0
    cancelled: int = 0
    decode_s: float = 0.0  # waiting for the device
    tool_wait_s: float = 0.0  # the device had nothing to do but wait for tools
    tool_s: float = 0.0  # calls were out
    total_s: float = 0.0
    turn_s: list[float] = field(default_factory=list)  # from a row's seat to the end of its turn, each

    @property
    def fill(self) -> float:
        """Share of the decode steps' rows that drew a token."""
        return self.decoded_tokens / max(self.row_steps, 1)

    @property
    def tool_hidden(self) -> float:
        """Share of the time with calls out in which the device had other work."""
        return 1.0 - self.tool_wait_s / self.tool_s if self.tool_s else 1.0


@dataclass(eq=False)
class _Talk:
    """The host's side of one conversation."""

    conversation: Conversation
    order: int  # earlier ones keep their pages when there are too few
    ids: list[int]  # what the row should hold, the last drawn token included
    written: int = 0  # how many of them it does hold
    slot: int | None = None
    parked: Parked | None = None  # its pages, while it has no slot
    budget: int = 0  # left of this turn
    turn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    lost: int = 0  # tokens that were written before its pages were taken
    seated_s: float = 0.0


@dataclass
class _Call:
    """A tool at work, or its answer that is not due yet."""

    task: asyncio.Task
    due: int  # dispatch


async def converse(engine: Engine, conversations: Sequence[Conversation], tools_at_once: int = 0) -> Statistics:
    """Run every conversation to its end. Order of completion is free; each draw depends on its conversation alone.

    `tools_at_once` bounds the tools at work (0: no bound): further calls wait, and while twice as many wait or work no
    new conversation begins.
    """
    run = _Run(engine, conversations, tools_at_once)
    began = time.perf_counter()
    try:
        while run.waiting or run.ready or run.live or run.calls or run.in_flight:
            run.take_weights()
            run.drop_cancelled()
            await run.take_answers()
            run.seat()
            if run.live:
                run.decode()
            if run.in_flight and (len(run.in_flight) > engine.config.read_late or not run.live):
                await run.read()
    finally:
        await run.close()
    run.stats.total_s = time.perf_counter() - began
    return run.stats


class _Run:
    """The state of one `converse`. A conversation is in exactly one of `waiting`, `calls`, `ready` and `live`."""

    def __init__(self, engine: Engine, conversations: Sequence[Conversation], tools_at_once: int) -> None:
        self.engine = engine
        self.stats = Statistics()
        self._talks = [_Talk(c, order, list(c.prompt)) for order, c in enumerate(conversations)]
        self.waiting = deque(self._talks)
        self.ready: list[_Talk] = []  # begun, and with something to write before they draw on
        self.live: dict[int, _Talk] = {}  # by slot
        self.calls: dict[_Talk, _Call] = {}
        self.in_flight: deque[tuple[Drawn, dict[int, _Talk]]] = deque()
        self._dispatches = 0
        self._version = engine.version
        self._stuck = False  # nothing could be seated
        self._tools_since = 0.0
        # A prompt that more conversations wait for is kept but for its last token, whose writing brings the hidden
        # state along.
        self._prompts: dict[tuple[int, ...], Parked] = {}
        self._wanted = Counter(tuple(c.prompt) for c in conversations)
        self._tools_at_once = tools_at_once
        self._gate = asyncio.Semaphore(tools_at_once or len(conversations) or 1)

    # --- seats ---

    def seat(self) -> None:
        """Give free slots to conversations, those that have begun first, and write what their rows lack."""
        free = [slot for slot in range(self.engine.config.slots) if slot not in self.live]
        seated: list[_Talk] = []
        pages = self.engine.pages.free_count - sum(self._pages_for(talk) for talk in self.live.values())
        for slot in free:
            talk, pages = self._next(pages, bool(seated))
            if talk is None:
                break
            talk.slot, talk.seated_s = slot, time.perf_counter()
            seated.append(talk)
        self._write(seated)
        for talk in seated:
            if not talk.budget:  # a new turn; one that was interrupted goes on
                talk.budget = self._turn_budget(talk)
            c = talk.conversation
            self.engine.start(talk.slot, Turn(c.request, talk.budget, c.temperature))
            self.live[talk.slot] = talk
        self._stuck = not seated

    def _next(self, pages: int, others: bool) -> tuple[_Talk | None, int]:
        """The next conversation to seat, if the cache has `pages` left for it, and what is left then.

        The oldest that has begun is next, and may take the pages of younger ones; a new one waits until there are
        enough, and while calls pile up.
        """
        piled_up = self._tools_at_once and len(self.calls) >= 2 * self._tools_at_once
        queue = self.ready or (() if piled_up else self.waiting)
        if not queue:
            return None, pages
        talk = min(queue, key=lambda talk: talk.order) if queue is self.ready else queue[0]
        needed = self._pages_for(talk)
        while needed > pages and (queue is self.ready or not (self.live or others)):
            gained = self._evict(talk)
            if not gained:
                break
            pages += gained
        if needed > pages:
            return None, pages
        queue.remove(talk)
        return talk, pages - needed

    def _pages_for(self, talk: _Talk) -> int:
        """Pages that a row may take beyond those it has, to be written and to draw for one dispatch more."""
        steps = self.engine.config.decode_steps * (1 + len(self.in_flight))
        length = min(len(talk.ids) + steps, self.engine.config.max_length)
        name = talk.slot if talk.slot is not None else talk.parked and talk.parked.name
        return self.engine.pages.needed(name, talk.written, length)

    def _write(self, seated: list[_Talk]) -> None:
        """Append what rows lack; neighbours with one prompt share its prefill, and so do those that come later."""
        owners: dict[tuple[int, ...], _Talk] = {}
        forks: list[_Talk] = []
        rows: list[_Talk] = []
        for talk in seated:
            prompt = tuple(talk.conversation.prompt)
            fresh = talk.ids == talk.conversation.prompt and not talk.lost
            self._wanted[prompt] -= fresh
            if talk.parked is not None:
                self.engine.resume(talk.parked, talk.slot)
                talk.parked = None
            elif fresh and prompt in owners:
                forks.append(talk)
                continue
            elif fresh and prompt in self._prompts:
                talk.written = self._prompts[prompt].length
                self.engine.resume(self.engine.share(self._prompts[prompt], talk.written), talk.slot)
            elif fresh:
                owners[prompt] = talk
            rows.append(talk)
            self._count(talk)
        if rows:
            self.engine.append([talk.slot for talk in rows], [talk.ids[talk.written :] for talk in rows])
        self.engine.fork([owners[tuple(talk.conversation.prompt)].slot for talk in forks], [t.slot for t in forks])
        for talk in seated:
            talk.written = len(talk.ids)
        for prompt, talk in owners.items():
            if self._wanted[prompt] and len(prompt) > 1:
                self._prompts[prompt] = self.engine.share(talk.slot, len(prompt) - 1)
        for prompt in [prompt for prompt in self._prompts if not self._wanted[prompt]]:
            self.engine.drop(self._prompts.pop(prompt))

    def _count(self, talk: _Talk) -> None:
        """Whose tokens these are that get written: a prompt's, a tool's, or ones that were there before."""
        stats, new = self.stats, len(talk.ids) - talk.written
        again = min(talk.lost, new)
        stats.rewritten_tokens += again
        talk.lost = 0
        if talk.ids == talk.conversation.prompt:
            stats.prefilled_tokens += new - again
        elif not talk.budget:  # after an answer; the first of them was drawn
            stats.appended_tokens += new - again - 1

    def _turn_budget(self, talk: _Talk) -> int:
        """What the conversation asks for its next turn, when its row can hold it."""
        budget, room = talk.conversation.turn_budget(), self.engine.config.max_length - len(talk.ids)
        if not 1 <= budget <= room:
            raise ValueError(
                f"request {talk.conversation.request} has {len(talk.ids)} of {self.engine.config.max_length} tokens and"
                f" asked for a turn of {budget}; it may ask for 1 to {room}, or end instead"
            )
        return budget

    def _evict(self, keep: _Talk) -> int:
        """Take the pages of kept prompts, then of the youngest row that is younger than `keep`; returns how many."""
        before = self.engine.pages.free_count
        for prompt in list(self._prompts):
            self.engine.drop(self._prompts.pop(prompt))
        youngest = max(self._holders(), key=lambda talk: talk.order, default=keep)
        if self.engine.pages.free_count == before and youngest.order > keep.order:
            self._give_up(youngest)
        return self.engine.pages.free_count - before

    def _holders(self) -> list[_Talk]:
        """Conversations with pages."""
        return [talk for talk in (*self.live.values(), *self.ready, *self.calls) if talk.written]

    def _give_up(self, talk: _Talk) -> None:
        """Let go of what a row holds, to be written again; what is in flight for it does not count."""
        self.stats.evictions += 1
        talk.lost = talk.written
        if talk.slot is not None:
            self.ready.append(talk)
        self._leave(talk)

    def take_weights(self) -> None:
        """After `engine.update_params`: what rows hold is of the old weights, so they are written again or dropped."""
        if self.engine.version == self._version:
            return
        self._version = self.engine.version
        while self._prompts:
            self.engine.drop(self._prompts.popitem()[1])
        for talk in (*self.live.values(), *self.ready, *self.calls):
            if self.engine.config.stale_rows == "discard":  # also where a row has given up its pages
                self._drop(talk, "new weights came (engine.stale_rows=discard)")
            elif talk.written:
                self._give_up(talk)

    # --- the device ---

    def decode(self) -> None:
        """Begin a dispatch; rows that the cache cannot hold any longer give up their pages, the youngest first."""
        while self.live:
            try:
                drawn = self.engine.decode()
            except OutOfPages:
                if not self._evict(min(self._holders(), key=lambda talk: talk.order)):
                    raise
            else:
                self._dispatches += 1
                self.in_flight.append((drawn, dict(self.live)))
                return

    async def read(self) -> None:
        """Take the results of the oldest dispatch, and the turns that ended in it."""
        drawn, talks = self.in_flight.popleft()
        started = time.perf_counter()
        # Off the event loop's thread, so that the sandbox is served while the device works.
        await asyncio.to_thread(jax.block_until_ready, (drawn.ints, drawn.floats))
        turns = self.engine.read(drawn)
        self.stats.decode_s += time.perf_counter() - started
        self.stats.row_steps += int(turns.counts.max(initial=0)) * self.engine.config.slots
        for slot, talk in talks.items():
            if turns.counts[slot]:
                self._take(slot, talk, turns)

    def _take(self, slot: int, talk: _Talk, turns: Turns) -> None:
        """Record what a row drew; a finished turn goes to its conversation."""
        count, seen = int(turns.counts[slot]), len(talk.turn)
        self.stats.decoded_tokens += count
        talk.turn += turns.tokens[slot, :count].tolist()
        talk.logprobs += turns.plain_logprobs[slot, :count].tolist()
        talk.budget -= count
        stop = talk.conversation.stop_at(talk.turn, seen)
        if stop is not None:
            self.stats.returned_tokens += len(talk.turn) - stop
            del talk.turn[stop:], talk.logprobs[stop:]
        talk.ids += talk.turn[seen:]
        talk.written = len(talk.ids)
        if stop is None and not turns.ended[slot]:
            return
        talk.written -= 1  # the last one was drawn and not written
        if stop is not None:
            self.engine.truncate(slot, talk.written)
        talk.parked, talk.slot = self.engine.park(slot), None
        del self.live[slot]
        self.stats.turn_s.append(time.perf_counter() - talk.seated_s)
        turn, logprobs = talk.turn, talk.logprobs
        talk.budget, talk.turn, talk.logprobs = 0, [], []
        call = talk.conversation.end_turn(turn, logprobs)
        if call is None:
            self._leave(talk)
        else:
            if not self.calls:
                self._tools_since = time.perf_counter()
            task = asyncio.create_task(self._answer(call))
            task.add_done_callback(lambda _: call.close())  # one that was cancelled before it began
            self.calls[talk] = _Call(task, self._dispatches + max(self.engine.config.tool_lag, 0))

    # --- tools ---

    async def _answer(self, call: Coroutine[None, None, list[int] | None]) -> list[int] | None:
        async with self._gate:
            return await call

    async def take_answers(self) -> None:
        """Take the answers that are to be appended now, waiting for those that must not be late."""
        if not self.calls:
            return
        idle = self._stuck and not self.live and not self.in_flight
        started = time.perf_counter()
        if self.engine.config.tool_lag < 0:
            if idle:
                await asyncio.wait([call.task for call in self.calls.values()], return_when=asyncio.FIRST_COMPLETED)
            due = [talk for talk, call in self.calls.items() if call.task.done()]
        else:
            # With nothing else to do, the next answers in line are due at once.
            latest = min(call.due for call in self.calls.values()) if idle else self._dispatches
            due = [talk for talk, call in self.calls.items() if call.due <= latest]
        for talk in due:
            answer = await self.calls.pop(talk).task
            if answer is None:
                self._leave(talk)
            else:
                talk.ids += answer
                self.ready.append(talk)
        now = time.perf_counter()
        self.stats.tool_wait_s += now - started
        if not self.calls:
            self.stats.tool_s += now - self._tools_since

    # --- ends ---

    def _leave(self, talk: _Talk) -> None:
        """Give back what a conversation holds."""
        if talk.parked is not None:
            self.engine.drop(talk.parked)
            talk.parked = None
        if talk.slot is not None:
            self.live.pop(talk.slot, None)
            self.engine.free(talk.slot)
            talk.slot = None
        talk.written = 0

    def drop_cancelled(self) -> None:
        """Let go of conversations that nobody wants any more."""
        for talk in (*self.waiting, *self.ready, *self.live.values(), *self.calls):
            if talk.conversation.cancelled:
                self._drop(talk, "cancelled")

    def _drop(self, talk: _Talk, reason: str) -> None:
        """Let go of a conversation before its end, wherever it is, and tell it why."""
        self.stats.cancelled += 1
        if call := self.calls.pop(talk, None):
            call.task.cancel()
            if not self.calls:
                self.stats.tool_s += time.perf_counter() - self._tools_since
        elif talk in self.ready:
            self.ready.remove(talk)
        elif talk in self.waiting:
            self.waiting.remove(talk)
            self._wanted[tuple(talk.conversation.prompt)] -= 1
        self._leave(talk)
        talk.conversation.drop(reason)

    async def close(self) -> None:
        """Give everything back, whatever ended the run: tools are cancelled, results in flight are waited for."""
        for call in self.calls.values():
            call.task.cancel()
        await asyncio.gather(*(call.task for call in self.calls.values()), return_exceptions=True)
        for talk in self._talks:
            self._leave(talk)
        while self.in_flight:
            self.engine.read(self.in_flight.popleft()[0])
        for parked in self._prompts.values():
            self.engine.drop(parked)
