"""`python -m retool_jax.train config=NAME key=value ...`: train, or resume, the run that the words describe."""

import asyncio
from shlex import quote

from retool_jax.errors import UserError, interruptible, run_command
from retool_jax.memory import collect_rarely, keep_freed_memory
from retool_jax.run import load
from retool_jax.run.schema import RLRun, SFTRun, task_of


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(load.help_text(words))
        return
    task = task_of(type(load.load(words)))
    if task in ("evaluate", "serve"):
        raise UserError(f"this config is of task {task} and trains nothing; run python -m retool_jax.{task} with it")
    keep_freed_memory()
    collect_rarely()
    # Imported only now, so that a mistake in the words is reported before seconds of imports.
    with interruptible():
        from retool_jax.compile_cache import keep_programs
        from retool_jax.run.build import resolve

        run = resolve(words)
        keep_programs()
    train(run)


def train(run: SFTRun | RLRun) -> None:
    """Train a run to its end, together with the other hosts of its job if the environment names them."""
    from retool_jax import hosts

    with hosts.joined(run.hosts):
        from retool_jax.run.folder import check_hosts

        check_hosts(run)
        if isinstance(run, RLRun):
            from retool_jax.run import rl
            from retool_jax.run.cold_start import make_cold_start

            asyncio.run(rl.train(run, make_cold_start))
        else:
            from retool_jax.run import sft

            with interruptible():
                sft.train(run)
            print(f"done: {run.run}; python -m retool_jax.train config=grpo init_from={quote(run.run)} goes on from it")


if __name__ == "__main__":
    run_command(main)
