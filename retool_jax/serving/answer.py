"""One answer: a conversation that the engine's scheduler drives and whose events a request listens to.

Turns, tools and limits are those of a rollout (`rollout.Dialogue`), so what is served is what is trained and measured.
On top of that come what a client may ask for: a number of tokens, strings to stop at, and functions of its own, whose
calls end the answer.
"""

from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass

from retool_jax.engine.conversation import Tokens
from retool_jax.rollout.rollout import Dialogue
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory
from retool_jax.serving.reader import Called, FunctionCall, Reader, Said
from retool_jax.tokens.grammar import Grammar, ToolCall, end_of
from retool_jax.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Drawn:
    """Tokens that the policy drew, and what became visible with them, each with the number of ids up to it.

    It grows by what is drawn in the same turn until `Answer.read`.
    """

    ids: list[int]
    logprobs: list[float]
    seen: list[tuple[int, Said | Called]]


@dataclass(frozen=True)
class ToolRuns:
    """The server runs a call of the policy, the answer's `index`-th."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class ToolRan:
    """How that ended."""

    index: int
    use: ToolUse


Event = Drawn | ToolRuns | ToolRan


class Answer:
    """What the scheduler asks of a conversation (`engine.Conversation`), and what a request is told meanwhile.

    Args:
        dialogue: the trajectory in the making; it runs the server's tools.
        grammar: in which calls are written; None where there is nothing to call.
        max_tokens: that the policy may draw, all turns together.
        stops: strings at which the answer ends.
        functions: of the client's; a turn that calls one ends the answer.

    Attributes:
        tell: takes events, on the event loop's thread.
        finish: why it ended, as OpenAI says it: stop, length or tool_calls; None while it goes on and after a fault.
        drawn: tokens of the policy so far.
        cached: tokens of the prompt that an earlier answer had written.
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
        self.tell: Callable[[Event], None] = lambda _: None
        self.reader = Reader(tokenizer, grammar, functions, stops)
        self.finish: str | None = None
        self.drawn = self.cached = 0
        self._tokenizer, self._stops, self._max_tokens = tokenizer, stops, max_tokens
        self._stopped = False  # at a string of the request
        self._to_run: Coroutine | None = None  # tools that have not begun
        self._unread: Drawn | None = None  # tokens of this turn that nobody was told of yet

    @property
    def trajectory(self) -> Trajectory:
        return self.dialogue.trajectory

    @property
    def open_calls(self) -> list[FunctionCall]:
        """Calls of the client's functions, which are its to answer."""
        return self.reader.calls

    # --- what the scheduler asks ---

    def turn_budget(self) -> int:
        return min(self.dialogue.turn_budget(), self._max_tokens - self.drawn)

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        """The first end: one of the request's strings, or the grammar's."""
        ends = [end_of(self._tokenizer, ids, seen, string) for string in self._stops]
        own = min((end for end in ends if end is not None), default=None)
        grammars = self.dialogue.stop_at(ids, seen)
        self._stopped = own is not None and (grammars is None or own <= grammars)
        return own if self._stopped else grammars

    def on_tokens(self, tokens: Tokens) -> None:
        self.dialogue.on_tokens(tokens)
        self.drawn += len(tokens.ids)
        if self._unread is None:
            self._unread = Drawn([], [], [])
            self.tell(self._unread)
        self._unread.ids.extend(tokens.ids)
        self._unread.logprobs.extend(tokens.logprobs)

    def read(self) -> None:
        """See what the last tokens say, before somebody is told of them; until then their event grows."""
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
                longer = drawn.seen and each.behind(drawn.seen[-1][1])
                if longer:  # one piece for a client where there may be one
                    drawn.seen.pop()
                drawn.seen.append((count, longer or each))

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        self.read()
        dialogue, reader, before = self.dialogue, self.reader, len(self.trajectory.tool_uses)
        dialogue.take(ids, logprobs)
        seen = reader.end_turn()
        whole = dialogue.is_whole
        calls = dialogue.calls() if whole and not self._stopped else []
        if not reader.calls:  # inside of a thought that did not end, a reader cannot know that they are calls
            for call in filter(reader.is_for_client, calls):
                seen += reader.hand_over(call.name, call.arguments)
        self.tell(Drawn([], [], [(0, each) for each in seen]))
        if self._stopped:
            return self._end("stop")
        if reader.calls:
            return self._end("tool_calls" if all(call.ended for call in reader.calls) else "length")
        if self.drawn >= self._max_tokens and (calls or not whole):
            return self._end("length")
        if calls and dialogue.may_call:
            for number, call in enumerate(calls):
                self.tell(ToolRuns(before + number, call))
        self._to_run = dialogue.go_on()
        if self._to_run is None:
            return self._end("stop" if self.trajectory.end in (End.ANSWERED, End.NO_ANSWER) else "length")
        return self._answered(self._to_run, before)

    async def _answered(self, answer: Coroutine[None, None, list[int] | None], before: int) -> list[int] | None:
        """Wait for the tools of a turn, and tell what came of them."""
        self._to_run = None
        segment = await answer
        for number, use in enumerate(self.trajectory.tool_uses[before:]):
            self.tell(ToolRan(before + number, use))
        if segment is None:
            return None if self.trajectory.dropped else self._end("length")
        self.reader.begin_turn(new=self._tokenizer.decode(segment).endswith(self._tokenizer.turn_header))
        return segment

    def _end(self, finish: str) -> None:
        self.finish = finish
        self.dialogue.end(End.TOKEN_LIMIT if finish == "length" else End.NO_ANSWER)

    def drop(self, reason: str) -> None:
        if self._to_run is not None:  # its tools were cancelled before they began
            self._to_run.close()
        self.dialogue.drop(reason)

    async def close(self) -> None:
        """Close what tools keep for it."""
        await self.dialogue.close()
