"""`python -m retool_jax.serve config=NAME init_from=FOLDER key=value ...`: serve a checkpoint over HTTP."""

import asyncio
import os
from contextlib import suppress

from retool_jax.errors import UserError, run_command
from retool_jax.memory import collect_rarely
from retool_jax.run import load
from retool_jax.run.schema import ServeRun, task_of

_SHORT = ("host", "port")  # may be given without their section


def main(words: list[str]) -> None:
    words = [f"serve.{word}" if word.partition("=")[0] in _SHORT else word for word in words]
    if not words or {"-h", "--help"} & set(words):
        print(load.help_text(words, "serve", "serve"))
        return
    if not isinstance(run := load.load(words), ServeRun):
        raise UserError(f"this config is of task {task_of(type(run))} and serves nothing; use config=serve")
    if (processes := os.environ.get("JAX_NUM_PROCESSES", "")) not in ("", "1"):
        raise UserError(
            f"JAX_NUM_PROCESSES={processes} asks for one server on several hosts, but a server uses the devices of one"
            " host; start a server on each host with JAX_NUM_PROCESSES=1, and let a load balancer distribute the"
            " requests"
        )
    collect_rarely()
    # Imported only now, so that a mistake in the words is reported before seconds of imports.
    from retool_jax.compile_cache import keep_programs
    from retool_jax.run.build import resolve
    from retool_jax.run.serve import serve

    run = resolve(words)
    keep_programs()
    with suppress(asyncio.CancelledError):
        asyncio.run(serve(run))


if __name__ == "__main__":
    run_command(main)
