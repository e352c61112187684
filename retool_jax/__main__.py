"""`retool COMMAND ...`, or `python -m retool_jax COMMAND ...`: every command of the package under one name."""

import difflib
import importlib
import sys

from retool_jax.errors import UserError, run_command

# Name -> (module below retool_jax, what it does). `python -m` and the module's full name run the same command.
COMMANDS = {
    "train": ("train", "train a model, or resume the run: retool train config=grpo"),
    "evaluate": ("evaluate", "measure a checkpoint on a set of problems: retool evaluate config=eval"),
    "serve": ("serve", "serve a checkpoint over OpenAI's endpoints: retool serve config=serve"),
    "sessions": ("serving.sessions", "turn conversations that a server recorded into rollouts to train on"),
    "plan": ("plan", "plan a run for chips that are not here: retool plan config=NAME mesh=v5p-64"),
    "report": ("report", "write one HTML page with a run's curves and trajectories"),
    "export": ("export", "write trajectories as parquet, traces, ATIF or a log of Inspect"),
    "prepare": ("prepare", "convert and check published demonstrations and problems"),
    "convert": ("convert", "write a Hugging Face checkpoint, or compare two"),
    "sandbox-server": ("sandbox.server", "serve the sandbox over HTTP"),
    "sandbox-image": ("sandbox.image", "build the Python and the packages that programs in the sandbox see"),
}


def help_text() -> str:
    """The text of `--help`: usage, and a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"    {name:<{width}}    {does}" for name, (_, does) in COMMANDS.items()]
    usage = "usage: retool COMMAND [word ...]; retool COMMAND --help lists the words of a command"
    return "\n".join([usage, "", *lines])


def main(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown command {name!r}; {hint}there are: {', '.join(COMMANDS)}")
    # Imported here, since some commands take seconds to import, and help and mistakes should be printed at once.
    importlib.import_module(f"retool_jax.{COMMANDS[name][0]}").main(rest)


def run() -> None:
    """The console script. As with `python -m`, tools and rewards of one's own may be modules in the current folder."""
    if "" not in sys.path:
        sys.path.append("")
    run_command(main)


if __name__ == "__main__":
    run()
