"""What a server needs besides its application: a socket, an end by signal, and a watch on clients that disconnect."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive

from retool_jax.errors import UserError

T = TypeVar("T")
CLOSED_REQUEST = 499  # status of an answer that nobody reads, because the client has disconnected
LOCAL = ("127.0.0.1", "::1", "localhost")  # hosts that only programs on this machine can reach


def listen(host: str, port: int, address: str = "") -> socket.socket:
    """A socket that accepts connections; error messages call its place `address`. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error  # none for an unknown host name
        address = address or f"{host} port {port}"
        raise UserError(f"cannot listen on {address} ({reason}); choose another") from None
    # Send small writes at once. Otherwise the body of an answer, or the next piece of a stream, would wait until the
    # client has acknowledged the data before it, which takes 40 ms. Connections inherit this option.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """The address of a listener's server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


async def serve_until_signal(
    app: ASGIApp, listener: socket.socket, drain_s: int, on_signal: Callable[[], object] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT. Running requests then have `drain_s` seconds to end.

    `on_signal` is called on the event loop when the signal arrives.
    """
    loop = asyncio.get_running_loop()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=drain_s,
    )
    server = uvicorn.Server(config)
    handle_exit = server.handle_exit

    def close(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(on_signal)
        handle_exit(number, frame)

    server.handle_exit = close
    for end in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again once it is done
        signal.signal(end, lambda *_: None)
    await server.serve(sockets=[listener])


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None if the client disconnects first, which cancels the work."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()  # no effect on one that is done
        leaving.cancel()
        await asyncio.wait((task, leaving))
