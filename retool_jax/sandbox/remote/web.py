"""What a server needs beside its application: a socket, an end by a signal, and an eye on clients that go away."""

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
CLOSED_REQUEST = 499  # the status of an answer that nobody reads: the client has gone
LOCAL = ("127.0.0.1", "::1", "localhost")  # hosts that only programs of this machine reach


def listen(host: str, port: int, address: str = "") -> socket.socket:
    """A socket that accepts connections; `address` is how an error calls the place. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error  # no number where a name fails
        address = address or f"{host} port {port}"
        raise UserError(f"cannot listen on {address} ({reason}); choose another") from None
    # Small writes are sent at once. Otherwise the body of an answer, or the next piece of a stream, would wait until
    # the client has acknowledged what was sent before, which takes it 40 ms. Connections inherit this.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """Where a listener's server is found."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


async def serve_until_signal(
    app: ASGIApp, listener: socket.socket, drain_s: int, told: Callable[[], object] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT comes. What has begun then has `drain_s` seconds to end.

    `told` is called on the event loop when the signal has come.
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
        loop.call_soon_threadsafe(told)
        handle_exit(number, frame)

    server.handle_exit = close
    for end in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again once it is done
        signal.signal(end, lambda *_: None)
    await server.serve(sockets=[listener])


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Do something for as long as somebody waits for it; None if nobody did to the end."""

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
