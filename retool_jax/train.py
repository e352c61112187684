"""`python -m retool_jax.train config=NAME key=value ...`: train, or resume, the run that the words describe."""

import asyncio
import textwrap

from retool_jax.errors import run_command


def main(words: list[str]) -> None:
    # Imported here, so that a mistake in the words is not told after seconds of imports that it does not need.
    from retool_jax.run import load as config

    if not words or {"-h", "--help"} & set(words):
        print(help_text(words))
        return
    run = config.load(words)
    if isinstance(run, config.RLRun):
        from retool_jax.rl import loop

        asyncio.run(loop.train(run))
    else:
        from retool_jax.sft import loop

        loop.train(run)
        print(f"done: {run.run}; python -m retool_jax.train config=grpo init_from={run.run} goes on from it")


def help_text(words: list[str]) -> str:
    """What `--help` prints: how to call, which configs exist, and the keys of the one named (or of grpo)."""
    from retool_jax.fields import HIDDEN, describe, flatten, secret_keys, show
    from retool_jax.run import load as config

    name = next((word.split("=", 1)[1] for word in words if word.startswith("config=")), "grpo")
    schema = config.schema_of(values := config.read_yaml(name), name)
    resolved = flatten(config.build(schema, values))
    resolved |= {key: HIDDEN for key in secret_keys(schema) if resolved[key]}
    rows = [(f"{key}={show(resolved[key])}", comment) for key, _, _, comment in describe(schema)]
    lines = [
        textwrap.fill(f"  {left:<44} {comment}".rstrip(), 110, subsequent_indent=" " * 47, break_on_hyphens=False)
        for left, comment in rows
    ]
    return "\n".join(
        [
            "usage: python -m retool_jax.train config=NAME [key=value ...]",
            "",
            f"configs: {', '.join(config.config_names())}; or the path of a YAML file",
            "",
            "Later words win over earlier ones, and all of them over the config's file. An unknown key or a value of",
            "the wrong type is an error. The run's folder holds config.yaml, metrics.jsonl, TensorBoard files,",
            "trajectories and checkpoints; the same command again resumes it.",
            "",
            f"keys of config={name} and their values there:",
            *lines,
        ]
    )


if __name__ == "__main__":
    run_command(main)
