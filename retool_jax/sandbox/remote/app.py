"""The sandbox as an HTTP application, with the protocols of Sandbox Fusion and of the simple local servers."""

import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from retool_jax.sandbox.host.metrics import prometheus
from retool_jax.sandbox.host.pool import Sandbox
from retool_jax.sandbox.host.request import MAX_FRAME_BYTES, Request
from retool_jax.sandbox.remote.fusion import Malformed, fault_response, number, read_request, text, write_result
from retool_jax.sandbox.remote.web import CLOSED_REQUEST, while_connected
from retool_jax.sandbox.types import Limits, ToolResult

RETRY_AFTER_S = 1


async def read_body(http: HTTPRequest) -> dict[str, Any]:
    """The JSON object in a request's body. Raises Malformed, or OverflowError if it is too large."""
    data = bytearray()
    async for part in http.stream():
        data += part
        if len(data) > MAX_FRAME_BYTES:
            raise OverflowError
    try:
        body = json.loads(bytes(data).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed("", f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(body, dict):
        raise Malformed("", f"the body is a {type(body).__name__}, not an object")
    return body


def is_overload(result: ToolResult) -> bool:
    """Whether another server, or a later attempt, may succeed."""
    return result.status == "cancelled" or (result.status == "infra_error" and result.message.startswith("overloaded"))


def build_app(box: Sandbox, ceiling: Limits, token: str = "") -> Starlette:
    """The ASGI application over an open sandbox.

    Args:
        box: runs the programs; requests that name no limits get those of its configuration.
        ceiling: the largest limits that a request can get.
        token: what `Authorization: Bearer ...` must contain on the two POST routes; empty: everybody may call, except
            pages of other sites.
    """
    default, modules = box.config.limits, set(box.config.allowed_modules)

    def guarded(handle: Callable[[HTTPRequest, dict], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        async def route(http: HTTPRequest) -> Response:
            # A page of any site can make a browser send a request here, which would run its program.
            if http.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                return JSONResponse({"detail": "a browser sent this for a page of another site"}, 403)
            given = http.headers.get("authorization", "").encode()
            if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
                return JSONResponse({"detail": "a bearer token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
            try:
                return await handle(http, await read_body(http))
            except Malformed as fault:
                return JSONResponse(fault.detail(), 422)
            except OverflowError:
                return JSONResponse({"detail": f"the body is larger than {MAX_FRAME_BYTES} bytes"}, 413)
            except ClientDisconnect:
                return Response(status_code=CLOSED_REQUEST)

        return route

    async def answer(http: HTTPRequest, request: Request, write: Callable[[ToolResult], Response]) -> Response:
        if modules:  # a request cannot allow what the server forbids
            both = modules.intersection(request.allowed_modules) if request.allowed_modules else modules
            request = replace(request, allowed_modules=tuple(both) or ("",))
        try:
            result = await while_connected(http.receive, box.serve(request))
        except RuntimeError:  # closed while the request came in
            result = ToolResult("cancelled", message="the sandbox was closed")
        if result is None:
            return Response(status_code=CLOSED_REQUEST)
        if is_overload(result):
            detail = fault_response(result.message) | {"detail": result.message}
            return JSONResponse(detail, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return write(result)

    async def run_code(http: HTTPRequest, body: dict) -> Response:
        request = read_request(body, default, ceiling)
        number(body, "compile_timeout", 0)  # nothing is compiled, but the field is checked like the others
        language = text(body, "language", "python")
        if language != "python":
            return JSONResponse(fault_response(f"language {language[:40]!r} is not served, python is"))
        return await answer(http, request, lambda result: JSONResponse(write_result(result)))

    async def execute(http: HTTPRequest, body: dict) -> Response:
        newer = "generated_code" in body  # the newer servers of this kind, which report how a process ended
        standard = {
            "code": text(body, "generated_code" if newer else "code"),
            "stdin": text(body, "std_input" if newer else "stdin", ""),
            "run_timeout": number(body, "timeout", default.wall_s),
        }
        language = text(body, "language", "python")
        if language not in ("python", "ipython"):
            return JSONResponse({"error": f"Unsupported language: {language[:40]!r}"}, 400)
        request = read_request(standard, default, ceiling)

        def write(result: ToolResult) -> Response:
            run = write_result(result)["run_result"] or {"stdout": "", "stderr": result.message, "return_code": None}
            statuses = {"success": "completed", "timeout": "timeout"}
            reply = {"stdout": run["stdout"], "stderr": run["stderr"], "returncode": run["return_code"]}
            reply["process_status"] = statuses.get(result.status, "error")
            if result.status == "infra_error":
                return JSONResponse(reply | {"error": result.message}, 500)
            if result.status == "timeout" and not newer:
                return JSONResponse(reply | {"error": "Timeout"}, 408)
            return JSONResponse(reply)

        return await answer(http, request, write)

    async def ping(_: HTTPRequest) -> Response:
        accepting = box.gauges()["accepting"]  # 0 while no worker can be started
        return JSONResponse("pong") if accepting else JSONResponse("no worker starts", 503)

    async def metrics(_: HTTPRequest) -> Response:
        text = prometheus(box.metrics, box.gauges())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/run_code", guarded(run_code), methods=["POST"]),
            Route("/execute", guarded(execute), methods=["POST"]),
            Route("/v1/ping", ping),
            Route("/metrics", metrics),
        ]
    )
