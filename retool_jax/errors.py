"""The one exception that a user's own input can raise, and how an entry point shows it."""

import atexit
import errno
import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message names the thing, the limit and the way out, in one line."""


def one_line(cause: object, most: int = 200) -> str:
    """What was said, on one line of at most so many characters."""
    return " ".join(str(cause).split())[:most]


_ROOM = "make room and start the same command again"
_RIGHTS = "choose a folder that can be written"
_PATH = "see that the path is right, or choose another"
_DISK_ERRORS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f) and start the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and start the same command again",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOTDIR: _RIGHTS,
    errno.ENOENT: _PATH,
    errno.EEXIST: _PATH,
    errno.EISDIR: _PATH,
    errno.ELOOP: _PATH,
    errno.ENAMETOOLONG: _PATH,
    errno.EBUSY: _PATH,
    errno.EIO: "see that its disk works",
}
_UNREAD = "what reads this output has ended, as `head` does; without it the same command goes on from what is saved"


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run an entry point on the command line's words; bad input and a full disk are one line on stderr, exit code 2."""
    _prepare_streams()
    # An ending Python looks through all that there is for garbage, several times: 0.4 s of processor time with jax.
    atexit.register(gc.freeze)
    out = os.fstat(1)
    try:
        main(sys.argv[1:])
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        _leave(str(error))
    except SystemExit:
        if os.path.samestat(out, os.fstat(1)):
            raise
        _leave(_UNREAD)  # rich ends a program so, and points its stdout nowhere
    except BrokenPipeError:
        if not _is_unread():
            raise
        _leave(_UNREAD)
    except OSError as error:
        if error.errno == errno.ENOENT and not error.filename and not _is_somewhere():
            _leave("the folder in which this command was started is gone; start it in another")
        if error.errno not in _DISK_ERRORS:
            raise
        where, way_out = error.filename or "a file of this run", _DISK_ERRORS[error.errno]
        _leave(f"cannot {'use' if way_out == _PATH else 'write'} {where} ({error.strerror}); {way_out}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved, if anything is", file=sys.stderr)
        sys.exit(130)


@contextmanager
def heard() -> Iterator[None]:
    """Let Ctrl-C end the block at once, wherever it comes.

    By itself it is lost where Python is in a callback of its collector or of a weak reference: what is raised there is
    printed and forgotten, so it is raised again until the block ends by it. And asyncio's own handler waits until a
    coroutine waits, which long work in it does not.
    """
    timers: list[threading.Timer] = []
    repeated: list[int] = []

    def repeat(number: int) -> None:
        repeated.append(number)
        os.kill(os.getpid(), number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        again, ending = bool(repeated), sys.exception()
        repeated.clear()
        while ending is not None and not isinstance(ending, KeyboardInterrupt):
            ending = ending.__context__
        if again and ending is not None:  # it was heard, and what is open is being closed
            return
        timers.append(threading.Timer(0.2, repeat, (number,)))
        timers[-1].daemon = True
        timers[-1].start()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # no other may set what signals do
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)


def _prepare_streams() -> None:
    """See that nothing which is printed can fail for its characters, and that no file takes the place of a stream.

    A path may hold bytes that are no text, and a stream may know ASCII alone. Where a stream is closed, the next file
    that is opened would get its number, and with it what libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads from any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _is_somewhere() -> bool:
    """Whether the folder that relative paths begin in is there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _leave(message: str) -> NoReturn:
    """Say it as the last line on stderr: libraries' threads and unread futures may speak again while Python ends."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    if _is_unread():  # Python writes what is left in its buffer
        os.dup2(nowhere, 1)
    sys.exit(2)
