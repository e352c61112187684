"""Continuous batching with parking: many conversations over few cache rows, none waiting for another's tool.

One loop drives the device: admit waiting conversations into free rows, append the tools' answers that are due,
decode a few tokens, hand finished turns to their conversations. A row whose conversation waits for a tool is parked:
its cache stays, others decode. Tools run beside the loop, as asyncio tasks.

With `tool_lag >= 0` an answer is appended exactly that many dispatches after its call, and waited for if it is late:
the schedule then follows from the tokens alone, and a run can be repeated bit for bit. With -1 answers are appended
as they come, which hides long and uneven tools better.
"""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax

from retool_jax.engine.engine import Control, Drawn, Engine


class Conversation(Protocol):
    """What the scheduler asks of a trajectory in the making."""

    prompt: list[int]
    request: int  # names the stream of random draws: unique in a run
    temperature: float

    def turn_budget(self) -> int:
        """Tokens that the next turn may draw, at least 1."""

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        """How many of a turn's ids, of which `seen` were shown before, stand before an end that is no stop id."""

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        """Take a finished turn. None ends the conversation; a coroutine returns what to append, or None to end it."""


@dataclass
class Statistics:
    """Counters of one `converse` call; seconds are wall clock."""

    decoded_tokens: int = 0
    returned_tokens: int = 0  # of these, drawn after a stop string and given back
    prefilled_tokens: int = 0
    appended_tokens: int = 0
    row_steps: int = 0  # rows x decode steps: decoded / row_steps is the fill
    decode_s: float = 0.0
    tool_wait_s: float = 0.0  # the device had nothing to do but wait for tools
    total_s: float = 0.0


@dataclass
class _Row:
    """The host's side of one cache row."""

    conversation: Conversation
    length: int  # tokens written to the cache
    budget: int
    turn: list[int]
    logprobs: list[float]
    unwritten: list[int]  # the last drawn token: recorded, not yet in the cache


async def converse(engine: Engine, conversations: Sequence[Conversation]) -> Statistics:
    """Run every conversation to its end. Order of completion is free; each draw depends on its conversation alone."""
    stats = Statistics()
    began = time.perf_counter()
    waiting = deque(conversations)
    rows: dict[int, _Row] = {}
    tools: dict[int, tuple[asyncio.Task, int]] = {}  # row -> its running tool and the dispatch that it is due at
    dispatch = 0
    try:
        while waiting or rows:
            _admit(engine, waiting, rows, stats)
            live = len(rows) - len(tools)
            started = time.perf_counter()
            answers = await _due(tools, dispatch, live, engine.config.tool_lag)
            stats.tool_wait_s += time.perf_counter() - started
            _append(engine, rows, answers, stats)
            if any(row.budget for row in rows.values()):
                started = time.perf_counter()
                drawn = engine.decode(_control(engine, rows))
                # Off the event loop's thread, so that the sandbox is served while the device works.
                drawn = await asyncio.to_thread(jax.device_get, drawn)
                stats.decode_s += time.perf_counter() - started
                dispatch += 1
                for index, answer in _finish_turns(engine, rows, drawn, stats).items():
                    tools[index] = (asyncio.create_task(answer), dispatch + max(engine.config.tool_lag, 0))
    finally:
        for task, _ in tools.values():
            task.cancel()
        await asyncio.gather(*(task for task, _ in tools.values()), return_exceptions=True)
    stats.total_s = time.perf_counter() - began
    return stats


def _admit(engine: Engine, waiting: deque, rows: dict[int, _Row], stats: Statistics) -> None:
    """Give free rows to waiting conversations; neighbours with one prompt share its prefill."""
    free = [index for index in range(engine.config.slots) if index not in rows]
    owners: dict[tuple[int, ...], int] = {}
    sources, targets = [], []
    for index in free:
        if not waiting:
            break
        conversation = waiting.popleft()
        owner = owners.setdefault(tuple(conversation.prompt), index)
        if owner != index:
            sources.append(owner)
            targets.append(index)
        row = rows[index] = _Row(conversation, len(conversation.prompt), 0, [], [], [])
        row.budget = _turn_budget(engine, row)
    if owners:
        prompts = [list(prompt) for prompt in owners]
        engine.append(list(owners.values()), [0] * len(owners), prompts)
        engine.fork(sources, targets)
        stats.prefilled_tokens += sum(map(len, prompts))


async def _due(
    tools: dict[int, tuple[asyncio.Task, int]], dispatch: int, live: int, lag: int
) -> dict[int, list | None]:
    """Take the tools' answers that are to be appended now, waiting for those that must not be late."""
    if not tools:
        return {}
    if lag < 0:
        if not live:
            await asyncio.wait([task for task, _ in tools.values()], return_when=asyncio.FIRST_COMPLETED)
        ready = [index for index, (task, _) in tools.items() if task.done()]
    else:
        # With nothing to decode, the next answers in line are due at once.
        due = dispatch if live else min(at for _, at in tools.values())
        ready = [index for index, (_, at) in tools.items() if at <= due]
    return {index: await tools.pop(index)[0] for index in ready}


def _append(engine: Engine, rows: dict[int, _Row], answers: dict[int, list[int] | None], stats: Statistics) -> None:
    """Write answers behind their rows' last tokens and wake the rows; a conversation without answer leaves."""
    woken = []
    for index, answer in answers.items():
        if answer is None:
            del rows[index]
        else:
            woken.append((index, rows[index].length, rows[index].unwritten + answer))
    if not woken:
        return
    engine.append(*zip(*woken, strict=True))
    for index, _, tokens in woken:
        row = rows[index]
        row.length += len(tokens)
        row.budget = _turn_budget(engine, row)
        row.turn, row.logprobs, row.unwritten = [], [], []
        stats.appended_tokens += len(tokens)


def _turn_budget(engine: Engine, row: _Row) -> int:
    """What the conversation asks for its next turn, when its row can hold it."""
    budget, room = row.conversation.turn_budget(), engine.config.max_length - row.length
    if not 1 <= budget <= room:
        raise ValueError(
            f"request {row.conversation.request} has {row.length} of {engine.config.max_length} tokens and asked for a"
            f" turn of {budget}; it may ask for 1 to {room}, or end instead"
        )
    return budget


def _control(engine: Engine, rows: dict[int, _Row]) -> Control:
    control = Control.parked(engine.config.slots)
    for index, row in rows.items():
        control.length[index] = row.length
        control.budget[index] = row.budget
        control.request[index] = row.conversation.request
        control.temperature[index] = row.conversation.temperature
    return control


def _finish_turns(engine: Engine, rows: dict[int, _Row], drawn: Drawn, stats: Statistics) -> dict[int, Coroutine]:
    """Record what was drawn, free the rows of ended conversations; returns the tool calls that begin."""
    stats.decoded_tokens += int(drawn.counts.sum())
    stats.row_steps += int(drawn.steps) * engine.config.slots
    calls = {}
    for index, row in list(rows.items()):
        if not row.budget:
            continue
        count, seen = int(drawn.counts[index]), len(row.turn)
        row.turn += drawn.tokens[index, :count].tolist()
        row.logprobs += drawn.logprobs[index, :count].tolist()
        row.budget -= count
        stop = row.conversation.stop_at(row.turn, seen)
        if stop is None and row.budget and row.turn[-1] not in engine.stop_ids:
            row.length += count
            continue
        if stop is not None:  # what was drawn after it stays in the cache beyond the row's length, where nothing looks
            stats.returned_tokens += len(row.turn) - stop
            del row.turn[stop:], row.logprobs[stop:]
        row.length += len(row.turn) - seen - 1
        row.budget, row.unwritten = 0, row.turn[-1:]
        call = row.conversation.end_turn(row.turn, row.logprobs)
        if call is None:
            del rows[index]
        else:
            calls[index] = call
    return calls
