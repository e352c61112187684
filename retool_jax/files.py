"""Files of runs: replaced in one step, read line by line, and not to be replaced by what other commands write."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from retool_jax.errors import UserError, one_line

CONFIG = "config.yaml"  # of a run, in its folder
LOCK = "lock"  # held by the process that trains there, and gone with it; its text says who that is


@contextmanager
def replacing(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A text file in UTF-8 that takes the place of `path` when the block ends, once it is on the disk.

    Whoever reads meanwhile has the old one, and so has a disk after a kill. An error in the block leaves it, too.
    `errors` says what is done with what UTF-8 cannot hold. Of a link the file that it leads to is replaced.

    Raises:
        UserError: there is something else than a file, such as a folder or a device.
    """
    if path.is_symlink():
        path = path.resolve()
    if not path.name or (path.exists() and not path.is_file()):
        kind = "a folder" if path.is_dir() else "no file"
        raise UserError(f"cannot write {path}, which is {kind}; choose another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_lines(path: Path) -> Iterator[tuple[int, object]]:
    """What the lines of a JSONL file hold, by their numbers. Blank ones, and a last one that a kill tore, are left out.

    Raises:
        UserError: a line before the last is not JSON.
    """
    fault = ""  # of the line before
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if fault:
                raise UserError(fault)
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = f"{path} line {number} is not JSON ({one_line(error)}); remove that line"
                continue
            yield number, value


def check_result(path: Path, key: str = "out", folder: bool = False) -> None:
    """A `UserError` where what a command writes would take the place of a file that a run keeps for itself, or of a
    folder, unless it writes a `folder`."""
    if path.is_dir() and not folder:
        raise UserError(f"{key}={path} is a folder; name a file, such as {key}={path / 'file'}")
    if not path.exists() or path.suffix in (".html", ".png", ".parquet", ".eval"):
        return
    for folder in path.resolve().parents[:3]:
        if (folder / CONFIG).is_file() and (folder / LOCK).is_file():
            raise UserError(f"{key}={path} is a file of the run in {folder}; choose another {key}=")
