"""JetStream's gRPC service over the server's own answers: `Decode`, which runs tools inside of a request, and
`HealthCheck`.

The messages are those of google-jetstream 0.2.2, whose clients speak to it as they are. Each response has tokens of one
kind, in the order of the row: what the policy drew is in the first sample, and what tools wrote is in the second,
behind an empty first one. So a client that reads only the first samples, as JetStream's do, gets what was drawn.

It needs google-jetstream for its messages alone: `pip install grpcio protobuf` and
`pip install --no-deps google-jetstream==0.2.2`.
"""

import asyncio
import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager

import grpc
from jetstream.core.proto import jetstream_pb2_grpc as service
from jetstream.core.proto.jetstream_pb2 import DecodeRequest, DecodeResponse, HealthCheckRequest, HealthCheckResponse

from retool_jax.engine.conversation import SamplingParams
from retool_jax.errors import UserError
from retool_jax.rollout.trajectory import Trajectory
from retool_jax.sandbox.types import shown
from retool_jax.serving.answer import Drawn
from retool_jax.serving.messages import messages_of
from retool_jax.serving.reader import Characters
from retool_jax.serving.requests import Refused
from retool_jax.serving.server import KeptAnswer, Server, Visit, Wish
from retool_jax.tokens.tokenizer import Tokenizer

PATH = "/jetstream_proto.Orchestrator/Decode"
GONE = 499  # as over HTTP: the client went away
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_LAST_WORDS_S = 1  # for refusals that are under way when the last answer has ended
Sample = DecodeResponse.StreamContent.Sample
logger = logging.getLogger(__name__)


@asynccontextmanager
async def listening(server: Server, token: str = "") -> AsyncIterator[tuple[int, Callable[[], object]]]:
    """Answer on `serve.grpc_port` until the block ends: the port, and a function that begins to close it.

    From then on nobody is let in, and answers that have begun have `serve.drain_s` seconds to end.

    Args:
        server: answers.
        token: what the metadata `authorization: Bearer ...` must say; empty lets everybody in.

    Raises:
        UserError: the address cannot be listened on.
    """
    config = server.config
    host = f"[{config.host}]" if ":" in config.host else config.host
    limits = [("grpc.max_receive_message_length", config.body_kb * 1024), ("grpc.so_reuseport", 0)]
    rpc = grpc.aio.server(options=limits)
    orchestrator = Orchestrator(server, token)
    service.add_OrchestratorServicer_to_server(orchestrator, rpc)
    try:
        port = rpc.add_insecure_port(f"{host}:{config.grpc_port}")
    except RuntimeError:
        raise UserError(
            f"cannot listen on serve.host={config.host} serve.grpc_port={config.grpc_port}; choose another"
        ) from None
    await rpc.start()
    closing: list[asyncio.Task] = []

    async def close() -> None:
        # When gRPC is told to stop, a request that has just come ends as CANCELLED, and clients do not send it again.
        # So it listens until all answers have ended, and requests that come meanwhile are refused with a status.
        if orchestrator.answering:
            await asyncio.wait(orchestrator.answering, timeout=config.drain_s)
        await rpc.stop(_LAST_WORDS_S)

    def begin_to_close() -> None:
        server.closing = True
        closing.append(asyncio.create_task(close()))

    try:
        yield port, begin_to_close
    finally:
        if not closing:
            begin_to_close()
        await asyncio.gather(*closing)


class Orchestrator(service.OrchestratorServicer):
    """The service. What is refused over HTTP is refused here, with the status that gRPC has for it.

    Attributes:
        answering: tasks of requests that were let in.
    """

    def __init__(self, server: Server, token: str) -> None:
        self._server, self._expected = server, f"Bearer {token}".encode() if token else b""
        self.answering: set[asyncio.Task] = set()

    async def HealthCheck(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> HealthCheckResponse:
        return HealthCheckResponse(is_live=self._server.service.working and not self._server.closing)

    async def Decode(self, request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        """Write the answer as it comes. A client that goes away cancels this, and with it the conversation."""
        status = GONE
        try:
            self._authorize(context)
            self._server.admit()
            self.answering.add(task := asyncio.current_task())
            try:
                await self._answer(request, context)
            finally:
                self.answering.discard(task)
                self._server.leave()
            status = 200
        except Refused as refused:
            status = refused.status
            code = grpc.StatusCode.DEADLINE_EXCEEDED if refused.code == "timeout" else _STATUS.get(status)
            await context.abort(code or grpc.StatusCode.UNAVAILABLE, str(refused))
        except Exception:  # a fault of the server's own, which ends no other request; or nobody can be written to
            if not context.cancelled():
                status = 503
                logger.exception("a request failed")
                told = "the request failed by a fault of the server, which its log tells"
                await context.abort(grpc.StatusCode.UNAVAILABLE, told)
        finally:
            self._server.metrics.requests[PATH, status] += 1

    def _authorize(self, context: grpc.aio.ServicerContext) -> None:
        given = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), "")
        if self._expected and not hmac.compare_digest(given.encode(), self._expected):
            raise Refused(401, "a bearer token is needed; send it as metadata, authorization: Bearer ...", code="token")

    async def _answer(self, request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        """Run the conversation of a request and write its tokens. Raises Refused."""
        server, visit = self._server, Visit(f"decode-{uuid.uuid4().hex}", PATH)
        _refuse_unserved(request)
        # JetStream is greedy, and its requests have no other way of drawing; so their seed does not matter.
        wish = Wish(SamplingParams(temperature=0.0), 0, request.max_tokens or None, tools=server.tools)
        with_text = request.HasField("text_content")
        if with_text:
            messages = messages_of(server.tokenizer, [{"role": "user", "content": request.text_content.text}])
            prompt = await server.prompt(messages, wish)
        else:
            messages, prompt = [], _ids_of(request, len(server.tokenizer))
        (answer,) = server.answers(visit, messages, prompt, wish)
        await context.send_initial_metadata((("retool-id", visit.id),))
        row = Row(answer.trajectory, server.tokenizer, with_text)
        async with aclosing(server.run(visit, [answer])) as run:
            async for _, happened in run:
                for response in row.responses(happened.ids if isinstance(happened, Drawn) else []):
                    await context.write(response)
        context.set_trailing_metadata((("retool-finish", answer.finish or ""),))
        server.keep(visit.id, KeptAnswer([answer.trajectory]))


class Row:
    """A conversation's ids behind its prompt as responses, in their order.

    Args:
        trajectory: which grows meanwhile, by whole turns and by what tools wrote.
        with_text: whether samples have the text of their ids too.
    """

    def __init__(self, trajectory: Trajectory, tokenizer: Tokenizer, with_text: bool) -> None:
        self._trajectory, self._tokenizer, self._with_text = trajectory, tokenizer, with_text
        self._sent = len(trajectory.ids)
        self._characters = Characters(tokenizer)

    def responses(self, drawn: Sequence[int]) -> Iterator[DecodeResponse]:
        """What tools have written behind what was sent, and ids that the policy drew next."""
        yield from self._written()
        if drawn:
            self._sent += len(drawn)
            yield _response(Sample(token_ids=drawn, text=self._read(drawn)))
        yield from self._written()

    def _written(self) -> Iterator[DecodeResponse]:
        """A listener may be behind: the trajectory has this segment, and not all before it was sent."""
        for segment in self._trajectory.segments:
            if segment.role == "tool" and segment.start == self._sent:
                ids = self._trajectory.ids[segment.start : segment.stop]
                self._sent = segment.stop
                text = self._tokenizer.decode(ids) if self._with_text else ""
                yield _response(Sample(), Sample(token_ids=ids, text=text))

    def _read(self, ids: Sequence[int]) -> str:
        """The text of drawn ids without marks of a turn's end."""
        if not self._with_text:
            return ""
        characters, stops = self._characters, self._tokenizer.stop_ids
        return "".join(characters.rest() if index in stops else characters.take(index) for index in ids)


def _response(*samples: Sample) -> DecodeResponse:
    return DecodeResponse(stream_content=DecodeResponse.StreamContent(samples=samples))


def _refuse_unserved(request: DecodeRequest) -> None:
    """Refuse what would change the answer and is not served; `priority` is not read by JetStream either."""
    if request.session_cache:
        raise Refused(400, f"session_cache is {shown(request.session_cache)}, which is not served; leave it out")
    if request.max_tokens < 0:
        limit = "at least 1, or 0 for as many as there is room for"
        raise Refused(400, f"max_tokens is {request.max_tokens}; it must be {limit}")
    if request.WhichOneof("content") is None:
        raise Refused(400, "the request has no content; send text_content or token_content")


def _ids_of(request: DecodeRequest, most: int) -> list[int]:
    """A prompt in ids, as the client's template wrote it. Raises Refused."""
    ids = list(request.token_content.token_ids)
    if not ids or not 0 <= min(ids) <= max(ids) < most:
        found = f"the ids {min(ids)} to {max(ids)}" if ids else "no ids"
        raise Refused(400, f"token_content has {found}; it must have ids between 0 and {most - 1}")
    return ids
