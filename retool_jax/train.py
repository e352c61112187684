"""`python -m retool_jax.train config=NAME key=value ...`: train, or resume, the run that the words describe."""

import asyncio

from retool_jax.errors import run_command


def main(words: list[str]) -> None:
    # Imported here, so that a mistake in the words is not told after seconds of imports that it does not need.
    from retool_jax import config

    if not words or {"-h", "--help"} & set(words):
        print(config.help_text(words))
        return
    run = config.load(words)
    if isinstance(run, config.RLRun):
        from retool_jax.rl import loop

        asyncio.run(loop.train(run))
    else:
        from retool_jax.sft import loop

        loop.train(run)
        print(f"done: {run.run}; python -m retool_jax.train config=grpo init_from={run.run} goes on from it")


if __name__ == "__main__":
    run_command(main)
