"""The server as an HTTP application: OpenAI's endpoints, trajectories, health and metrics."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from retool_jax.sandbox.remote.web import CLOSED_REQUEST, while_connected
from retool_jax.serving.chat import PATH as CHAT
from retool_jax.serving.chat import Chat
from retool_jax.serving.page import page_routes
from retool_jax.serving.requests import Refused, read_body
from retool_jax.serving.responses import PATH as RESPONSES
from retool_jax.serving.responses import Responses
from retool_jax.serving.server import Server
from retool_jax.serving.wire import Events, as_json

TRAJECTORIES = "/v1/trajectories"
RETRY_AFTER_S = "1"
logger = logging.getLogger(__name__)

Handler = Callable[[HTTPRequest], Awaitable[Response]]


def build_app(server: Server, token: str = "") -> Starlette:
    """The ASGI application.

    Args:
        server: answers the requests.
        token: the bearer token that every path below `/v1` requires; empty: none. Pages of other sites are always
            refused.
    """
    expected = f"Bearer {token}".encode()

    def guarded(path: str, handle: Handler) -> Handler:
        async def route(http: HTTPRequest) -> Response:
            try:
                # A page of another site can make a browser send a request here, which could run a program.
                if http.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                    raise Refused(403, "a browser sent this for a page of another site; ask from the server's own page")
                given = http.headers.get("authorization", "").encode()
                if token and not hmac.compare_digest(given, expected):
                    raise Refused(401, "a bearer token is needed; send it as Authorization: Bearer ...", code="token")
                response = await handle(http)
            except Refused as refused:
                response = refusal(refused)
            except ClientDisconnect:
                response = Response(status_code=CLOSED_REQUEST)
            except RecursionError:
                response = refusal(Refused(400, "the body is nested too deeply; send a flatter one"))
            except Exception:  # a bug must not end other requests
                logger.exception("a request failed")
                response = refusal(Refused(503, "the request failed by a fault of the server; see its log"))
            server.metrics.requests[path, response.status_code] += 1
            return response

        return route

    def answering(kind: type[Chat] | type[Responses]) -> Handler:
        """The handler of an endpoint: `begin` may refuse a request, then `events` or `whole` answers it."""

        async def handle(http: HTTPRequest) -> Response:
            body = await read_body(http, server.config.body_kb * 1024)
            request = kind(server, body)
            server.admit()
            with ExitStack() as end:
                end.callback(server.leave)
                await request.begin()
                if request.stream:
                    return Events(request.events(), end.pop_all().close)  # leaves when the stream has ended
                result = await while_connected(http.receive, request.whole())
                return as_json(result) if result is not None else Response(status_code=CLOSED_REQUEST)

        return handle

    async def trajectory(http: HTTPRequest) -> Response:
        name = http.path_params["name"]
        kept = server.kept.get(name)
        if kept is None:
            raise Refused(
                404,
                f"no answer {name[:100]!r} is kept: the newest {server.config.keep} are (serve.keep), unless their"
                ' request says "store": false',
                "id",
            )
        records = [each.record(server.tokenizer, versions=each.versions) for each in kept.trajectories]
        if http.query_params.get("tokens") == "true":
            records = [
                each | {"tokens": [server.tokenizer.decode([index]) for index in each["ids"]]} for each in records
            ]
        return as_json({"id": name, "object": "list", "data": records})

    async def models(_: HTTPRequest) -> Response:
        about = {"id": server.model, "object": "model", "created": server.created, "owned_by": "retool_jax"}
        tools = list(server.tools.names) if server.tools else []
        about |= {"max_model_len": server.service.engine.config.max_length, "tools": tools}
        return as_json({"object": "list", "data": [about]})

    async def health(_: HTTPRequest) -> Response:
        working = server.service.working and not server.closing
        return as_json({"status": "ok" if working else "closing"}, 200 if working else 503)

    async def metrics(_: HTTPRequest) -> Response:
        return PlainTextResponse(server.metrics_text(), media_type="text/plain; version=0.0.4")

    async def unknown(http: HTTPRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        where = ", ".join(route.path for route in routes)
        return refusal(Refused(status, f"{http.method} {http.url.path[:100]} is not served; there are {where}"))

    routes = [
        Route(CHAT, guarded(CHAT, answering(Chat)), methods=["POST"]),
        Route(RESPONSES, guarded(RESPONSES, answering(Responses)), methods=["POST"]),
        Route("/v1/models", guarded("/v1/models", models)),
        Route(f"{TRAJECTORIES}/{{name}}", guarded(TRAJECTORIES, trajectory)),
        Route("/health", health),
        Route("/metrics", metrics),
        *page_routes(),
    ]
    return Starlette(routes=routes, exception_handlers={404: unknown, 405: unknown})


def refusal(refused: Refused) -> Response:
    """A refusal as an HTTP response."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": RETRY_AFTER_S}}
    headers[503] = headers[429]
    return as_json(refused.body(), refused.status, headers.get(refused.status))
