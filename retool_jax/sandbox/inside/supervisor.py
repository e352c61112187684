"""The main program of a worker: it has programs forked, watches them, and answers over stdin and stdout.

It is started as `python -I -S supervisor.py SETUP` and uses only the standard library, so that every back-end can run
it inside its own isolation. SETUP is JSON: `packages` (folders for sys.path), `tiers` (names of fork servers),
`memory_mb` (the most that a program of this worker may have), `python` (the sys.version that it must run on, or
absent), `seccomp` (filter system calls), `events` (a descriptor of the memory group's counters, or absent), and only
for `process` `unshare` (leave the host's namespaces itself) and `scratch` (a folder for this worker alone).

Each frame (see `wire`) gets one frame as its answer; before that, a first frame says what was granted. Input during a
call, or the end of input, means that the caller has given up: the supervisor kills the program and exits.
"""

import base64
import contextlib
import gc
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import seccomp
from call import CallerGone, Program, answer, describe_end, judge
from files import WorkFolder
from isolation import Isolation, isolate
from reaper import Reaper
from scheduling import Scheduling
from tiers import Nursery, Tier, available
from wire import memory_file, read_frame, write_frame

START_S = 30.0  # how long a fork server may take to import its packages
SWEEP_S = 2.0


class Supervisor:
    """One worker: its fork servers, its working directory, and the program that may be running."""

    def __init__(self, setup: dict, isolation: Isolation, protocol_in: int):
        self.setup = setup
        self.isolation = isolation
        self.protocol_in = protocol_in
        self.nursery = Nursery(isolation, seccomp.build() if isolation.seccomp else None)
        self.folder = WorkFolder(isolation)
        self.tiers: dict[str, Tier] = {}
        self.names = available(setup["tiers"])
        self.calls = 0
        self.session: Program | None = None
        # Only if this worker sees no processes of others: then all processes of a user can be killed with one call.
        users = isolation.first_uid is not None and isolation.processes
        self.reaper = Reaper(isolation) if users else None
        # Whether every process seen here is this worker's or a program's.
        self.alone = isolation.processes and os.getpid() == 1
        # Under gVisor any program can change the priority and the cores of any process.
        self.scheduling = Scheduling() if os.getpid() == 1 and not isolation.immune else None
        self.oom_kills = 0  # `count_oom_kills` at the start of the call

    # -- fork servers -------------------------------------------------------------------------------------------------

    def tier(self, name: str) -> Tier:
        """The fork server of that name, or the base one if there is none; started if it does not run."""
        name = name if name in self.names else "base"
        self.reap()
        if name not in self.tiers or self.tiers[name].has_ended():
            if name in self.tiers:
                self.tiers.pop(name).channel.close()
            self.tiers[name] = Tier(name, self.nursery)
        return self.tiers[name]

    def warm(self, names: list[str]) -> list[str]:
        """Start these fork servers where necessary; returns those that run now."""
        tiers = [self.tier(name) for name in names]
        deadline = time.monotonic() + START_S
        for tier in tiers:
            tier.await_ready(deadline - time.monotonic())
        return [tier.name for tier in tiers if tier.ready]

    def reap(self) -> None:
        """Collect ended children: orphans of fork servers that died."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    # -- killing ------------------------------------------------------------------------------------------------------

    def others(self) -> tuple[dict[int, int], set[int]]:
        """Processes that are not this worker's own: the parent of each live one, and the dead ones.

        A dead one is a zombie, or it ended between the listing of /proc and the look at it.
        """
        known, parents, dead = self.known(), {}, set()
        for name in filter(str.isdecimal, os.listdir("/proc")):
            if int(name) in known:
                continue
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # the name in it may be any bytes
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                state, parent = b"X", b"0"
            if state in b"ZX":
                dead.add(int(name))
            else:
                parents[int(name)] = int(parent)
        return parents, dead

    def known(self) -> set[int]:
        """This worker's own processes."""
        reaper = {self.reaper.pid} if self.reaper is not None else set()
        return {os.getpid(), self.nursery.pid, *reaper, *self.live_tiers()}

    def live_tiers(self) -> list[int]:
        """Its fork servers."""
        return [tier.pid for tier in self.tiers.values() if not tier.dead]

    def victims(self) -> list[int]:
        """All processes of programs: every other process if this worker is alone here, else its other descendants."""
        parents, _ = self.others()
        if self.alone:
            return list(parents)
        known = self.known()
        below = set(known)
        while more := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= more
        return list(below - known)

    def nothing_left(self, dead: set[int]) -> bool:
        """Whether no process of a program lives. `dead` holds what the last look found dead, and is updated.

        A program that forks and ends again and again has a live process when /proc is listed, but this one may be dead
        when it is looked at, and its child is not in the list. So a process that was not dead before counts as alive.
        """
        if not self.alone:
            return not self.victims()
        parents, found = self.others()
        quiet = not parents and found <= dead
        dead.clear()
        dead.update(found)
        return quiet

    def kill_all(self, uid: int | None) -> None:
        """Kill every process of the call once; new ones may be forked meanwhile."""
        if self.reaper is not None:
            self.reaper.kill(uid)
            return
        for pid in self.victims():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def settle(self, program: Program) -> bool:
        """Kill what is left of a program and wait until it is gone; False if something is still there."""
        deadline, pause, dead = time.monotonic() + SWEEP_S, 0.0005, set()
        # A fork server that adopts the orphans knows when the last one is gone. On gVisor it can miss one that is just
        # being handed to it.
        trusted = program.tier.subreaper and self.isolation.immune
        while not (program.gone and (trusted or self.nothing_left(dead))):
            if time.monotonic() > deadline:
                return False
            self.kill_all(program.uid)
            if program.tier.dead:
                self.reap()
                program.gone = self.nothing_left(dead)
                if not program.gone:
                    time.sleep(pause)
            elif not program.gone:
                if select.select([program.tier.channel], [], [], pause)[0]:
                    program.hear_tier()
            else:
                self.reap()
                time.sleep(pause)
            pause = min(2 * pause, 0.02)
        if self.scheduling is not None:
            self.scheduling.restore([0, self.reaper.pid, self.nursery.pid, *self.live_tiers()])
        return True

    def kill_everything(self) -> None:
        """Kill all programs and fork servers before this process ends, because not every namespace ends with it."""
        for pid in (self.nursery.pid, *self.live_tiers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.tiers.clear()
        if self.alone:
            return
        deadline = time.monotonic() + SWEEP_S
        while (victims := self.victims()) and time.monotonic() < deadline:
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            time.sleep(0.001)
        if not self.isolation.files:
            self.folder.close()

    # -- calls --------------------------------------------------------------------------------------------------------

    def count_oom_kills(self) -> int:
        """How many processes of this worker the kernel has killed because memory ran out; 0 if that is unknown."""
        if "events" not in self.setup:
            return 0
        text = os.pread(self.setup["events"], 4096, 0).decode()
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)

    def start(self, request: dict, session: bool) -> Program:
        """Pass a program to its fork server. The working directory is open already."""
        content = {
            "code": request["code"],
            "show_last_expression": request["show_last_expression"],
            "allowed_modules": request["allowed_modules"],
            "limits": request["limits"],
            "uid": self.isolation.uid(self.calls),
            "session": session,
            "fetch": bool(request["fetch"]),
            "memory_mb": max(self.setup["memory_mb"], request["limits"]["memory_mb"]),
            "oom_first": "events" in self.setup,
        }
        with opened_stdin(request["stdin"]) as stdin:
            return Program(self.tier(request["tier"]), content, stdin)

    def run(self, request: dict) -> dict:
        """Run one program to its end; returns the response."""
        self.calls += 1
        self.oom_kills = self.count_oom_kills()
        uid, limits = self.isolation.uid(self.calls), request["limits"]
        self.folder.open(limits, uid)
        try:
            if problem := self.folder.put(request["files"], uid):
                return answer("rejected", problem)
            program = self.start(request, session=False)
            try:
                verdict = program.watch(limits, self.protocol_in, START_S, cell=False)
                return self.conclude(verdict, program, request, clean=self.settle(program), ended=False)
            finally:
                program.close()
        finally:
            self.folder.close()

    def cell(self, request: dict) -> dict:
        """Run one cell of the session, in its interpreter or in a new one; returns the response."""
        limits, fresh = request["limits"], self.session is None
        self.oom_kills = self.count_oom_kills()
        if fresh:
            self.calls += 1
            self.folder.open(limits, self.isolation.uid(self.calls))
        program, uid = self.session, self.isolation.uid(self.calls)
        try:
            if problem := self.folder.put(request["files"], uid):
                if fresh:
                    self.folder.close()
                return answer("rejected", problem, ended=fresh)
            if program is not None and program.has_ended():
                clean = self.end_session()
                message = "the session's interpreter had ended since the last cell; the next one starts afresh"
                return answer("user_error", message, return_code=1, clean=clean, ended=True)
            if program is None:
                program = self.session = self.start(request, session=True)
            else:
                with opened_stdin(request["stdin"]) as stdin:
                    program.feed(request, stdin)
            verdict = program.watch(limits, self.protocol_in, START_S, cell=True)
            ended = bool(verdict) or program.done is None
            clean = self.settle(program) if ended else True
            response = self.conclude(verdict, program, request, clean, ended)
        except BaseException:
            self.end_session()
            raise
        if ended:
            self.end_session()
        return response

    def conclude(self, verdict: str, program: Program, request: dict, clean: bool, ended: bool) -> dict:
        """The response about a program or a cell that has ended."""
        program.hear_last()
        # A program that succeeded did not need what the kernel killed.
        starved = program.status != 0 and self.count_oom_kills() > self.oom_kills
        status, message = judge(verdict, program, request["limits"], starved)
        files = self.folder.take(request["fetch"], program.uid)
        return answer(status, message, **describe_end(program), files=files, clean=clean, ended=ended)

    def end_session(self) -> bool:
        """Kill the session's interpreter if there is one; False if something of it is still there."""
        if self.session is None:
            return True
        program, self.session = self.session, None
        clean = self.settle(program)
        program.close()
        self.folder.close()
        return clean


@contextlib.contextmanager
def opened_stdin(content: str) -> Iterator[int]:
    """A descriptor from which the decoded bytes of a base64 text can be read."""
    data = base64.b64decode(content)
    descriptor = memory_file("stdin", data) if data else os.open("/dev/null", os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def main() -> None:
    setup = json.loads(sys.argv[1])
    if setup.get("python", sys.version) != sys.version:
        sys.exit(f"the runtime should be Python {setup['python']!r}, but this is {sys.version!r}")
    # The protocol moves away from 0 and 1, where a stray print or a program's input() could reach it.
    protocol_in, protocol_out = os.dup(0), os.dup(1)
    if "events" in setup:  # moved to a low number, because a fork server closes only those below 256
        given, setup["events"] = setup["events"], os.dup(setup["events"])
        os.close(given)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    isolation = isolate(setup)
    del sys.path[0]
    sys.path += setup["packages"]
    gc.disable()
    supervisor = Supervisor(setup, isolation, protocol_in)
    if not supervisor.warm(["base"]):
        sys.exit("the fork server 'base' did not start")
    granted = {"own_uid": isolation.first_uid is not None}
    granted.update((name, getattr(isolation, name)) for name in ("network", "processes", "files", "seccomp"))
    granted["memory_group"] = "events" in setup
    write_frame(protocol_out, {"isolation": granted})
    try:
        while True:
            request = read_frame(protocol_in)
            if request["op"] == "warm":
                response = {"warm": supervisor.warm(request["tiers"])}
            elif request["op"] == "cell":
                response = supervisor.cell(request)
            else:
                supervisor.end_session()
                response = supervisor.run(request)
            write_frame(protocol_out, response)
            if not response.get("clean", True):
                break
            gc.collect(0)
    except (EOFError, CallerGone, BrokenPipeError):
        pass
    finally:
        supervisor.kill_everything()


if __name__ == "__main__":
    main()
