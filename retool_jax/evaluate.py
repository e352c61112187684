"""`python -m retool_jax.evaluate config=NAME init_from=FOLDER key=value ...`: measure a checkpoint on a problem set.

The same command resumes an evaluation that was interrupted (docs/evaluation.md).
"""

import asyncio

from retool_jax.errors import UserError, interruptible, run_command
from retool_jax.memory import collect_rarely
from retool_jax.run import load
from retool_jax.run.schema import EvaluateRun


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(load.help_text(words, "evaluate", "eval"))
        return
    run = load.load(words)
    if not isinstance(run, EvaluateRun):
        raise UserError("this config trains; run python -m retool_jax.train with it, or choose one of task evaluate")
    if not run.init_from:
        raise UserError("there is nothing to evaluate; set init_from to a run or Hugging Face folder, or a hub id")
    collect_rarely()
    # Imported only now, so that a mistake in the words is reported before seconds of imports.
    with interruptible():
        from retool_jax.compile_cache import keep_programs
        from retool_jax.run.build import resolve

        run = resolve(words)
        keep_programs()
    measure(run)


def measure(run: EvaluateRun) -> None:
    """Evaluate a run to its result, together with the other hosts of its job if the environment names them."""
    from retool_jax import hosts

    with hosts.joined(run.hosts):
        from retool_jax.run.evaluate import evaluate
        from retool_jax.run.folder import check_hosts

        check_hosts(run)
        asyncio.run(evaluate(run))


if __name__ == "__main__":
    run_command(main)
