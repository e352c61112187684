"""Which program trains in a folder: the state of its source and the versions of its libraries, as files there."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

import retool_jax
from retool_jax import hosts

SOURCE = Path(retool_jax.__file__).parent
CODE, VERSIONS = "code.diff", "versions.txt"


def write_origin(folder: Path) -> None:
    """Note in a run's folder what trains there now: `versions.txt`, and `code.diff` where the source is a checkout.

    A run that goes on with another program adds that one behind those before it. Nothing of this can end a run.
    """
    if not hosts.is_first():
        return
    for name, of_it in ((CODE, code_diff), (VERSIONS, versions)):
        with suppress(Exception):  # of the disk, or of a package that is half installed
            path, text = folder / name, of_it()
            before = path.read_bytes() if path.is_file() else b""
            if text and not before.endswith(text):
                path.write_bytes(before + text)


def code_diff(source: Path = SOURCE) -> bytes:
    """The commit that a folder of source code is at, its files that no commit has, and `git diff` of the others.

    Empty where it is in no checkout, or in that of another project which merely holds it, as a virtual environment
    below one is: there git does not know its files.
    """
    if not _git(source, "ls-files", "--error-unmatch", "__init__.py"):
        return b""
    commit = _git(source, "rev-parse", "HEAD")
    new = _git(source, "ls-files", "--others", "--exclude-standard")
    # No program that the checkout's settings name is run, and nothing of it is written.
    diff = _git(source, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", ".")
    names = b"".join(b"# not in it: " + name + b"\n" for name in new.splitlines())
    return b"# commit " + commit + names + diff if commit else b""


def _git(source: Path, *words: str) -> bytes:
    """What git says in a folder; empty where it fails, whyever."""
    # GIT_DIR and the like may mean another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return b""
    return done.stdout


@functools.cache
def versions() -> bytes:
    """The Python and every package that is installed beside it, a line each, as pip reads them."""
    packages = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    lines = [f"# Python {platform.python_version()} on {platform.platform()}", *sorted(packages, key=str.lower)]
    return "\n".join([*lines, ""]).encode()
