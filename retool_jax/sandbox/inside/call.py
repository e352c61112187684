"""A running program: its pipes, the messages of it and its fork server, and the verdict at its end."""

import base64
import contextlib
import os
import select
import signal
import socket
import time

from capture import Streams
from tiers import Tier
from wire import send_packet

SIGNAL_NUMBERS = frozenset(signal.Signals)
MOST = 1e7  # seconds or MiB; larger values that a program reports about itself are not believed
MOST_MESSAGES = 1000  # read at once from a program; an honest one sends two or three
STARTING_S = 0.05  # between two checks of a program that has not started at its time limit


class CallerGone(Exception):
    """Input arrived, or ended, while a program was running."""


class Program:
    """A forked program, as the supervisor sees it."""

    def __init__(self, tier: Tier, request: dict, stdin: int):
        """Have `tier` fork it. `child.run_child` reads `request`. Raises OSError if it cannot be sent."""
        self.tier = tier
        self.uid: int | None = request["uid"]
        self.session = request["session"]
        self.cells = 1  # the number of a session's current cell
        self.streams: Streams | None = None
        self.status: int | None = None  # the wait status, after it has ended
        self.usage = (0.0, 0.0)  # CPU seconds, peak resident size in MiB
        self.unsent: list[bytes] = []  # what each stream still held in its buffer when it ended
        self.gone = False  # whether its fork server has reported that no process of the call is left
        self.started: float | None = None
        # What a session's interpreter reported at the end of a cell: exit code, CPU seconds, peak resident size in MiB.
        self.done: tuple[int, float, float] | None = None
        self.oom = False
        self.sent = time.monotonic()
        (self.out, out_end), (self.err, err_end) = os.pipe(), os.pipe()
        self.report, report_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.report.setblocking(False)
        send_packet(self.report, request)  # not through the fork server, of which later programs are copies
        tier.fork((stdin, out_end, err_end, report_end.fileno()))
        report_end.close()
        os.close(out_end)
        os.close(err_end)
        os.set_blocking(self.out, False)
        os.set_blocking(self.err, False)

    def feed(self, request: dict, stdin: int) -> None:
        """Send a session's interpreter its next cell."""
        self.done, self.oom = None, False
        self.cells += 1
        self.sent = self.started = time.monotonic()
        cell = {name: request[name] for name in ("code", "limits", "show_last_expression")}
        # Sent without waiting: `watch` notices an interpreter that has ended, and one that takes no further cell runs
        # into its time limit.
        with contextlib.suppress(OSError):
            send_packet(self.report, cell, (stdin,))

    def has_ended(self) -> bool:
        """Whether a session's interpreter has ended since its last cell."""
        while self.status is None and not self.tier.dead and select.select([self.tier.channel], [], [], 0)[0]:
            self.hear_tier()
        return self.status is not None or self.tier.dead

    def close(self) -> None:
        os.close(self.out)
        os.close(self.err)
        self.report.close()

    # -- listening ----------------------------------------------------------------------------------------------------

    def hear_tier(self) -> None:
        """Read one message of the fork server, waiting for it if necessary."""
        message = self.tier.receive()
        if message is None:
            return
        if message[0] == "ready":
            self.sent = time.monotonic()
        elif message[0] == "ended":
            _, self.status, user_s, system_s, peak_kb, self.gone, self.unsent = message
            self.usage = user_s + system_s, peak_kb / 1024
        elif message[0] == "gone":
            self.gone = True

    def hear_child(self) -> bool:
        """Read one message of the child; False if there is none.

        The program can write here too, so the message may be anything; but it can only be about the program itself.
        """
        try:
            data = self.report.recv(4096)
        except OSError:
            return False
        word, *numbers = data.split()[:5] or [b""]
        try:
            values = [float(number) for number in numbers]
            if word == b"started" and self.started is None:
                self.started = min(max(values[0], self.sent), time.monotonic())
            elif word == b"oom":
                self.oom = True
            elif word == b"done" and self.session:
                number, code, cpu_s, peak_mb = values
                if number == self.cells and 0 <= cpu_s < MOST and 0 <= peak_mb < MOST:
                    self.done = int(code) & 0xFF, cpu_s, peak_mb
        except (ValueError, IndexError, OverflowError):
            pass
        return bool(data)

    def hear_last(self) -> None:
        """Read what is left in the streams, and the last messages of the child."""
        self.streams.drain()
        for descriptor, data in zip((self.out, self.err), self.unsent, strict=False):
            self.streams.captures[descriptor].add(data)
        for _ in range(MOST_MESSAGES):  # a program that lives on may send messages for ever
            if not self.hear_child():
                break

    def watch(self, limits: dict, protocol_in: int, start_s: float, cell: bool) -> str:
        """Wait for the end of the program (or, with `cell`, of its cell), its time limit or its output limit.

        Returns "" if it ended by itself, "timeout", "output_limit", "unstarted" or "lost" (its fork server died).
        """
        self.streams = streams = Streams((self.out, self.err), limits)
        poll = select.poll()
        channel, report = self.tier.channel.fileno(), self.report.fileno()
        for descriptor in (self.out, self.err, protocol_in, channel, *([report] if cell else [])):
            poll.register(descriptor, select.POLLIN)
        verdict, deadline = None, self.sent + limits["wall_s"]
        while verdict is None:
            left = deadline - time.monotonic()
            if left <= 0:
                while self.started is None and self.hear_child():
                    pass
                # The time limit counts from the program's start; until now it counted from the request.
                if self.started is None:
                    verdict = "unstarted" if time.monotonic() > self.sent + start_s + limits["wall_s"] else None
                    deadline = time.monotonic() + STARTING_S
                elif self.started + limits["wall_s"] > deadline:
                    deadline = self.started + limits["wall_s"]
                else:
                    verdict = "timeout"
                continue
            for descriptor, _ in poll.poll(left * 1000):
                if descriptor == protocol_in:
                    raise CallerGone
                if descriptor == channel:
                    self.hear_tier()
                    if self.tier.dead:
                        verdict = "lost"
                    elif self.status is not None:
                        verdict = ""
                elif descriptor == report:
                    if not self.hear_child():
                        poll.unregister(report)
                    elif self.done is not None:
                        verdict = verdict or ""
                else:
                    streams.read(descriptor)
                    if descriptor not in streams.open:
                        poll.unregister(descriptor)
            if streams.over:
                verdict = "output_limit"
        self.ended_at = time.monotonic()
        return verdict


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def judge(verdict: str, program: Program, limits: dict, starved: bool) -> tuple[str, str]:
    """The result's status and message. `starved`: the kernel killed a process because memory ran out."""
    if program.streams.over:
        verdict = "output_limit"
    if verdict == "output_limit":
        return verdict, f"output limit of {limits['raw_output_bytes']} bytes exceeded"
    if program.oom:
        return "oom", f"memory limit of {limits['memory_mb']} MB exceeded"
    if starved:
        return "oom", f"memory limit exceeded: a program's processes together may use {limits['memory_mb']} MB"
    if verdict == "timeout":
        return verdict, f"time limit of {limits['wall_s']:g} s reached"
    if verdict == "lost":
        return "infra_error", "the fork server died"
    if program.started is None:
        return "infra_error", "the program could not be confined"
    code = program.done[0] if program.done else os.waitstatus_to_exitcode(program.status)
    if code < 0:
        return "user_error", f"killed by signal {signal.Signals(-code).name if -code in SIGNAL_NUMBERS else -code}"
    return ("user_error", f"exit code {code}") if code else ("success", "")


def describe_end(program: Program) -> dict:
    """How a program ended, as arguments of `answer`."""
    if program.done and program.status is None:
        code, cpu_s, peak_mb = program.done
    else:
        code = os.waitstatus_to_exitcode(signal.SIGKILL if program.status is None else program.status)
        cpu_s, peak_mb = program.usage
    wall_s = program.ended_at - (program.started or program.sent)
    used = {"wall_s": wall_s, "cpu_s": cpu_s, "peak_rss_mb": peak_mb}
    return {"return_code": code, **used, "streams": program.streams}


def answer(
    status: str,
    message: str,
    streams: Streams | None = None,
    files: dict[str, str] | None = None,
    clean: bool = True,
    ended: bool = False,
    **fields: float,
) -> dict:
    """The response. `fields` are further fields of the result, which has a default for each of them."""
    captures = streams.captures.values() if streams else ()
    shown = [
        {"data": base64.b64encode(c.kept()).decode(), "bytes": c.total, "truncated": c.truncated} for c in captures
    ]
    if fields.get("return_code", 0) < 0:
        fields["signal"] = -fields["return_code"]
    return {
        "result": {"status": status, "message": message, **fields},
        "streams": shown or [{"data": "", "bytes": 0, "truncated": False}] * 2,
        "files": files or {},
        "clean": clean,
        "ended": ended,
    }
