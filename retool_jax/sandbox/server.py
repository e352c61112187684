"""`python -m retool_jax.sandbox.server`: the sandbox over HTTP, in Sandbox Fusion's protocol."""

import asyncio
import hmac
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from retool_jax.errors import UserError, run_command
from retool_jax.sandbox.host.metrics import prometheus
from retool_jax.sandbox.host.pool import Sandbox, open_sandbox
from retool_jax.sandbox.host.request import MAX_FRAME_BYTES, Request
from retool_jax.sandbox.remote.fusion import Malformed, fault_response, number, read_request, text, write_result
from retool_jax.sandbox.types import TOKEN_VARIABLE, Limits, SandboxConfig, ToolResult, shown
from retool_jax.sandbox.words import help_text, read_words, word

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError as missing:
    sys.exit(f"error: the server needs {missing.name}; pip install 'retool_jax[sandbox]'")

ABOUT = """Serve the sandbox over HTTP:
    POST /run_code    Sandbox Fusion's request and answer (python only)
    POST /execute     the simple local servers' request and answer
    GET  /v1/ping     "pong"
    GET  /metrics     Prometheus"""
RETRY_AFTER_S = 1
CLOSED_REQUEST = 499  # nobody reads it: the client has gone
_CONFIG, _LIMITS = SandboxConfig(), Limits()


async def read_body(http: HTTPRequest) -> dict[str, Any]:
    """The JSON object of a request. Raises Malformed, and OverflowError if it is too large."""
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


async def run_while_connected(box: Sandbox, http: HTTPRequest, request: Request) -> ToolResult | None:
    """Run a program for as long as somebody waits for it; None if nobody did to the end."""

    async def disconnect() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.create_task(
        box.run(
            request.code,
            request.stdin,
            request.files,
            request.fetch,
            request.limits,
            show_last_expression=request.show_last_expression,
            allowed_modules=request.allowed_modules,
        )
    )
    gone = asyncio.create_task(disconnect())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        gone.cancel()
        work.cancel()  # no effect on one that is done
        await asyncio.wait((work, gone))


def is_overload(result: ToolResult) -> bool:
    """Whether another server, or a later try, may well succeed."""
    return result.status == "cancelled" or (result.status == "infra_error" and result.message.startswith("overloaded"))


def build_app(box: Sandbox, ceiling: Limits, token: str = "") -> Starlette:
    """The ASGI application over an open sandbox.

    Args:
        box: runs the programs; its configuration's limits are those of requests that name none.
        ceiling: limits that no request can exceed.
        token: what `Authorization: Bearer ...` must say on the two POST routes; empty lets everybody in.
    """
    default, modules = box.config.limits, set(box.config.allowed_modules)

    def guarded(handle: Callable[[HTTPRequest, dict], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        async def route(http: HTTPRequest) -> Response:
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
        if modules:  # what the server forbids, no request can allow
            both = modules.intersection(request.allowed_modules) if request.allowed_modules else modules
            request = replace(request, allowed_modules=tuple(both) or ("",))
        try:
            result = await run_while_connected(box, http, request)
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
        number(body, "compile_timeout", 0)  # nothing is compiled; still checked as the other fields are
        language = text(body, "language", "python")
        if language != "python":
            return JSONResponse(fault_response(f"language {language[:40]!r} is not served, python is"))
        return await answer(http, request, lambda result: JSONResponse(write_result(result)))

    async def execute(http: HTTPRequest, body: dict) -> Response:
        newer = "generated_code" in body  # the servers of this kind that say how a process ended
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
            ends = {"success": "completed", "timeout": "timeout"}
            said = {"stdout": run["stdout"], "stderr": run["stderr"], "returncode": run["return_code"]}
            said["process_status"] = ends.get(result.status, "error")
            if result.status == "infra_error":
                return JSONResponse(said | {"error": result.message}, 500)
            if result.status == "timeout" and not newer:
                return JSONResponse(said | {"error": "Timeout"}, 408)
            return JSONResponse(said)

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


@dataclass(frozen=True)
class Options:
    """The command line."""

    backend: str = word(
        "auto", "auto, or names in order of preference, with commas: gvisor, bubblewrap, process (unsafe)"
    )
    host: str = word("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = word(8080, "0 takes a free one and prints it")
    token: str = word(
        "",
        f"bearer token that requests must bring; better given as ${TOKEN_VARIABLE}, which other users of the machine "
        "cannot see",
    )
    slots: int = word(_CONFIG.slots, "programs at once; 0 is half of the cores")
    image: str = word(
        _CONFIG.image,
        "folder of the runtime (python -m retool_jax.sandbox.image); empty is the one built last, or this Python",
    )
    wall_s: float = word(_LIMITS.wall_s, "time limit of a request that names none")
    max_wall_s: float = word(60.0, "the largest one")
    memory_mb: int = word(_LIMITS.memory_mb, "memory of a program, also the largest one")
    output_bytes: int = word(_LIMITS.output_bytes, "kept of each output stream")
    processes: int = word(_LIMITS.processes, "processes and threads of a program")
    file_mb: int = word(_LIMITS.file_mb, "files of a program")
    queue_limit: int = word(_CONFIG.queue_limit, "requests that may wait; 0 is 64 a slot")
    queue_s: float = word(60.0, "how long one may wait before it is answered 503")
    modules: str = word("", "top-level modules that programs may import, with commas; empty is all")
    drain_s: int = word(65, "after SIGTERM, how long running requests may take to end")

    def __post_init__(self) -> None:
        for name, high in (("port", 65535), ("drain_s", 86400)):
            if not 0 <= getattr(self, name) <= high:
                raise UserError(f"{name} is {shown(getattr(self, name))}; it must lie between 0 and {high}")


def settings(options: Options) -> tuple[SandboxConfig, Limits]:
    """The sandbox and the ceiling that a command line asks for. Raises UserError."""
    own = {f.name: getattr(options, f.name) for f in fields(Limits) if hasattr(options, f.name)}
    limits = Limits(**own | {"raw_output_bytes": max(Limits().raw_output_bytes, options.output_bytes)})
    if options.max_wall_s < limits.wall_s:
        raise UserError(f"max_wall_s={options.max_wall_s:g} is below wall_s={limits.wall_s:g}; raise it")
    config = SandboxConfig(
        backend=tuple(filter(None, options.backend.split(","))),
        slots=options.slots,
        limits=limits,
        image=options.image,
        queue_limit=options.queue_limit,
        queue_s=options.queue_s,
        allowed_modules=tuple(filter(None, options.modules.split(","))),
    )
    return config, replace(limits, wall_s=options.max_wall_s)


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"cannot listen on {host} port {port} ({reason}); choose another") from None
    # Head and body of an answer are written one after the other; without this the body would wait until the client
    # has acknowledged the head, 40 ms later. Connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def serve(options: Options) -> None:
    """Open the sandbox and serve until SIGTERM or SIGINT; then finish what runs and close it."""
    config, ceiling = settings(options)
    token = options.token or os.environ.pop(TOKEN_VARIABLE, "")
    with listen(options.host, options.port) as listener:
        async with open_sandbox(config) as box:
            print(f"sandbox: {box.description}", flush=True)
            if not token and options.host not in ("127.0.0.1", "::1", "localhost"):
                print(f"whoever reaches {options.host} can run programs here; set ${TOKEN_VARIABLE}", flush=True)
            host = f"[{options.host}]" if ":" in options.host else options.host
            print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
            server = uvicorn.Server(
                uvicorn.Config(
                    build_app(box, ceiling, token),
                    log_level="warning",
                    access_log=False,
                    lifespan="off",
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=options.drain_s,
                )
            )
            for end in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again once it is done
                signal.signal(end, lambda *_: None)
            await server.serve(sockets=[listener])
    print("closed", flush=True)


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(help_text("python -m retool_jax.sandbox.server", ABOUT, Options))
        return
    with suppress(asyncio.CancelledError):
        asyncio.run(serve(read_words(words, Options)))


if __name__ == "__main__":
    run_command(main)
