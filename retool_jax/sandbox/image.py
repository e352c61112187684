"""`python -m retool_jax.sandbox.image`: builds the runtime that programs see."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from retool_jax.errors import UserError, run_command
from retool_jax.sandbox.launch.image import build
from retool_jax.sandbox.launch.runtime import images_folder
from retool_jax.sandbox.words import help_text, read_words, word

PACKAGES = (
    "numpy==2.4.6",
    "sympy==1.14.0",
    "scipy==1.17.1",
    "mpmath==1.3.0",
    "networkx==3.6.1",
    "pandas==3.1.1",
)
ABOUT = "Build the runtime that programs see: a root file system with a Python, its libraries and some packages."


@dataclass(frozen=True)
class Options:
    """The command line."""

    to: str = word(
        "",
        "where it goes; empty is a new folder below ~/.cache/retool_jax/images; the sandbox takes the newest there",
    )
    packages: str = word(" ".join(PACKAGES), "what pip is asked for, with spaces between; empty is nothing")


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(help_text("python -m retool_jax.sandbox.image", ABOUT, Options))
        return
    options = read_words(words, Options)
    if sys.platform != "linux":
        raise UserError(f"a runtime image is for Linux, this is {sys.platform}; build it in a Linux container")
    name = f"python{sys.version.split()[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    to = Path(options.to).expanduser().absolute() if options.to else images_folder() / name
    build(to, options.packages.split())


if __name__ == "__main__":
    run_command(main)
