"""Symbolic equality of answers: a few workers that run math-verify, and whose fault it is when one does not answer.

SymPy has no bound on what a short expression can cost (`9^{9^{9}}` fills the memory), and a process that runs JAX has
threads and must not fork. So comparisons live in interpreters of their own, started from scratch, which run
`retool_jax.answers.symbolic` and fork a child for each question. What a child does to itself (it runs out of time or
memory, or SymPy fails) is the answer's fault. A worker that does not start, dies or hangs is a fault of the machinery:
the question is asked again, and when that does not help the comparison is `LOST`, which is no verdict (contract 7).
"""

import atexit
import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import LifoQueue

from retool_jax.answers import symbolic
from retool_jax.answers.symbolic import Outcome
from retool_jax.errors import UserError

logger = logging.getLogger(__name__)

TIME_LIMIT = 5.0  # CPU seconds of one comparison
STEP_LIMIT = 60.0  # seconds for all comparisons of a step
START_LIMIT = 60.0  # seconds to import SymPy from a cold disk
STARVED = 8  # a comparison that did not get its CPU time in so many times as many seconds waits for the machine
PAUSES = (0.0, 0.5, 2.0)  # seconds before each try of a question
REMEMBERED = 65536  # comparisons


class SymbolicWorker:
    """One process that compares answers: started at the first question, replaced when it is lost.

    It serves one thread at a time.

    Args:
        time_limit: CPU seconds that one comparison may take; start-up is not counted.
    """

    def __init__(self, time_limit: float = TIME_LIMIT):
        self.time_limit = time_limit
        self.fault = ""  # why the last process was lost
        self._process: subprocess.Popen | None = None
        self._unread = b""

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, None when there is none."""
        return self._process.pid if self._process else None

    def compare(self, truth: str, answer: str, deadline: float = math.inf) -> Outcome:
        """Whether two LaTeX expressions (without `$` or a box) have the same value, or why nobody knows.

        Args:
            deadline: `time.monotonic()` from which on the outcome is `LATE`.

        Raises:
            UserError: math-verify cannot be imported.
        """
        question = json.dumps([truth, answer, self.time_limit]).encode() + b"\n"
        lost = False
        for pause in PAUSES:
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
            try:
                self.start(min(START_LIMIT, deadline - time.monotonic()))
                self._process.stdin.write(question)
                self._process.stdin.flush()
                outcome = self._answer(deadline)
            except OSError as error:
                self.close()
                outcome, self.fault = Outcome.LOST, str(error)
            else:
                self.fault = "a comparison was killed" if outcome is Outcome.LOST else self.fault
            if outcome is not Outcome.LOST:
                return outcome
            lost = True
        return Outcome.LOST if lost else Outcome.LATE

    def start(self, limit: float = START_LIMIT) -> None:
        """Start the process, if there is none, and wait until it has imported math-verify.

        Raises:
            UserError: math-verify cannot be imported.
            OSError: the process did not start, died, or did not get ready within `limit` seconds.
        """
        if self._process:
            return
        self._unread = b""
        self._process = subprocess.Popen(
            # -P: that file's folder is no import path, or its neighbours would shadow other packages' modules.
            [sys.executable, "-P", symbolic.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # SymPy's results can depend on the order of sets; a verdict must not differ between two runs.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            process_group=0,  # Ctrl-C is ours to handle, and its children end with it
        )
        if failure := self._read_line(limit):
            self.close()
            raise UserError(f"answers cannot be compared: {failure}; pip install math-verify, which this package needs")

    def close(self) -> None:
        """End the process and what it forked, if there is one; a later question starts another."""
        if not self._process:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.stdout.close()
        with contextlib.suppress(OSError):  # what was not written yet has no reader
            process.stdin.close()
        process.wait()

    def _answer(self, deadline: float) -> Outcome:
        """The outcome of the question that was asked; `OSError` when the worker is gone or hangs."""
        try:
            return Outcome(self._read_line(min(STARVED * self.time_limit, deadline - time.monotonic())))
        except TimeoutError:
            if time.monotonic() < deadline:
                raise
            self.close()
            return Outcome.LATE

    def _read_line(self, limit: float) -> str:
        """The next reply; `TimeoutError` after `limit` seconds, `ConnectionError` when the worker is gone."""
        deadline = time.monotonic() + limit
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            poll = select.poll()  # not select(): a trainer may hold more than 1024 open files
            poll.register(pipe, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"the answer worker did not reply within {limit:.1f} s")
            chunk = os.read(pipe, 65536)
            if not chunk:
                raise ConnectionError(f"the answer worker died with exit code {self._process.wait()}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)


class SymbolicPool:
    """Compares many answers at once, each in whichever worker is free, and remembers what is known.

    An outcome follows from the two expressions alone: every comparison begins from the same state.

    Args:
        workers: processes at most; each starts when it is needed.
        time_limit: CPU seconds of one comparison.
        step_limit: seconds of one `compare`.
    """

    def __init__(
        self,
        workers: int = min(4, os.cpu_count() or 1),
        time_limit: float = TIME_LIMIT,
        step_limit: float = STEP_LIMIT,
    ):
        self.workers = [SymbolicWorker(time_limit) for _ in range(workers)]
        self.step_limit = step_limit
        self.fault = ""  # why comparisons were lost, the last time that some were
        self._idle: LifoQueue[SymbolicWorker] = LifoQueue()
        for worker in reversed(self.workers):  # the first one is taken first, so that few are started
            self._idle.put(worker)
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Outcome] = {}

    def start(self) -> None:
        """Start one worker, to see that it can be done.

        Raises:
            UserError: math-verify cannot be imported, or no process can be started.
        """
        try:
            self.workers[0].start()
        except OSError as error:
            self.workers[0].close()
            raise UserError(
                f"the answer checker cannot be started ({error}); see that python runs here and start again"
            ) from error

    def compare(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Outcome]:
        """The outcome of every (truth, answer). The samples of a group often agree, and then cost one comparison.

        After `step_limit` seconds what is left is `LATE`; or `LOST`, if the machinery lost any, for that took the time.

        Raises:
            UserError: math-verify cannot be imported.
        """
        pairs = list(dict.fromkeys(pairs))
        with self._lock:
            # Short ones first: should the time run out, more of them are decided.
            open_pairs = sorted(
                (pair for pair in pairs if pair not in self._known), key=lambda pair: sum(map(len, pair))
            )
            found = dict(zip(open_pairs, self._ask(open_pairs), strict=True))
            late = [pair for pair, outcome in found.items() if outcome is Outcome.LATE]
            lost = [pair for pair, outcome in found.items() if outcome is Outcome.LOST]
            if lost:
                self.fault = next(worker.fault for worker in self.workers if worker.fault)
                lost += late
                found |= dict.fromkeys(late, Outcome.LOST)
                logger.warning("%d comparisons of answers were lost (%s); they are no signal", len(lost), self.fault)
            elif late:
                seconds = f"{self.step_limit:g}"
                logger.warning("%d answers were not compared within %s s and count as time-outs", len(late), seconds)
            if len(self._known) + len(found) > REMEMBERED:
                self._known.clear()
            found |= {pair: self._known[pair] for pair in pairs if pair in self._known}
            # What says nothing about the answer is asked again another time.
            self._known |= {p: o for p, o in found.items() if o not in (Outcome.LATE, Outcome.LOST)}
            return found

    def _ask(self, pairs: list[tuple[str, str]]) -> list[Outcome]:
        """The outcomes, in order."""
        deadline = time.monotonic() + self.step_limit

        def ask(pair: tuple[str, str]) -> Outcome:
            worker = self._idle.get()
            try:
                return worker.compare(*pair, deadline)
            finally:
                self._idle.put(worker)

        if not pairs:
            return []
        with ThreadPoolExecutor(min(len(self.workers), len(pairs))) as threads:
            return list(threads.map(ask, pairs))

    def close(self) -> None:
        """End all workers; a later question starts others."""
        with self._lock:
            for worker in self.workers:
                worker.close()


pool = SymbolicPool()
atexit.register(pool.close)
