"""`python -m retool_jax.sandbox.server`: the sandbox over HTTP, in Sandbox Fusion's protocol."""

import asyncio
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace

from retool_jax.errors import UserError, run_command
from retool_jax.sandbox.backends import open_sandbox
from retool_jax.sandbox.types import TOKEN_VARIABLE, Limits, SandboxConfig, shown
from retool_jax.sandbox.words import help_text, option, read_words

try:
    from retool_jax.sandbox.remote.app import build_app
    from retool_jax.sandbox.remote.web import LOCAL, listen, serve_until_signal, url_of
except ModuleNotFoundError as missing:
    sys.exit(f"error: the server needs {missing.name}; pip install 'retool_jax[sandbox]'")

ABOUT = """Serve the sandbox over HTTP:
    POST /run_code    Sandbox Fusion's request and answer (python only)
    POST /execute     the simple local servers' request and answer
    GET  /v1/ping     "pong"
    GET  /metrics     Prometheus"""
_CONFIG, _LIMITS = SandboxConfig(), Limits()


@dataclass(frozen=True)
class Options:
    """The command line."""

    backend: str = option(
        "auto", "auto, or names in order of preference, with commas: gvisor, bubblewrap, process (unsafe)"
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8080, "0 takes a free port and prints it")
    token: str = option(
        "",
        f"bearer token that requests must have; better given as ${TOKEN_VARIABLE}, which other users of the machine "
        "cannot see",
    )
    slots: int = option(_CONFIG.slots, "programs that run at once; 0: half of the cores")
    image: str = option(
        _CONFIG.image,
        "folder of the runtime (python -m retool_jax.sandbox.image); empty: the one built last, else this Python",
    )
    wall_s: float = option(_LIMITS.wall_s, "time limit of a request that names none")
    max_wall_s: float = option(60.0, "the longest time limit that a request may ask for")
    memory_mb: int = option(_LIMITS.memory_mb, "memory of a program, and the most that a request may ask for")
    output_bytes: int = option(_LIMITS.output_bytes, "bytes that are kept of each output stream")
    processes: int = option(_LIMITS.processes, "processes and threads that a program may have")
    file_mb: int = option(_LIMITS.file_mb, "MiB of files that a program may write")
    queue_limit: int = option(_CONFIG.queue_limit, "requests that may wait for a slot; 0: 64 per slot")
    queue_s: float = option(60.0, "seconds that a request may wait before it is answered 503")
    modules: str = option("", "top-level modules that programs may import, with commas; empty: all")
    drain_s: int = option(65, "seconds that running requests may take after SIGTERM")

    def __post_init__(self) -> None:
        for name, high in (("port", 65535), ("drain_s", 86400)):
            if not 0 <= getattr(self, name) <= high:
                raise UserError(f"{name} is {shown(getattr(self, name))}; it must lie between 0 and {high}")


def settings(options: Options) -> tuple[SandboxConfig, Limits]:
    """The sandbox's configuration and the largest limits, from the command line. Raises UserError."""
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


async def serve(options: Options) -> None:
    """Open the sandbox and serve until SIGTERM or SIGINT; then finish running requests and close it."""
    config, ceiling = settings(options)
    token = options.token or os.environ.pop(TOKEN_VARIABLE, "")
    with listen(options.host, options.port) as listener:
        async with open_sandbox(config) as box:
            print(f"sandbox: {box.description}", flush=True)
            if not token and options.host not in LOCAL:
                print(f"everybody who reaches {options.host} can run programs here; set ${TOKEN_VARIABLE}", flush=True)
            print(f"serving on {url_of(options.host, listener)}", flush=True)
            await serve_until_signal(build_app(box, ceiling, token), listener, options.drain_s)
    print("closed", flush=True)


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(help_text("python -m retool_jax.sandbox.server", ABOUT, Options))
        return
    with suppress(asyncio.CancelledError):
        asyncio.run(serve(read_words(words, Options)))


if __name__ == "__main__":
    run_command(main)
