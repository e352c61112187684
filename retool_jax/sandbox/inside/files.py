"""The working directory of a call: empty at first, with files put there before the program and taken out after it."""

import base64
import contextlib
import ctypes
import os
import signal
import stat
from collections.abc import Iterator

from isolation import (
    LIBC,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    Isolation,
    mount,
)

MAX_FILE_BYTES = 16 << 20
MAX_FILES_BYTES = 32 << 20
SHARED_MEMORY, OTHER_TEMPORARY = "/dev/shm", "/var/tmp"
MAX_INODES = 20_000


class WorkFolder:
    """Places for temporary files that are empty at the start of each call."""

    def __init__(self, isolation: Isolation):
        self.isolation = isolation
        self.mounted = ""  # options of the file systems that are mounted now
        self.targets = [isolation.work]
        if isolation.files and os.path.isdir(SHARED_MEMORY):
            self.targets.append(SHARED_MEMORY)
        # In our images it is a link to /tmp.
        self.bind_other = isolation.files and os.path.isdir(OTHER_TEMPORARY) and not os.path.islink(OTHER_TEMPORARY)

    def open(self, limits: dict, uid: int | None) -> None:
        """Make an empty working directory that `uid` (None: this process's user) can write to. Raises OSError."""
        if not self.isolation.files:
            os.mkdir(self.isolation.work, 0o700)
            if uid is not None:
                os.chown(self.isolation.work, uid, -1)
            return
        # Programs of every uid can write into it, but none can change the folder itself. So the next call can use it
        # again if nothing was left in it.
        owner = "mode=1777" if uid is not None else f"mode=700,uid={os.geteuid()}"
        options = f"{owner},size={limits['file_mb']}m,nr_inodes={MAX_INODES}"
        if options == self.mounted:
            return
        self._unmount()
        for target in self.targets:
            self._mount(target, options)
        if self.bind_other:
            mount(self.isolation.work, OTHER_TEMPORARY, "none", MS_BIND)
        self.mounted = options

    def _mount(self, target: str, options: str) -> None:
        """Mount a file system, without the last options if the kernel (gVisor's) does not know them."""
        while not mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, options):
            options, comma, _ = options.rpartition(",")
            if not comma:
                raise OSError(ctypes.get_errno(), f"cannot mount {target}")

    def close(self) -> None:
        """Remove what the call left."""
        if not self.isolation.files:
            # Not shutil.rmtree: a program can nest folders thousands deep, and rmtree then ends with a RecursionError.
            os.waitpid(os.posix_spawn("/bin/rm", ["rm", "-rf", self.isolation.work], os.environ), 0)
        elif self.isolation.first_uid is None or any(map(os.listdir, self.targets)):
            self._unmount()

    def _unmount(self) -> None:
        if self.mounted:
            for target in (*([OTHER_TEMPORARY] if self.bind_other else []), *self.targets):
                LIBC.umount2(target.encode(), MNT_DETACH)  # at once, however many files there are
            self.mounted = ""

    @contextlib.contextmanager
    def _as_user(self, uid: int | None) -> Iterator[None]:
        """Access files with only the rights of the call's user."""
        if uid is None:
            yield
            return
        os.setegid(uid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            restore_guards(self.isolation)

    def put(self, files: dict[str, str], uid: int | None) -> str:
        """Write files (base64) as the user of the call; returns why that failed, or an empty string."""
        with self._as_user(uid):
            for path, content in files.items():
                try:
                    handle = open_beneath(self.isolation.work, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, make=True)
                    with open(handle, "wb") as file:
                        file.write(base64.b64decode(content))
                except (OSError, ValueError) as error:
                    return f"cannot write the file {path!r}: {error}"
        return ""

    def take(self, paths: list[str], uid: int | None) -> dict[str, str]:
        """The content (base64) of those paths that are regular files and within the size limits."""
        found, room = {}, MAX_FILES_BYTES
        with self._as_user(uid):
            for path in paths:
                try:
                    handle = open_beneath(self.isolation.work, path, os.O_RDONLY | os.O_NONBLOCK)
                except (OSError, ValueError):
                    continue
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    os.close(handle)
                    continue
                with open(handle, "rb") as file:
                    content = file.read(min(MAX_FILE_BYTES, room) + 1)
                if len(content) <= min(MAX_FILE_BYTES, room):
                    room -= len(content)
                    found[path] = base64.b64encode(content).decode()
        return found


def restore_guards(isolation: Isolation) -> None:
    """Set two attributes of this process again, which the kernel resets when the user id changes."""
    LIBC.prctl(PR_SET_DUMPABLE, 0)
    if isolation.dies_with_parent:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def open_beneath(root: str, path: str, flags: int, make: bool = False) -> int:
    """Open a relative path below `root` without following links; `make` makes missing folders.

    Raises ValueError for a path that would leave `root`, OSError if the file cannot be opened.
    """
    *folders, name = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in (*folders, name)):
        raise ValueError("the path must be relative, without empty parts, '.' and '..'")
    here = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        for folder in folders:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=here)
            inner = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
        return os.open(name, flags | os.O_NOFOLLOW, 0o644, dir_fd=here)
    finally:
        os.close(here)
