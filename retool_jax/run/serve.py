"""A server from its checkpoint to its last answer."""

import asyncio
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from retool_jax.engine.scheduler import Service
from retool_jax.errors import UserError
from retool_jax.run.build import (
    compiled_ahead,
    engine_of,
    mesh_of,
    model_for,
    sandbox_config,
    sandbox_lines,
    told_of_memory,
    warm_up,
)
from retool_jax.run.schema import ServeRun
from retool_jax.run.weights import load_weights
from retool_jax.serving.config import ServeConfig
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.toolbox import load_tools

try:
    import uvicorn

    from retool_jax.serving.app import build_app
    from retool_jax.serving.server import Server
except ModuleNotFoundError as missing:
    sys.exit(f"error: the server needs {missing.name}; pip install 'retool_jax[serve]'")

TOKEN_VARIABLE = "RETOOL_SERVE_TOKEN"


async def serve(run: ServeRun) -> None:
    """Load a checkpoint and answer requests until SIGTERM or SIGINT; then finish what has begun, and refuse the rest.

    Raises:
        UserError: no checkpoint, no sandbox, or an address that cannot be listened on, all before a request is taken.
    """
    token = os.environ.pop(TOKEN_VARIABLE, "")
    rpc = rpc_module() if run.serve.grpc_port is not None else None
    tokenizer = load_tokenizer(run.tokenizer)
    run = replace(run, model=model_for(run, tokenizer))
    tools = load_tools(run.tools)
    mesh = mesh_of(run)
    log = logging.getLogger("retool_jax.serving")  # one line for each answer, and what went wrong
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(listen(run.serve))
        stack.enter_context(told_of_memory(run))
        stack.enter_context(compiled_ahead(run, mesh, tokenizer))
        if tools:
            await stack.enter_async_context(tools.open(sandbox_config(run)))
        engine = engine_of(run, load_weights(run, Path(run.init_from)), mesh, tokenizer)
        print("\n".join(sandbox_lines(tools.sandbox if tools else None)), flush=True)
        warm_up(engine)
        gc.freeze()  # what is there now stays; to look through it for garbage would hold up every stream
        service = await stack.enter_async_context(Service(engine, tools.at_once if tools else 0))
        name = run.serve.name or Path(run.init_from).name
        server = Server(service, tokenizer, tools, run.rollout, run.serve, name)
        host, port = run.serve.host, listener.getsockname()[1]
        if not token and host not in ("127.0.0.1", "::1", "localhost"):
            print(f"whoever reaches {host} can ask and run programs here; set ${TOKEN_VARIABLE}", flush=True)
        close_rpc = nothing
        if rpc:
            rpc_port, close_rpc = await stack.enter_async_context(rpc.listening(server, token))
            print(f"JetStream's gRPC: {host}:{rpc_port}", flush=True)
        web = uvicorn.Server(
            uvicorn.Config(
                build_app(server, token),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=run.serve.drain_s,
            )
        )
        print(f"serving {name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        await until_told(web, server, listener, close_rpc)
        server.containers.close()
    print("closed", flush=True)


def rpc_module() -> ModuleType:
    """`serving.grpc`. Raises UserError where what it needs is not installed."""
    try:
        return importlib.import_module("retool_jax.serving.grpc")
    except ModuleNotFoundError as missing:
        raise UserError(
            f"serve.grpc_port needs {missing.name}; pip install grpcio protobuf and pip install --no-deps"
            " google-jetstream==0.2.2, or leave serve.grpc_port out"
        ) from None


def nothing() -> None:
    """There is nothing to do."""


async def until_told(
    web: "uvicorn.Server", server: "Server", listener: socket.socket, told: Callable[[], object] = nothing
) -> None:
    """Serve until a signal comes; answers that have begun go on for as long as the server waits for them.

    `told` is called on the event loop when the signal has come.
    """
    loop = asyncio.get_running_loop()

    def close(number: int, frame: object) -> None:
        server.closing = True
        loop.call_soon_threadsafe(told)
        handle_exit(number, frame)

    handle_exit, web.handle_exit = web.handle_exit, close
    for end in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again once it is done
        signal.signal(end, lambda *_: None)
    await web.serve(sockets=[listener])


def listen(config: ServeConfig) -> socket.socket:
    """A socket that accepts connections. Raises UserError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise UserError(
            f"cannot listen on serve.host={config.host} serve.port={config.port} ({reason}); choose another"
        ) from None
    # Small pieces of a stream are sent at once, and not when the client has acknowledged the ones before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
