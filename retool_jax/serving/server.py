"""The server behind the endpoints: admits requests, runs their answers on the scheduler, and keeps finished ones."""

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
from retool_jax.serving.answer import Answer, DrawnTokens, Event, ToolEnded
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

_SEED_STEP = 2654435761  # difference of the seeds of two choices of a request
_TOO_LONG = -1  # instead of an answer's number: the time limit is reached
_PIECE_S = 0.02  # time between two writes of a stream, so that a write has the tokens of several dispatches
_SHORT_PROMPT = 4000  # characters; a shorter prompt is encoded faster than it is handed to a thread

Happened = tuple[int, Event | None]


@dataclass
class RequestInfo:
    """One request for an answer: its id, times and state, for the log and for keeping the answer."""

    id: str
    path: str
    keep: bool = True
    container: str = ""  # the container of its tools' states; empty: the states end with the answer
    began: float = field(default_factory=time.perf_counter)
    first_s: float | None = None  # seconds until its first token
    fault: str = ""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


@dataclass
class AnswerOptions:
    """What a request asks for, beside its prompt: sampling, limits and tools."""

    sampling: SamplingParams
    seed: int | None
    max_tokens: int | None
    stops: tuple[str, ...] = ()
    functions: dict[str, dict] = field(default_factory=dict)  # the client's, by name
    tools: Toolbox | None = None  # the server's


@dataclass
class KeptAnswer:
    """A request's finished answers: a conversation for each choice, and, of a response, what the next one needs to
    continue it."""

    trajectories: list[Trajectory]
    options: AnswerOptions | None = None
    calls: list[str] = field(default_factory=list)  # ids of the calls that the client has to answer
    turn: list[str] = field(default_factory=list)  # ids of all calls of the last turn; "" for calls that are not its
    instructions: str | None = None
    tools: list = field(default_factory=list)  # as the request gave them
    container: str = ""


class Server:
    """Answers requests with one engine. Everything runs on the event loop's thread.

    Attributes:
        model: the model's name for clients.
        closing: whether new requests are refused.
        kept: finished answers by id, the newest last.
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
        self.open = 0  # number of requests that are being answered
        self.kept: OrderedDict[str, KeptAnswer] = OrderedDict()
        box = tools.sandbox.config if tools and tools.sandbox else SandboxConfig()
        stays = any(tool.lifetime == "trajectory" for tool in tools.tools.values()) if tools else False
        # Idle containers may hold half of the interpreters; the other half is for answers that have none yet.
        self.containers = Containers(box.sessions // 2 if stays else config.keep, box.session_ttl_s)
        self._grammar = GRAMMARS[rollout.grammar]
        if config.record:
            begin_record(Path(config.record))

    # --- from a request to its conversations ---

    def admit(self) -> None:
        """Count a request in, or refuse it. After each `admit` the caller must call `leave` in the end."""
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

    async def prompt(self, messages: list[dict], options: AnswerOptions) -> list[int]:
        """The ids of a prompt with the schemas of its tools, up to the header of the policy's turn."""
        schemas = [*(options.tools.schemas if options.tools else []), *options.functions.values()]

        def encode() -> list[int]:
            if not schemas:
                return prompt_ids(self.tokenizer, messages)
            return self._grammar.prompt(self.tokenizer, messages, schemas, self.rollout.tool_prompt)

        try:
            short = sum(len(str(message)) for message in messages) + len(str(schemas)) < _SHORT_PROMPT
            return encode() if short else await asyncio.to_thread(encode)
        except UserError as error:
            raise Refused(400, str(error), "messages") from None

    def answers(
        self, info: RequestInfo, messages: Sequence[dict], prompt: list[int], options: AnswerOptions, count: int = 1
    ) -> list[Answer]:
        """`count` conversations that begin with the ids of a prompt, for `run` or `batches`.

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
        seed = secrets.randbits(32) if options.seed is None else options.seed
        tools = options.tools or (Toolbox([]) if options.functions else None)  # an empty one answers unreadable calls
        grammar = self._grammar if tools else None
        most_drawn = room if options.max_tokens is None else options.max_tokens
        problem, how = Problem(info.id, tuple(messages), ""), options.sampling
        answers = []
        for index in range(count):
            request = (seed + index * _SEED_STEP) % 2**32
            sample = Sample(problem, request, how.temperature, how.top_p, how.top_k)
            dialogue = Dialogue(sample, prompt, self.tokenizer, tools, room, self.rollout)
            answers.append(Answer(dialogue, self.tokenizer, grammar, most_drawn, options.stops, options.functions))
        return answers

    @cached_property
    def score_prompt(self) -> PromptScorer:
        """Scores a prompt's own tokens."""
        return PromptScorer(self.service.engine)

    # --- answering ---

    async def run(self, info: RequestInfo, answers: Sequence[Answer]) -> AsyncGenerator[Happened, None]:
        """`batches`, one event at a time."""
        async with aclosing(self.batches(info, answers)) as batches:
            async for batch in batches:
                for happened in batch:
                    yield happened

    async def batches(self, info: RequestInfo, answers: Sequence[Answer]) -> AsyncGenerator[list[Happened], None]:
        """Events of the answers, each with its answer's number; None instead of an event is the end of that answer.

        Events within `_PIECE_S` of each other come in one batch, so that a stream is written once for all of them. The
        first tokens, events after a pause, and the end of an answer come at once. Closing this generator early drops
        the answers: their rows are freed, and their programs are stopped.

        Raises:
            Refused: an infrastructure fault, or the time limit.
        """
        loop, woken, sent_s = asyncio.get_running_loop(), asyncio.Event(), 0.0
        happened: list[Happened] = []

        def add(number: int, event: Event | None) -> None:
            if event is None:
                woken.set()
            elif not happened:
                loop.call_at(sent_s + _PIECE_S, woken.set)
            happened.append((number, event))

        done = []
        left_s = info.began + self.config.answer_s - time.perf_counter()
        too_long = loop.call_later(max(left_s, 0), add, _TOO_LONG, None)
        kept = self.containers.take(info.container) if info.container else None
        try:
            for number, answer in enumerate(answers):
                if kept is not None:
                    answer.dialogue.use_states(kept)
                answer.on_event = partial(add, number)
                done.append(self._submit(answer))
                done[-1].add_done_callback(lambda _, number=number: add(number, None))
            left = len(answers)
            while left:
                await woken.wait()
                woken.clear()
                for answer in answers:
                    answer.read()
                sent_s, batch = loop.time(), happened[:]
                happened.clear()
                for number, event in batch:
                    if number == _TOO_LONG:
                        raise Refused(
                            503,
                            f"the answer took more than {self.config.answer_s:g} s (serve.answer_s); ask for fewer"
                            " tokens, or send it again when the server is less busy",
                            code="timeout",
                        )
                    self._count(info, event)
                    if event is None:
                        left -= 1
                        _check(answers[number], done[number])
                yield batch
        except Refused as refused:
            info.fault = refused.code or "fault"
            raise
        finally:
            too_long.cancel()
            for future in done:
                future.cancel()
            for answer in answers:
                await answer.close()
            if info.container:
                self.containers.give(info.container, lost=any(answer.finish is None for answer in answers))
            self._record(info, answers)

    def _submit(self, answer: Answer) -> asyncio.Future:
        try:
            return self.service.submit(answer, answer.dialogue.sampling, answer.on_tokens)
        except RuntimeError:
            raise Refused(503, "the engine takes no conversations; send the request to another server") from None

    def _count(self, info: RequestInfo, event: Event | None) -> None:
        if isinstance(event, DrawnTokens) and info.first_s is None:
            info.first_s = info.seconds
            self.metrics.first_s.add(info.first_s)
        elif isinstance(event, ToolEnded):
            self.metrics.tools[event.use.tool, event.use.status] += 1
            self.metrics.tool_s.add(event.use.wall_s)

    def _record(self, info: RequestInfo, answers: Sequence[Answer]) -> None:
        """Count an answer, and log how it ended."""
        self.metrics.answer_s.add(info.seconds)
        usage = usage_of(answers)
        for kind, tokens in usage.items():
            if kind not in ("cached", "thought"):
                self.metrics.tokens[kind] += tokens
        ends = [answer.finish or info.fault or "gone" for answer in answers]
        self.metrics.ends.update(ends)
        entry: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "id": info.id}
        entry |= {"path": info.path, "ends": ends, "tokens": usage, "seconds": round(info.seconds, 3)}
        entry |= {"first_token_s": info.first_s and round(info.first_s, 3)}
        entry |= {"tools": [use.status for answer in answers for use in answer.trajectory.tool_uses]}
        if self.config.log_text:
            entry["texts"] = [self.tokenizer.decode(answer.trajectory.ids) for answer in answers]
        logger.info("%s", json.dumps(entry, ensure_ascii=False))

    def keep(self, name: str, thing: KeptAnswer) -> None:
        """Record an answer, and keep it until `serve.keep` newer ones have replaced it."""
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
    """Raise Refused if an answer was lost by an infrastructure fault."""
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.error("an answer was lost", exc_info=error)
        raise Refused(503, "the answer was lost by a fault of the server (see its log); send the request again")
    if answer.finish is None:
        lost = answer.trajectory.end == End.SANDBOX_LOST
        why = "the sandbox that runs its programs was lost" if lost else "the server is closing"
        raise Refused(503, f"{why}; send the request again", code="sandbox_lost" if lost else "closing")


def usage_of(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of answers: of the prompt, which they share; of it those that were cached; drawn by the policy; written by
    tools; drawn while thinking."""
    segments = [(s.role, s.stop - s.start) for answer in answers for s in answer.trajectory.segments]
    return {
        "prompt": len(answers[0].prompt),
        "cached": answers[0].cached,
        "policy": sum(answer.drawn for answer in answers),
        "tool": sum(length for role, length in segments if role == "tool"),
        "thought": sum(answer.reader.thought for answer in answers),
    }
