"""What a server answers with: the engine's scheduler, the tools, its limits, and the answers that it keeps."""

import asyncio
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

from retool_jax.data.problems import Problem
from retool_jax.engine.conversation import SamplingParams
from retool_jax.engine.scheduler import Service
from retool_jax.errors import UserError
from retool_jax.rollout.config import RolloutConfig
from retool_jax.rollout.rollout import Dialogue, Sample
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.sandbox import SandboxConfig
from retool_jax.serving.answer import Answer, Drawn, Event, ToolRan
from retool_jax.serving.config import ServeConfig
from retool_jax.serving.containers import Containers
from retool_jax.serving.metrics import Metrics
from retool_jax.serving.prompts import PromptScorer
from retool_jax.serving.record import add_sessions, begin_record
from retool_jax.serving.requests import Refused
from retool_jax.tokens.chat import prompt_ids
from retool_jax.tokens.grammar import GRAMMARS
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox

logger = logging.getLogger(__name__)

_APART = 2654435761  # between the draws of two choices of a request
_TOO_LONG = -1  # in the place of an answer's number: time is up
_PIECE_S = 0.02  # between two writes of a stream, which has the tokens of several dispatches then
_AT_ONCE = 4000  # characters that are encoded in less time than it takes to hand them to a thread

Happened = tuple[int, Event | None]


@dataclass
class Visit:
    """One request for an answer, for the log and for what is kept."""

    id: str
    path: str
    keep: bool = True
    container: str = ""  # whose states the tools have, which stay; empty: states of the answer's own
    began: float = field(default_factory=time.perf_counter)
    first_s: float | None = None  # until its first token
    fault: str = ""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


@dataclass
class Wish:
    """What a request asks of an answer, beside its prompt."""

    sampling: SamplingParams
    seed: int | None
    max_tokens: int | None
    stops: tuple[str, ...] = ()
    functions: dict[str, dict] = field(default_factory=dict)  # the client's own, by name
    tools: Toolbox | None = None  # those of the server


@dataclass
class KeptAnswer:
    """What stays of a request's answers: their conversations, one for each choice, and, of a response, what another
    one needs to go on from it."""

    trajectories: list[Trajectory]
    wish: Wish | None = None
    calls: list[str] = field(default_factory=list)  # ids of calls that wait for the client's answers
    turn: list[str] = field(default_factory=list)  # those of the last turn in order; empty for one that is not its
    instructions: str | None = None
    tools: list = field(default_factory=list)  # as they were given
    container: str = ""


class Server:
    """Answers requests over one engine. Everything happens on the event loop's thread.

    Attributes:
        model: its name, as clients know it.
        closing: no request begins any more.
        kept: answers by their ids, the newest last, each with its conversations.
    """

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        tools: Toolbox | None,
        rollout: RolloutConfig,
        config: ServeConfig,
        model: str,
    ) -> None:
        self.service, self.tokenizer, self.tools, self.model = service, tokenizer, tools, model
        self.rollout, self.config = rollout, config
        self.metrics, self.created = Metrics(), int(time.time())
        self.closing = False
        self.open = 0  # requests that are being answered
        self.kept: OrderedDict[str, KeptAnswer] = OrderedDict()
        box = tools.sandbox.config if tools and tools.sandbox else SandboxConfig()
        stays = any(tool.lifetime == "trajectory" for tool in tools.tools.values()) if tools else False
        # Half of the interpreters that may stay are for answers that have none yet.
        self.containers = Containers(box.sessions // 2 if stays else config.keep, box.session_ttl_s)
        self._grammar = GRAMMARS[rollout.grammar]
        if config.record:
            begin_record(Path(config.record))

    # --- what a request becomes ---

    def admit(self) -> None:
        """Let a request begin, or refuse it; whoever was let in says `leave` in the end."""
        if self.closing:
            raise Refused(503, "the server is closing; send the request again, to another one", code="closing")
        if self.open >= self.config.streams:
            raise Refused(
                429, f"{self.open} requests are being answered (serve.streams); send it again in a while", code="busy"
            )
        if (waiting := self.service.gauges()["waiting"]) >= self.config.queue:
            raise Refused(503, f"{waiting} conversations wait (serve.queue); send it again in a while", code="busy")
        self.open += 1

    def leave(self) -> None:
        self.open -= 1

    async def prompt(self, messages: list[dict], wish: Wish) -> list[int]:
        """A conversation's first ids, up to the header of the policy's turn, with the tools that it may call."""
        schemas = [*(wish.tools.schemas if wish.tools else []), *wish.functions.values()]

        def encode() -> list[int]:
            if not schemas:
                return prompt_ids(self.tokenizer, messages)
            return self._grammar.prompt(self.tokenizer, messages, schemas, self.rollout.tool_prompt)

        try:
            short = sum(len(str(message)) for message in messages) + len(str(schemas)) < _AT_ONCE
            return encode() if short else await asyncio.to_thread(encode)  # a long text takes a while
        except UserError as error:
            raise Refused(400, str(error), "messages") from None

    def answers(
        self, visit: Visit, messages: Sequence[dict], prompt: list[int], wish: Wish, count: int = 1
    ) -> list[Answer]:
        """Conversations that begin with the ids of a prompt, to be handed to `run` or `batches`.

        Raises:
            Refused: the prompt is longer than the server takes.
        """
        room, most = self.service.engine.config.max_length, self.rollout.max_prompt_tokens
        if len(prompt) > most:
            raise Refused(
                400,
                f"the conversation has {len(prompt)} tokens; the limit is {most} (rollout.max_prompt_tokens), so that"
                f" an answer fits in {room}: send less",
                "messages",
                "context_length_exceeded",
            )
        seed = secrets.randbits(32) if wish.seed is None else wish.seed
        tools = wish.tools or (Toolbox([]) if wish.functions else None)  # answers calls that cannot be read
        grammar = self._grammar if tools else None
        most_drawn = room if wish.max_tokens is None else wish.max_tokens
        problem, how = Problem(visit.id, tuple(messages), ""), wish.sampling
        answers = []
        for index in range(count):
            request = (seed + index * _APART) % 2**32
            sample = Sample(problem, request, how.temperature, how.top_p, how.top_k)
            dialogue = Dialogue(sample, prompt, self.tokenizer, tools, room, self.rollout)
            answers.append(Answer(dialogue, self.tokenizer, grammar, most_drawn, wish.stops, wish.functions))
        return answers

    @cached_property
    def score_prompt(self) -> PromptScorer:
        """What the weights say of a prompt's own tokens."""
        return PromptScorer(self.service.engine)

    # --- answering ---

    async def run(self, visit: Visit, answers: Sequence[Answer]) -> AsyncGenerator[Happened, None]:
        """`batches`, one event at a time."""
        async with aclosing(self.batches(visit, answers)) as batches:
            async for batch in batches:
                for happened in batch:
                    yield happened

    async def batches(self, visit: Visit, answers: Sequence[Answer]) -> AsyncGenerator[list[Happened], None]:
        """Events of the answers as they come, each with its answer's number; None when that one has ended.

        Those that come within `_PIECE_S` of each other are together, so that a stream writes once for all of them. The
        first tokens, what comes after a pause, and the end of an answer are told at once. Whoever closes this early
        drops the answers: their rows are given back, and programs at work are stopped.

        Raises:
            Refused: the machinery failed, or it took too long.
        """
        loop, woken, told_s = asyncio.get_running_loop(), asyncio.Event(), 0.0
        happened: list[Happened] = []

        def tell(number: int, event: Event | None) -> None:
            if event is None:
                woken.set()
            elif not happened:
                loop.call_at(told_s + _PIECE_S, woken.set)
            happened.append((number, event))

        done = []
        left_s = visit.began + self.config.answer_s - time.perf_counter()
        too_long = loop.call_later(max(left_s, 0), tell, _TOO_LONG, None)
        kept = self.containers.take(visit.container) if visit.container else None
        try:
            for number, answer in enumerate(answers):
                if kept is not None:
                    answer.dialogue.keep_in(kept)
                answer.tell = partial(tell, number)
                done.append(self._submit(answer))
                done[-1].add_done_callback(lambda _, number=number: tell(number, None))
            left = len(answers)
            while left:
                await woken.wait()
                woken.clear()
                for answer in answers:
                    answer.read()
                told_s, batch = loop.time(), happened[:]
                happened.clear()
                for number, event in batch:
                    if number == _TOO_LONG:
                        raise Refused(
                            503,
                            f"the answer took more than {self.config.answer_s:g} s (serve.answer_s); ask for fewer"
                            " tokens, or send it again when the server is less busy",
                            code="timeout",
                        )
                    self._count(visit, event)
                    if event is None:
                        left -= 1
                        _check(answers[number], done[number])
                yield batch
        except Refused as refused:
            visit.fault = refused.code or "fault"
            raise
        finally:
            too_long.cancel()
            for future in done:
                future.cancel()
            for answer in answers:
                await answer.close()
            if visit.container:
                self.containers.give(visit.container, lost=any(answer.finish is None for answer in answers))
            self._record(visit, answers)

    def _submit(self, answer: Answer) -> asyncio.Future:
        try:
            return self.service.submit(answer, answer.dialogue.sampling, answer.on_tokens)
        except RuntimeError:
            raise Refused(503, "the engine takes no conversations; send the request to another server") from None

    def _count(self, visit: Visit, event: Event | None) -> None:
        if isinstance(event, Drawn) and visit.first_s is None:
            visit.first_s = visit.seconds
            self.metrics.first_s.add(visit.first_s)
        elif isinstance(event, ToolRan):
            self.metrics.tools[event.use.tool, event.use.status] += 1
            self.metrics.tool_s.add(event.use.wall_s)

    def _record(self, visit: Visit, answers: Sequence[Answer]) -> None:
        """Count an answer, and say in the log how it went."""
        self.metrics.answer_s.add(visit.seconds)
        usage = usage_of(answers)
        for kind, tokens in usage.items():
            if kind not in ("cached", "thought"):
                self.metrics.tokens[kind] += tokens
        ends = [answer.finish or visit.fault or "gone" for answer in answers]
        self.metrics.ends.update(ends)
        said: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": visit.id}
        said |= {"path": visit.path, "ends": ends, "tokens": usage, "seconds": round(visit.seconds, 3)}
        said |= {"first_token_s": visit.first_s and round(visit.first_s, 3)}
        said |= {"tools": [use.status for answer in answers for use in answer.trajectory.tool_uses]}
        if self.config.log_text:
            said["texts"] = [self.tokenizer.decode(answer.trajectory.ids) for answer in answers]
        logger.info("%s", json.dumps(said, ensure_ascii=False))

    def keep(self, name: str, thing: KeptAnswer) -> None:
        """Keep an answer for those who ask for it later, as long as newer ones leave it a place; and record it."""
        if self.config.record:
            add_sessions(Path(self.config.record), name, thing.trajectories)
        if self.config.keep:
            self.kept[name] = thing
            while len(self.kept) > self.config.keep:
                self.kept.popitem(last=False)

    def metrics_text(self) -> str:
        self.metrics.engine += self.service.take_statistics()
        gauges = self.service.gauges()
        gauges |= {"slots": self.service.engine.config.slots, "open_requests": self.open, "kept": len(self.kept)}
        return self.metrics.text(gauges)


def _check(answer: Answer, done: asyncio.Future) -> None:
    """Refuse, late, an answer that the machinery lost."""
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("an answer was lost", exc_info=error)
        raise Refused(503, "the answer was lost by a fault of the server, which its log tells; send it again")
    if answer.finish is None:
        lost = answer.trajectory.end == End.SANDBOX_LOST
        why = "the sandbox that runs its programs was lost" if lost else "the server is closing"
        raise Refused(503, f"{why}; send the request again", code="sandbox_lost" if lost else "closing")


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of answers: of the prompt, which they share, and of it those that an earlier answer had written; drawn by
    the policy, written by tools, thought."""
    segments = [(s.role, s.stop - s.start) for answer in answers for s in answer.trajectory.segments]
    return {
        "prompt": len(answers[0].prompt),
        "cached": answers[0].cached,
        "policy": sum(answer.drawn for answer in answers),
        "tool": sum(length for role, length in segments if role == "tool"),
        "thought": sum(answer.reader.thought for answer in answers),
    }
