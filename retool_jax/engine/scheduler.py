"""Continuous batching with parking, as a service: many conversations share few slots.

One asyncio task drives the device in a loop: seat conversations in free slots and write the tokens that their rows
lack, decode a few tokens, and hand finished turns to their conversations. While a conversation waits for a tool, its
row leaves the slot and keeps its pages (it is parked), so that others can decode. Tools run in the same event loop, and
results are read while the device works on the next dispatch. Conversations may be submitted at any time, from any
thread. New weights are taken between dispatches. An error in a conversation or its tool ends only that conversation.

With `tool_lag >= 0` an answer is appended that many dispatches after its call was read, and the loop waits for it if
it is late, so a run that submits everything at once is reproducible bit for bit. With -1 answers come when ready.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from itertools import count, islice
from typing import NamedTuple, TypeVar

import jax

from retool_jax.engine.conversation import Conversation, Finish, OnTokens, SamplingParams, Statistics, Tokens
from retool_jax.engine.engine import Engine
from retool_jax.engine.pages import OutOfPages
from retool_jax.engine.seats import Call, ConversationState, Seats
from retool_jax.engine.turns import Drawn, Turn, Turns

T = TypeVar("T")


async def converse(
    engine: Engine,
    conversations: Sequence[Conversation],
    tools_at_once: int = 0,
    on_tokens: Sequence[OnTokens] | None = None,
    sampling: Sequence[SamplingParams] | None = None,
) -> Statistics:
    """Run every conversation to its end. They may finish in any order; each draw depends only on its conversation.

    `tools_at_once` limits the number of tools that run at the same time (0: no limit). Further calls wait, and while
    twice as many calls wait or run, no new conversation begins. `on_tokens` and `sampling` have one entry for each
    conversation, see `Service.submit`. The first error of a conversation ends them all and is raised.
    """
    none = [None] * len(conversations)
    async with Service(engine, tools_at_once) as service:
        arguments = zip(conversations, sampling or none, on_tokens or none, strict=True)
        await asyncio.gather(*[service.submit(*each) for each in arguments])
    return service.take_statistics()


class _Dispatch(NamedTuple):
    drawn: Drawn
    states: dict[int, ConversationState]  # by slot
    version: int  # of the weights


class Service:
    """Runs conversations on an engine that nobody else uses meanwhile: `async with Service(engine) as service`.

    Call its methods on the event loop's thread, which is the engine's; those named `from_thread` may be called on any.
    """

    def __init__(self, engine: Engine, tools_at_once: int = 0) -> None:
        self.engine = engine
        self._seats = Seats(engine)
        self._states: dict[ConversationState, None] = {}  # those that have not ended, in order
        self._cancelled: list[ConversationState] = []  # those whose futures were cancelled
        self._in_flight: deque[_Dispatch] = deque()
        self._dispatches = 0
        self._orders = count()
        self._version = engine.version
        self._stuck = False  # no conversation could be seated
        self._tools_since = 0.0  # when the first of the open calls began
        self._tools_at_once = tools_at_once
        self._gate = asyncio.Semaphore(tools_at_once) if tools_at_once else contextlib.nullcontext()
        self._woken = asyncio.Event()  # set by submissions and cancellations
        self._closed: Exception | None = RuntimeError("the scheduler is not running; use `async with`")
        self._driver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Service":
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._closed = None
        self._began = time.perf_counter()
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- submitting ---

    def submit(
        self,
        conversation: Conversation,
        sampling: SamplingParams | None = None,
        on_tokens: OnTokens | None = None,
    ) -> asyncio.Future[Finish]:
        """Run a conversation to its end. The future returns how it ended; cancelling it drops the conversation.

        Without `sampling` it samples from the full distribution at the conversation's own temperature. `on_tokens` is
        called with its tokens as they are read, on the event loop's thread.

        Raises:
            ValueError: its prompt does not fit a row, or its request is not a valid seed.
        """
        if self._closed is not None:
            raise RuntimeError("the scheduler takes no conversations") from self._closed
        if threading.get_ident() != self._thread:
            raise RuntimeError("submit belongs to the event loop's thread; use submit_from_thread in another one")
        request, length, limit = conversation.request, len(conversation.prompt), self.engine.config.max_length
        if not 1 <= length <= limit:
            raise ValueError(f"request {request} has a prompt of {length} tokens; a row holds 1 to {limit}")
        if not 0 <= request < 2**32:
            raise ValueError(f"request {request} must lie between 0 and {2**32 - 1}: it is the seed of the draws")
        sampling = sampling or SamplingParams(conversation.temperature)
        state = ConversationState(
            conversation, sampling, on_tokens, self._loop.create_future(), next(self._orders), list(conversation.prompt)
        )

        def cancel(done: asyncio.Future) -> None:
            if done.cancelled():
                conversation.cancelled = True
                self._cancelled.append(state)
                self._woken.set()

        state.done.add_done_callback(cancel)
        self._states[state] = None
        self._seats.add(state)
        self._stuck = False
        self._woken.set()
        return state.done

    async def stream(self, conversation: Conversation, sampling: SamplingParams | None = None) -> AsyncIterator[Tokens]:
        """A conversation's tokens as they come. Its error is raised; leaving the loop early drops the conversation."""
        queue: asyncio.Queue[Tokens | None] = asyncio.Queue()
        done = self.submit(conversation, sampling, queue.put_nowait)
        done.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (tokens := await queue.get()) is not None:
                yield tokens
        finally:
            done.cancel()
        done.result()

    def submit_from_thread(
        self,
        conversation: Conversation,
        sampling: SamplingParams | None = None,
        on_tokens: OnTokens | None = None,
    ) -> concurrent.futures.Future[Finish]:
        """`submit` for other threads, which may wait for the result; callbacks run on the event loop's thread."""

        async def run() -> Finish:
            return await self.submit(conversation, sampling, on_tokens)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def from_thread(self, function: Callable[..., T], *arguments: object) -> concurrent.futures.Future[T]:
        """Run a function, such as `engine.update_params`, on the event loop's thread between two dispatches."""

        async def run() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def take_statistics(self) -> Statistics:
        """The statistics since the last call, or since the start."""
        statistics, self._seats.stats = self._seats.stats, Statistics()
        now = time.perf_counter()
        statistics.total_s, self._began = now - self._began, now
        return statistics

    @property
    def working(self) -> bool:
        """Whether it takes conversations: it is open and the device has not failed."""
        return self._closed is None

    def gauges(self) -> dict[str, int]:
        """The number of conversations that wait for their first seat, that draw, and that have an open call."""
        seats = self._seats
        return {"waiting": len(seats.waiting), "drawing": len(seats.live), "calling": len(seats.calls)}

    async def close(self) -> None:
        """Drop the conversations that have not ended, cancel their tools, and wait for results in flight.

        If the device fails meanwhile, the rest is still closed, and then the first error is raised.
        """
        if self._driver is None:
            return
        errors: list[Exception] = []

        def attempt(function: Callable[..., object], *arguments: object) -> None:
            try:
                function(*arguments)
            except Exception as error:  # of the device or of a conversation: go on closing the rest
                errors.append(error)

        self._closed = self._closed or RuntimeError("the scheduler was closed")
        tools = [call.task for call in self._seats.calls.values()]
        self._driver.cancel()
        await asyncio.wait([self._driver])
        self._driver = None  # releases its frames and the arrays that they hold
        for state in list(self._states):
            attempt(self._finish, state, Finish.CLOSED)
        await asyncio.gather(*tools, return_exceptions=True)
        while self._in_flight:
            attempt(self.engine.read, self._in_flight.popleft().drawn)
        attempt(self._seats.drop_kept)
        if errors:
            raise errors[0]

    # --- the driver task ---

    async def _drive(self) -> None:
        try:
            while True:
                while not (self._seats or self._in_flight):
                    self._woken.clear()
                    await self._woken.wait()
                self._take_weights()
                self._drop_cancelled()
                await self._take_answers()
                self._take_weights()  # weights that came while it waited for an answer
                self._seat()
                if self._seats.live:
                    self._decode()
                if self._in_flight and (len(self._in_flight) > self.engine.config.read_late or not self._seats.live):
                    await self._read()
        except Exception as error:  # of the engine: no conversation can continue
            self._closed = error
            for state in self._states:
                if not state.done.done():
                    state.done.set_exception(error)

    def _take_weights(self) -> None:
        """Apply `engine.stale_rows` after `engine.update_params`: rows still hold keys and values of the old weights.

        Kept prompts are always dropped, so that new conversations use only the new weights.
        """
        if self.engine.version == self._version:
            return
        self._version = self.engine.version
        if self.engine.config.stale_rows == "keep":
            self._seats.drop_kept()
            return
        if self.engine.config.stale_rows == "discard":
            for state in self._seats.begun():
                self._finish(state, Finish.DISCARDED)
        self._seats.rewrite()

    def _drop_cancelled(self) -> None:
        """Finish cancelled conversations. Of those that wait, only the next one's `cancelled` flag is looked at."""
        cancelled, self._cancelled = self._cancelled, []  # futures
        for state in (*self._seats.begun(), *islice(self._seats.waiting, 1), *cancelled):
            if state.conversation.cancelled and state in self._states:
                self._finish(state, Finish.CANCELLED)

    def _seat(self) -> None:
        """Fill free slots, and start the turns of the conversations there."""
        piled_up = bool(self._tools_at_once) and len(self._seats.calls) >= 2 * self._tools_at_once
        seated = self._seats.seat(len(self._in_flight), piled_up)
        for state in seated:
            try:
                if not state.budget:  # a new turn; an interrupted one continues with its budget
                    state.budget = self._turn_budget(state)
            except Exception as error:  # of the conversation, which is the caller's code: only this one ends
                self._finish(state, error)
                continue
            how = state.sampling
            turn = Turn(state.conversation.request, state.budget, how.temperature, how.top_k, how.top_p, how.stop_ids)
            self.engine.start(state.slot, turn)
            self._seats.live[state.slot] = state
        self._stuck = not seated
        if self._stuck and not (self._seats.live or self._in_flight or self._seats.calls):
            for state in (self._seats.ready or list(self._seats.waiting))[:1]:
                request = state.conversation.request
                self._finish(state, OutOfPages(f"others hold the pages that request {request} needs"))

    def _turn_budget(self, state: ConversationState) -> int:
        """The budget that the conversation asks for its next turn, checked against its row's length."""
        budget, room = state.conversation.turn_budget(), self.engine.config.max_length - len(state.ids)
        if not 1 <= budget <= room:
            raise ValueError(
                f"request {state.conversation.request} has {len(state.ids)} of {self.engine.config.max_length} tokens"
                f" and asked for a turn of {budget}; it may ask for 1 to {room}, or end instead"
            )
        return budget

    def _decode(self) -> None:
        """Begin a dispatch. If the cache is too small for all rows, evict the youngest rows until it is not."""
        while self._seats.live:
            try:
                drawn = self.engine.decode()
            except OutOfPages:
                if not self._seats.evict_any():
                    raise
            else:
                self._dispatches += 1
                self._in_flight.append(_Dispatch(drawn, dict(self._seats.live), self.engine.version))
                return

    async def _read(self) -> None:
        """Read the results of the oldest dispatch and hand them to their conversations."""
        drawn, states, version = self._in_flight[0]
        started = time.perf_counter()
        # In another thread, so that the event loop serves tools while the device works.
        await asyncio.to_thread(jax.block_until_ready, (drawn.ints, drawn.floats))
        self._in_flight.popleft()
        turns = self.engine.read(drawn)
        stats = self._seats.stats
        stats.decode_s += time.perf_counter() - started
        stats.row_steps += int(turns.counts.max(initial=0)) * self.engine.config.slots
        for slot, state in states.items():
            if turns.counts[slot]:
                try:
                    self._take_tokens(slot, state, turns, version)
                except Exception as error:  # of the conversation: only this one ends
                    self._finish(state, error)

    def _take_tokens(self, slot: int, state: ConversationState, turns: Turns, version: int) -> None:
        """Record the tokens that a row drew, and hand a finished turn to its conversation."""
        number, seen = int(turns.counts[slot]), len(state.turn)
        self._seats.stats.decoded_tokens += number
        state.turn += turns.tokens[slot, :number].tolist()
        state.logprobs += turns.plain_logprobs[slot, :number].tolist()
        state.budget -= number
        stop = state.conversation.stop_at(state.turn, seen)
        if stop is not None:
            del state.turn[stop:], state.logprobs[stop:]
        state.ids += state.turn[seen:]
        state.written = len(state.ids)
        if state.on_tokens is not None:
            state.on_tokens(Tokens(state.turn[seen:], state.logprobs[seen:], version))
        if stop is None and not turns.ended[slot]:
            return
        state.written -= 1  # the last token was drawn but not written
        if stop is not None:
            self.engine.truncate(slot, state.written)
        self._seats.park(state)
        turn, logprobs = state.turn, state.logprobs
        state.budget, state.turn, state.logprobs = 0, [], []
        call = state.conversation.end_turn(turn, logprobs)
        if call is None:
            self._finish(state, Finish.ENDED)
            return
        if not self._seats.calls:
            self._tools_since = time.perf_counter()
        task = asyncio.create_task(self._answer(call))
        task.add_done_callback(lambda _: call.close())  # in case it was cancelled before it began
        self._seats.calls[state] = Call(task, self._dispatches + max(self.engine.config.tool_lag, 0))

    # --- tools ---

    async def _answer(self, call: Coroutine[None, None, list[int] | None]) -> list[int] | None:
        async with self._gate:
            return await call

    async def _take_answers(self) -> None:
        """Take the answers that are due, waiting for those with a fixed `tool_lag`."""
        calls = self._seats.calls
        if not calls:
            return
        idle = self._stuck and not self._seats.live and not self._in_flight
        started = time.perf_counter()
        if self.engine.config.tool_lag < 0:
            if idle:
                await self._wait_for_any([call.task for call in calls.values()])
            due = [state for state, call in calls.items() if call.task.done()]
        else:
            # If the device is idle, the next answers are due at once.
            latest = min(call.due for call in calls.values()) if idle else self._dispatches
            due = [state for state, call in calls.items() if call.due <= latest]
        for state in due:
            if not await self._wait_for_answer(state, idle):
                break
            self._take_answer(state)
        self._seats.stats.tool_wait_s += time.perf_counter() - started

    async def _wait_for_answer(self, state: ConversationState, idle: bool) -> bool:
        """Wait for a tool's answer or a cancellation of it; if `idle`, until something else can be done (False)."""
        task = self._seats.calls[state].task
        while not task.done() and not state.done.cancelled():
            if await self._wait_for_any([task]) and idle:
                return False
        return True

    async def _wait_for_any(self, tasks: Collection[asyncio.Task]) -> bool:
        """Wait until one of the tasks is done, or until a submission or a cancellation; the latter returns True."""
        if any(task.done() for task in tasks):
            return False
        self._woken.clear()
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait([*tasks, woken], return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
        return self._woken.is_set()

    def _take_answer(self, state: ConversationState) -> None:
        """Queue a conversation whose tool has answered for a seat, or end it; does nothing if the tool still runs."""
        task = self._seats.calls[state].task
        if not task.done():
            return
        request, limit = state.conversation.request, self.engine.config.max_length
        try:
            answer = task.result()
        except asyncio.CancelledError:
            self._finish(state, Finish.CANCELLED)
            return
        except Exception as error:  # of the tool: only its conversation ends
            self._finish(state, error)
            return
        if answer is None:
            self._finish(state, Finish.ENDED)
        elif len(state.ids) + len(answer) > limit:
            length = len(state.ids) + len(answer)
            self._finish(state, ValueError(f"request {request} would hold {length} of {limit} tokens after its answer"))
        else:
            state.ids += answer
            self._forget_call(state)
            self._seats.ready.append(state)

    def _forget_call(self, state: ConversationState) -> None:
        if self._seats.calls.pop(state, None) and not self._seats.calls:
            self._seats.stats.tool_s += time.perf_counter() - self._tools_since

    # --- finishing ---

    def _finish(self, state: ConversationState, how: Finish | Exception) -> None:
        """Release a conversation, wherever it is, and report to it and to its future how it ended."""
        if call := self._seats.calls.get(state):
            call.task.cancel()
            self._forget_call(state)
        self._states.pop(state, None)
        if isinstance(how, Finish) and how is not Finish.ENDED:
            try:
                state.conversation.drop(how.value)
            except Exception as error:  # of the conversation: its future raises it
                how = error
        if not state.done.done():
            if isinstance(how, Finish):
                state.done.set_result(how)
            else:
                state.done.set_exception(how)
        self._seats.leave(state, ended=how is Finish.ENDED)  # last, because it raises if the engine has failed
