"""Record which program trains in a run's folder: the state of its source, and the versions of its libraries."""

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
    """Write `versions.txt`, and `code.diff` where the source is a git checkout, into a run's folder.

    When a run is resumed with another program, that one is appended. No failure here ends a run.
    """
    if not hosts.is_first():
        return
    for name, describe in ((CODE, code_diff), (VERSIONS, versions)):
        with suppress(Exception):  # of the disk, or of a package that is half installed
            path, text = folder / name, describe()
            before = path.read_bytes() if path.is_file() else b""
            if text and not before.endswith(text):
                path.write_bytes(before + text)


def code_diff(source: Path = SOURCE) -> bytes:
    """The commit of a source folder, the names of its untracked files, and `git diff` of the tracked ones.

    Empty if it is in no checkout, or if the checkout does not track it, such as a virtual environment inside of another
    project.
    """
    if not _git(source, "ls-files", "--error-unmatch", "__init__.py"):
        return b""
    commit = _git(source, "rev-parse", "HEAD")
    new = _git(source, "ls-files", "--others", "--exclude-standard")
    # The options keep git from running programs that the checkout's settings name.
    diff = _git(source, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", ".")
    names = b"".join(b"# not in it: " + name + b"\n" for name in new.splitlines())
    return b"# commit " + commit + names + diff if commit else b""


def _git(source: Path, *words: str) -> bytes:
    """The output of a git command in a folder; empty if it fails."""
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
    """The Python version and every installed package, one a line, in the format of pip's requirements."""
    packages = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    lines = [f"# Python {platform.python_version()} on {platform.platform()}", *sorted(packages, key=str.lower)]
    return "\n".join([*lines, ""]).encode()
