"""Files that are replaced in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A text file in UTF-8 that takes the place of `path` when the block ends, once it is on the disk.

    Whoever reads meanwhile has the old one, and so has a disk after a kill. An error in the block leaves it, too.
    `errors` says what is done with what UTF-8 cannot hold.
    """
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
