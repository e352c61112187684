"""The one exception that a user's own input can raise, and how an entry point shows it."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message names the thing, the limit and the way out, in one line."""


def one_line(cause: object, most: int = 200) -> str:
    """What was said, on one line of at most so many characters."""
    return " ".join(str(cause).split())[:most]


_ROOM = "make room and start the same command again"
_RIGHTS = "choose a folder that can be written"
_DISK_ERRORS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f) and start the same command again",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOTDIR: _RIGHTS,
}


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run an entry point on the command line's words; bad input and a full disk are one line on stderr, exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        _leave(str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = error.filename or "a file of this run"
        _leave(f"cannot write {where} ({error.strerror}); {_DISK_ERRORS[error.errno]}")
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _leave(message: str) -> NoReturn:
    """Say it as the last line on stderr: libraries' threads and unread futures may speak again while Python ends."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(2)
