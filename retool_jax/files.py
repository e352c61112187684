"""Files of runs: atomic replacement, reading JSONL, and protection against other commands' output."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from retool_jax.errors import UserError, one_line

CONFIG = "config.yaml"  # of a run, in its folder
LOCK = "lock"  # locked by the process that trains in the folder, until it ends; the text names that process


@contextmanager
def replacing(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A UTF-8 text file that atomically replaces `path` when the block ends, after it is flushed to the disk.

    Until then, and after a kill or an error in the block, `path` has the old content. `errors` is the codec's error
    handler. A link stays, and the file that it points to is replaced.

    Raises:
        UserError: `path` is not a file, but for example a folder or a device.
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
    """(line number, value) of a JSONL file. Blank lines, and an incomplete last line left by a kill, are skipped.

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
    """A `UserError` if a command's output would replace a file of a run, or a folder unless it writes a `folder`."""
    if path.is_dir() and not folder:
        raise UserError(f"{key}={path} is a folder; name a file, such as {key}={path / 'file'}")
    if not path.exists() or path.suffix in (".html", ".png", ".parquet", ".eval"):
        return
    for above in path.resolve().parents[:3]:
        if (above / CONFIG).is_file() and (above / LOCK).is_file():
            raise UserError(f"{key}={path} is a file of the run in {above}; choose another {key}=")
