"""The exception for mistakes in a user's input, and how an entry point reports it."""

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
    """Bad input. The message is one line that names the mistake, the limit and what to do."""


def one_line(cause: object, most: int = 200) -> str:
    """The text of an error on one line of at most `most` characters."""
    return " ".join(str(cause).split())[:most]


_ROOM = "make room and start the same command again"
_RIGHTS = "choose a folder that can be written"
_PATH = "check the path, or choose another"
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
    errno.EIO: "check that its disk works",
}
_UNREAD = "the program that reads this output has ended, as `head` does; the same command without it resumes"


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run an entry point on the command line's words. Bad input and disk errors are one line on stderr, exit code 2."""
    _prepare_streams()
    # At exit Python collects garbage over all objects several times, which takes 0.4 s of CPU time with jax.
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
        _leave(_UNREAD)  # on a broken pipe rich redirects stdout to /dev/null and exits
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        _leave(_UNREAD)
    except OSError as error:
        if error.errno == errno.ENOENT and not error.filename and not _has_working_folder():
            _leave("the folder in which this command was started is gone; start it in another")
        if error.errno not in _DISK_ERRORS:
            raise
        where, way_out = error.filename or "a file of this run", _DISK_ERRORS[error.errno]
        _leave(f"cannot {'use' if way_out == _PATH else 'write'} {where} ({error.strerror}); {way_out}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved, if anything is", file=sys.stderr)
        sys.exit(130)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block at once, whatever runs at that moment.

    Python prints and drops an exception that is raised in a callback of its garbage collector or of a weak reference,
    so KeyboardInterrupt is raised again until it ends the block. And asyncio's own handler acts only when a coroutine
    awaits, which long computations do not.
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
        if again and ending is not None:  # the block is ending already, and is closing what is open
            return
        timers.append(threading.Timer(0.2, repeat, (number,)))
        timers[-1].daemon = True
        timers[-1].start()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
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
    """Make printing safe: any character can be printed, and no file gets the number of a closed stream.

    A path may hold bytes that are no text, and a stream may support only ASCII. If a standard stream is closed, the
    next file that is opened would get its number, and then what libraries print.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _stdout_is_broken() -> bool:
    """Whether stdout is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _has_working_folder() -> bool:
    """Whether the current working folder still exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _leave(message: str) -> NoReturn:
    """Print the error and exit. It stays the last line on stderr, whatever threads print while Python ends."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    if _stdout_is_broken():  # at exit Python flushes the rest of its buffer
        os.dup2(nowhere, 1)
    sys.exit(2)
