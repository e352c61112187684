"""`python -m retool_jax.serving.sessions`: turn recorded conversations and rewards into rollouts for `replay`."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from retool_jax.errors import UserError, run_command
from retool_jax.sandbox.words import help_text, option, read_words

ABOUT = "Turn conversations that a server recorded, and their rewards, into rollouts for `train ... replay=OUT`."


@dataclass(frozen=True)
class Options:
    """The command line."""

    record: str = option("", "folder of serve.record")
    rewards: str = option("", 'file with {"session": ID, "reward": 1} or {"session": ID, "answer": "6"} on each line')
    out: str = option("", "folder in which rollouts/ is written; it must have none yet")
    group_size: int = option(8, "sessions of one prompt that form a group, as rl.group_size")
    prompts_per_step: int = option(24, "groups of a step, as rl.prompts_per_step")
    tokenizer: str = option("miniature", "tokenizer of the policy that was served")


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(help_text("python -m retool_jax.serving.sessions", ABOUT, Options))
        return
    options = read_words(words, Options)
    for key in ("record", "rewards", "out"):
        if not getattr(options, key):
            raise UserError(f"{key} is empty; set {key}=..., see --help")
    for key in ("group_size", "prompts_per_step"):
        if getattr(options, key) < 1:
            raise UserError(f"{key} is {getattr(options, key)}; it must be at least 1")
    # Imported only now, so that a mistake in the words is reported at once.
    from retool_jax.serving.record import SESSIONS, describe, make_rollouts
    from retool_jax.tokens.tokenizer import load_tokenizer

    size, prompts = options.group_size, options.prompts_per_step
    made = make_rollouts(
        Path(options.record) / SESSIONS,
        Path(options.rewards),
        Path(options.out),
        size,
        prompts,
        load_tokenizer(options.tokenizer),
    )
    print(f"{made.used} sessions in {made.used // size} groups and {made.steps} steps; {describe(made.left_out)}")
    drawn_at = ", ".join(map(str, made.temperatures))
    words = f"replay={quote(options.out)} rl.group_size={size} rl.steps={made.steps} rl.temperature={drawn_at}"
    print(f"learn from them: {words}")


if __name__ == "__main__":
    run_command(main)
