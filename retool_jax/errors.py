"""The one exception that a user's own input can raise, and how an entry point shows it."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the thing, the limit and the way out, in one line."""


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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = error.filename or "a file of this run"
        print(f"error: cannot write {where} ({error.strerror}); {_DISK_ERRORS[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
