"""JetStream's gRPC service over the server's answers: `Decode`, which runs tools inside of a request, and
`HealthCheck`.

The messages are those of google-jetstream 0.2.2, whose clients work unchanged. Each response has tokens of one kind, in
the order of the row: tokens of the policy are in the first sample; tokens of tools are in the second, after an empty
first one. JetStream's clients read only the first sample, so they get what the policy drew.

google-jetstream is needed only for its messages: `pip install grpcio protobuf` and
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
from retool_jax.serving.answer import DrawnTokens
from retool_jax.serving.messages import messages_of
from retool_jax.serving.reader import Characters
from retool_jax.serving.requests import Refused
from retool_jax.serving.server import AnswerOptions, KeptAnswer, RequestInfo, Server
from retool_jax.tokens.tokenizer import Tokenizer

PATH = "/jetstream_proto.Orchestrator/Decode"
GONE = 499  # as over HTTP: the client closed the request
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_LAST_REFUSALS_S = 1  # time for refusals that are under way when the last answer has ended
Sample = DecodeResponse.StreamContent.Sample
logger = logging.getLogger(__name__)


@asynccontextmanager
async def listening(server: Server, token: str = "") -> AsyncIterator[tuple[int, Callable[[], object]]]:
    """Answer on `serve.grpc_port` until the block ends. Yields the port, and a function that begins to close it.

    Once closing has begun, new requests are refused, and open answers have `serve.drain_s` seconds to end.

    Args:
        server: answers the requests.
        token: the token that the metadata `authorization: Bearer ...` must have; empty: none is needed.

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
        # After `stop` gRPC ends a request that has just arrived with CANCELLED, and clients do not retry it. So it goes
        # on listening until all answers have ended, and new requests are refused with a status.
        if orchestrator.answering:
            await asyncio.wait(orchestrator.answering, timeout=config.drain_s)
        await rpc.stop(_LAST_REFUSALS_S)

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
    """The gRPC service. It refuses the same requests as HTTP, with gRPC's status codes.

    Attributes:
        answering: tasks of the requests that were admitted.
    """

    def __init__(self, server: Server, token: str) -> None:
        self._server, self._expected = server, f"Bearer {token}".encode() if token else b""
        self.answering: set[asyncio.Task] = set()

    async def HealthCheck(self, request: HealthCheckRequest, context: grpc.aio.ServicerContext) -> HealthCheckResponse:
        return HealthCheckResponse(is_live=self._server.service.working and not self._server.closing)

    async def Decode(self, request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        """Stream the answer. If the client closes the request, this is cancelled, and with it the conversation."""
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
        except Exception:  # a bug, which must not end other requests; or the client cannot be reached
            if not context.cancelled():
                status = 503
                logger.exception("a request failed")
                message = "the request failed by a fault of the server; see its log"
                await context.abort(grpc.StatusCode.UNAVAILABLE, message)
        finally:
            self._server.metrics.requests[PATH, status] += 1

    def _authorize(self, context: grpc.aio.ServicerContext) -> None:
        given = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), "")
        if self._expected and not hmac.compare_digest(given.encode(), self._expected):
            raise Refused(401, "a bearer token is needed; send it as metadata, authorization: Bearer ...", code="token")

    async def _answer(self, request: DecodeRequest, context: grpc.aio.ServicerContext) -> None:
        """Run the conversation of a request and send its tokens. Raises Refused."""
        server, info = self._server, RequestInfo(f"decode-{uuid.uuid4().hex}", PATH)
        _refuse_unserved(request)
        # JetStream's requests have no sampling parameters: its decoding is greedy, so the seed does not matter.
        options = AnswerOptions(SamplingParams(temperature=0.0), 0, request.max_tokens or None, tools=server.tools)
        with_text = request.HasField("text_content")
        if with_text:
            messages = messages_of(server.tokenizer, [{"role": "user", "content": request.text_content.text}])
            prompt = await server.prompt(messages, options)
        else:
            messages, prompt = [], _ids_of(request, len(server.tokenizer))
        (answer,) = server.answers(info, messages, prompt, options)
        await context.send_initial_metadata((("retool-id", info.id),))
        row = Row(answer.trajectory, server.tokenizer, with_text)
        async with aclosing(server.run(info, [answer])) as run:
            async for _, happened in run:
                for response in row.responses(happened.ids if isinstance(happened, DrawnTokens) else []):
                    await context.write(response)
        context.set_trailing_metadata((("retool-finish", answer.finish or ""),))
        server.keep(info.id, KeptAnswer([answer.trajectory]))


class Row:
    """A conversation's ids after its prompt, as responses in their order.

    Args:
        trajectory: the conversation's; it grows by whole turns and by what tools wrote.
        with_text: whether samples also have the text of their ids.
    """

    def __init__(self, trajectory: Trajectory, tokenizer: Tokenizer, with_text: bool) -> None:
        self._trajectory, self._tokenizer, self._with_text = trajectory, tokenizer, with_text
        self._sent = len(trajectory.ids)
        self._characters = Characters(tokenizer)

    def responses(self, drawn: Sequence[int]) -> Iterator[DecodeResponse]:
        """Segments of tools that come next in the row, then these ids of the policy, then segments of tools again."""
        yield from self._tool_segments()
        if drawn:
            self._sent += len(drawn)
            yield _response(Sample(token_ids=drawn, text=self._text(drawn)))
        yield from self._tool_segments()

    def _tool_segments(self) -> Iterator[DecodeResponse]:
        """Tool segments that begin where the sent ids end. Later ones wait: ids before them were not sent yet."""
        for segment in self._trajectory.segments:
            if segment.role == "tool" and segment.start == self._sent:
                ids = self._trajectory.ids[segment.start : segment.stop]
                self._sent = segment.stop
                text = self._tokenizer.decode(ids) if self._with_text else ""
                yield _response(Sample(), Sample(token_ids=ids, text=text))

    def _text(self, ids: Sequence[int]) -> str:
        """The text of drawn ids without the marks that end a turn."""
        if not self._with_text:
            return ""
        characters, stops = self._characters, self._tokenizer.stop_ids
        return "".join(characters.rest() if index in stops else characters.take(index) for index in ids)


def _response(*samples: Sample) -> DecodeResponse:
    return DecodeResponse(stream_content=DecodeResponse.StreamContent(samples=samples))


def _refuse_unserved(request: DecodeRequest) -> None:
    """Refuse fields that would change the answer and are not served. `priority` is ignored, as JetStream does."""
    if request.session_cache:
        raise Refused(400, f"session_cache is {shown(request.session_cache)}, which is not served; leave it out")
    if request.max_tokens < 0:
        limit = "at least 1, or 0 for as many as there is room for"
        raise Refused(400, f"max_tokens is {request.max_tokens}; it must be {limit}")
    if request.WhichOneof("content") is None:
        raise Refused(400, "the request has no content; send text_content or token_content")


def _ids_of(request: DecodeRequest, most: int) -> list[int]:
    """The prompt of a request that gives ids, written with the client's own template. Raises Refused."""
    ids = list(request.token_content.token_ids)
    if not ids or not 0 <= min(ids) <= max(ids) < most:
        found = f"the ids {min(ids)} to {max(ids)}" if ids else "no ids"
        raise Refused(400, f"token_content has {found}; it must have ids between 0 and {most - 1}")
    return ids
