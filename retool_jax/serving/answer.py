"""One answer: a conversation that the engine's scheduler drives and whose events go to a request.

Turns, tools and limits are those of a rollout (`rollout.Dialogue`), so serving behaves as training and evaluation do.
Clients may also set a maximum number of tokens, stop strings, and functions of their own, whose calls end the answer.
"""

from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass

from retool_jax.engine.conversation import Tokens
from retool_jax.rollout.rollout import Dialogue
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory
from retool_jax.serving.reader import CallPiece, FunctionCall, Reader, TextPiece
from retool_jax.tokens.grammar import Grammar, ToolCall, end_of
from retool_jax.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens that the policy drew, and the pieces that became visible with them, each with the number of ids up to it.

    Until `Answer.read`, further tokens of the same turn are added to it.
    """

    ids: list[int]
    logprobs: list[float]
    seen: list[tuple[int, TextPiece | CallPiece]]


@dataclass(frozen=True)
class ToolStarted:
    """The server begins to run a call of the policy, the answer's `index`-th."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class ToolEnded:
    """The result of the answer's `index`-th call."""

    index: int
    use: ToolUse


Event = DrawnTokens | ToolStarted | ToolEnded


class Answer:
    """A conversation for the scheduler (`engine.Conversation`) that sends its events to a request.

    Args:
        dialogue: builds the trajectory and runs the server's tools.
        grammar: the grammar of calls; None if there is nothing to call.
        max_tokens: the most tokens that the policy may draw in all turns together.
        stops: strings at which the answer ends.
        functions: names of the client's functions; a turn that calls one ends the answer.

    Attributes:
        on_event: called with each event, on the event loop's thread.
        finish: OpenAI's reason for the end: stop, length or tool_calls; None before the end and after a fault.
        drawn: tokens of the policy so far.
        cached: tokens of the prompt that were in the cache from an earlier answer.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        tokenizer: Tokenizer,
        grammar: Grammar | None,
        max_tokens: int,
        stops: Sequence[str],
        functions: Collection[str],
    ) -> None:
        self.prompt, self.request, self.temperature = dialogue.prompt, dialogue.request, dialogue.temperature
        self.cancelled = False
        self.dialogue = dialogue
        self.on_event: Callable[[Event], None] = lambda _: None
        self.reader = Reader(tokenizer, grammar, functions, stops)
        self.finish: str | None = None
        self.drawn = self.cached = 0
        self._tokenizer, self._stops, self._max_tokens = tokenizer, stops, max_tokens
        self._stopped = False  # at a stop string of the request
        self._pending: Coroutine | None = None  # tools that have not begun
        self._unread: DrawnTokens | None = None  # tokens of this turn that `read` has not read yet

    @property
    def trajectory(self) -> Trajectory:
        return self.dialogue.trajectory

    @property
    def open_calls(self) -> list[FunctionCall]:
        """Calls of the client's functions, which the client has to answer."""
        return self.reader.calls

    # --- called by the scheduler ---

    def turn_budget(self) -> int:
        return min(self.dialogue.turn_budget(), self._max_tokens - self.drawn)

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        """The first place to stop: at a stop string of the request, or where the grammar ends the turn."""
        ends = [end_of(self._tokenizer, ids, seen, string) for string in self._stops]
        own = min((end for end in ends if end is not None), default=None)
        by_grammar = self.dialogue.stop_at(ids, seen)
        self._stopped = own is not None and (by_grammar is None or own <= by_grammar)
        return own if self._stopped else by_grammar

    def on_tokens(self, tokens: Tokens) -> None:
        self.dialogue.on_tokens(tokens)
        self.drawn += len(tokens.ids)
        if self._unread is None:
            self._unread = DrawnTokens([], [], [])
            self.on_event(self._unread)
        self._unread.ids.extend(tokens.ids)
        self._unread.logprobs.extend(tokens.logprobs)

    def read(self) -> None:
        """Read the text of the last tokens, before their event is sent; until then the event grows."""
        if self._unread is None:
            return
        drawn, self._unread = self._unread, None
        ends = bool(drawn.ids) and drawn.ids[-1] in self._tokenizer.stop_ids
        skimmed = len(drawn.ids) - ends
        if (words := self.reader.skim(drawn.ids[:skimmed])) is None:
            words, skimmed = [], 0
        drawn.seen.extend((skimmed, each) for each in words)
        for count, index in enumerate(drawn.ids[skimmed:], skimmed + 1):
            for each in self.reader.feed([index]):
                joined = drawn.seen and each.joined_to(drawn.seen[-1][1])
                if joined:  # send as few pieces as possible
                    drawn.seen.pop()
                drawn.seen.append((count, joined or each))

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        self.read()
        dialogue, reader, before = self.dialogue, self.reader, len(self.trajectory.tool_uses)
        dialogue.record_turn(ids, logprobs)
        seen = reader.end_turn()
        whole = dialogue.is_whole
        calls = dialogue.calls() if whole and not self._stopped else []
        if not reader.calls:  # the reader does not recognise calls in a thought that did not end
            for call in filter(reader.is_for_client, calls):
                seen += reader.hand_over(call.name, call.arguments)
        self.on_event(DrawnTokens([], [], [(0, each) for each in seen]))
        if self._stopped:
            return self._end("stop")
        if reader.calls:
            return self._end("tool_calls" if all(call.ended for call in reader.calls) else "length")
        if self.drawn >= self._max_tokens and (calls or not whole):
            return self._end("length")
        if calls and dialogue.may_call:
            for number, call in enumerate(calls):
                self.on_event(ToolStarted(before + number, call))
        self._pending = dialogue.finish_turn()
        if self._pending is None:
            return self._end("stop" if self.trajectory.end in (End.ANSWERED, End.NO_ANSWER) else "length")
        return self._run_tools(self._pending, before)

    async def _run_tools(self, tools: Coroutine[None, None, list[int] | None], before: int) -> list[int] | None:
        """Wait for the tools of a turn, and send their results as events."""
        self._pending = None
        segment = await tools
        for number, use in enumerate(self.trajectory.tool_uses[before:]):
            self.on_event(ToolEnded(before + number, use))
        if segment is None:
            return None if self.trajectory.dropped else self._end("length")
        self.reader.begin_turn(new=self._tokenizer.decode(segment).endswith(self._tokenizer.turn_header))
        return segment

    def _end(self, finish: str) -> None:
        self.finish = finish
        self.dialogue.end(End.TOKEN_LIMIT if finish == "length" else End.NO_ANSWER)

    def drop(self, reason: str) -> None:
        if self._pending is not None:  # its tools were cancelled before they began
            self._pending.close()
        self.dialogue.drop(reason)

    async def close(self) -> None:
        """Close the states that tools keep for it."""
        await self.dialogue.close()
