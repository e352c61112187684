"""Kills all processes of one user with one call, so that none can escape by forking.

The killer must be that user for a moment, and meanwhile the user's processes can send it signals. Process 1 of Linux
ignores them; elsewhere (gVisor) a separate process does the killing.
"""

import contextlib
import os
import select
import signal
import socket

from files import restore_guards
from isolation import LIBC, PR_SET_PDEATHSIG, Isolation

ANSWER_S = 0.5


def kill_user(uid: int) -> None:
    """Kill every process of a user: become that user, kill, and become root again."""
    os.setresuid(uid, uid, 0)
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    finally:
        os.setresuid(0, 0, 0)


class Reaper:
    """Kills processes for the supervisor, which must be root."""

    def __init__(self, isolation: Isolation):
        self.isolation = isolation
        self.pid: int | None = None  # the separate process, if there is one
        self.channel: socket.socket | None = None
        if not isolation.immune:
            self._start()

    def _start(self) -> None:
        if self.channel is not None:
            self.channel.close()
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self._serve(other)
        other.close()

    def _serve(self, channel: socket.socket) -> None:
        try:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(channel.fileno(), 3)
            channel.detach()
            os.closerange(4, 256)
            while uid := os.read(3, 32):
                kill_user(int(uid))
                os.write(3, b"done")
        finally:
            os._exit(0)

    def kill(self, uid: int) -> None:
        """Kill every process of a user. They may kill the separate process first; then it is restarted: call again."""
        if self.isolation.immune:
            kill_user(uid)
            restore_guards(self.isolation)
            return
        try:
            self.channel.send(b"%d" % uid)
            answered = select.select([self.channel], [], [], ANSWER_S)[0] and self.channel.recv(32)
        except OSError:
            answered = False
        if not answered:
            self._start()
