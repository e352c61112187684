"""A serve run: load a checkpoint and answer requests until a signal ends it."""

import gc
import importlib
import logging
import os
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
    explain_out_of_memory,
    mesh_of,
    model_for,
    sandbox_config,
    sandbox_lines,
    warm_up,
)
from retool_jax.run.schema import ServeRun
from retool_jax.run.weights import load_weights, require_folder
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.toolbox import load_tools

try:
    from retool_jax.sandbox.remote.web import LOCAL, listen, serve_until_signal, url_of
    from retool_jax.serving.app import build_app
    from retool_jax.serving.server import Server
except ModuleNotFoundError as missing:
    sys.exit(f"error: the server needs {missing.name}; pip install 'retool_jax[serve]'")

TOKEN_VARIABLE = "RETOOL_SERVE_TOKEN"


async def serve(run: ServeRun) -> None:
    """Load a checkpoint and answer requests until SIGTERM or SIGINT; then finish open requests and refuse new ones.

    Raises:
        UserError: no checkpoint, no sandbox, or an address that cannot be listened on; before the first request.
    """
    token = os.environ.pop(TOKEN_VARIABLE, "")
    rpc = rpc_module() if run.serve.grpc_port is not None else None
    require_folder(run.init_from)
    tokenizer = load_tokenizer(run.tokenizer)
    run = replace(run, model=model_for(run, tokenizer))
    tools = load_tools(run.tools)
    mesh = mesh_of(run)
    log = logging.getLogger("retool_jax.serving")  # one line for each answer, and errors
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    async with AsyncExitStack() as stack:
        host = run.serve.host
        address = f"serve.host={host} serve.port={run.serve.port}"
        listener = stack.enter_context(listen(host, run.serve.port, address))
        stack.enter_context(explain_out_of_memory(run))
        stack.enter_context(compiled_ahead(run, mesh, tokenizer))
        if tools:
            await stack.enter_async_context(tools.open(sandbox_config(run)))
        engine = engine_of(run, load_weights(run, Path(run.init_from)), mesh, tokenizer)
        print("\n".join(sandbox_lines(tools.sandbox if tools else None)), flush=True)
        warm_up(engine)
        gc.freeze()  # these objects stay; garbage collection over them would delay every stream
        service = await stack.enter_async_context(Service(engine, tools.at_once if tools else 0))
        name = run.serve.name or Path(run.init_from).name
        server = Server(service, tokenizer, tools, run.rollout, run.serve, name)
        if not token and host not in LOCAL:
            print(f"anyone who can reach {host} can ask and run programs here; set ${TOKEN_VARIABLE}", flush=True)
        close_rpc = None
        if rpc:
            rpc_port, close_rpc = await stack.enter_async_context(rpc.listening(server, token))
            print(f"JetStream's gRPC: {host}:{rpc_port}", flush=True)
        print(f"serving {name} on {url_of(host, listener)}/v1", flush=True)
        await serve_until_stopped(server, listener, token, close_rpc)
        server.containers.close()
    print("closed", flush=True)


def rpc_module() -> ModuleType:
    """The module `serving.grpc`. Raises UserError if a package that it needs is not installed."""
    try:
        return importlib.import_module("retool_jax.serving.grpc")
    except ModuleNotFoundError as missing:
        raise UserError(
            f"serve.grpc_port needs {missing.name}; pip install grpcio protobuf and pip install --no-deps"
            " google-jetstream==0.2.2, or leave serve.grpc_port out"
        ) from None


async def serve_until_stopped(
    server: "Server", listener: socket.socket, token: str = "", close_rpc: Callable[[], object] | None = None
) -> None:
    """Serve over HTTP until a signal comes; then refuse new requests and call `close_rpc`."""

    def close() -> None:
        server.closing = True
        if close_rpc:
            close_rpc()

    await serve_until_signal(build_app(server, token), listener, server.config.drain_s, close)
