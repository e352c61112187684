"""Symbolic equality of answers: the process that compares, and whose fault it is when it does not answer.

SymPy has no bound on what a short expression can cost (`9^{9^{9}}` fills the memory), and a process that runs JAX has
threads and must not fork. So comparisons live in an interpreter of their own, started from scratch, which runs
`retool_jax.answers.symbolic` and forks a child for each question. What a child does to itself (it runs out of time or
memory, or SymPy fails) is the answer's fault. A process that does not start, dies or hangs is a fault of the machinery:
the question is asked again, and when that does not help the comparison is `LOST`, which is no verdict (contract 7).
"""

import atexit
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from retool_jax.answers.symbolic import Outcome
from retool_jax.errors import UserError

logger = logging.getLogger(__name__)

Pair = tuple[str, str]  # truth and answer, LaTeX without `$` or a box

TIME_LIMIT = 1.0  # CPU seconds of one comparison; the slowest of MATH-500's and DeepMath's takes a quarter of that
STEP_LIMIT = 60.0  # seconds for all comparisons of a step
START_LIMIT = 60.0  # seconds to import SymPy from a cold disk
STARVED = 40  # nothing decided in so many times as many seconds as a comparison may compute: the process hangs
PAUSES = (0.0, 0.5, 2.0)  # seconds before each try of a question
BATCH = 200  # questions sent at once: as many as a socket holds, so that one that is not read keeps nobody waiting
REMEMBERED = 65536  # comparisons
_PROGRAM = "import sys; from retool_jax.answers.symbolic import serve; serve(int(sys.argv[1]))"


class SymbolicPool:
    """Compares many answers at once, some of them side by side, and remembers what is known.

    An outcome follows from the two expressions alone: every comparison begins from the same state. The process is
    started at the first question and replaced when it is lost. One thread is served at a time.

    Args:
        workers: comparisons side by side at most.
        time_limit: CPU seconds of one comparison; start-up is not counted.
        step_limit: seconds of one `compare`.
    """

    def __init__(
        self,
        workers: int = min(4, os.cpu_count() or 1),
        time_limit: float = TIME_LIMIT,
        step_limit: float = STEP_LIMIT,
    ):
        self.workers = workers
        self.time_limit = time_limit
        self.step_limit = step_limit
        self.fault = ""  # why comparisons were lost, the last time that some were
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._known: dict[Pair, Outcome] = {}

    @property
    def pid(self) -> int | None:
        """Of the process that forks for each question, None when there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process, to see that it can be done.

        Raises:
            UserError: math-verify cannot be imported, or no process can be started.
        """
        try:
            with self._lock:
                self._open(time.monotonic() + START_LIMIT)
        except OSError as error:
            self.close()
            raise UserError(
                f"the answer checker cannot be started ({error}); see that python runs here and start again"
            ) from error

    def compare(self, pairs: Iterable[Pair]) -> dict[Pair, Outcome]:
        """The outcome of every (truth, answer). The samples of a group often agree, and then cost one comparison.

        After `step_limit` seconds what is left is `LATE`; or `LOST`, if the machinery failed, for that took the time.

        Raises:
            UserError: math-verify cannot be imported.
        """
        pairs = list(dict.fromkeys(pairs))
        with self._lock:
            known = {pair: self._known[pair] for pair in pairs if pair in self._known}
            # Short ones first: should the time run out, more of them are decided.
            found = self._ask(sorted((p for p in pairs if p not in known), key=lambda pair: sum(map(len, pair))))
            late, lost = (list(found.values()).count(outcome) for outcome in (Outcome.LATE, Outcome.LOST))
            if lost:
                logger.warning("%d comparisons of answers were lost (%s); they are no signal", lost, self.fault)
            if late:
                seconds = f"{self.step_limit:g}"
                logger.warning("%d answers were not compared within %s s and count as time-outs", late, seconds)
            if len(self._known) + len(found) > REMEMBERED:
                self._known.clear()
            # What says nothing about the answer is asked again another time.
            self._known |= {p: o for p, o in found.items() if o not in (Outcome.LATE, Outcome.LOST)}
            return known | found

    def close(self) -> None:
        """End the process and what it forked, if there is one; a later question starts another."""
        with self._lock:
            self._close()

    def _ask(self, pairs: list[Pair]) -> dict[Pair, Outcome]:
        deadline = time.monotonic() + self.step_limit
        found: dict[Pair, Outcome] = {}
        failed = False
        for pause in PAUSES:
            left = [pair for pair in pairs if found.get(pair, Outcome.LOST) is Outcome.LOST]
            if not left:
                break
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                break
            try:
                self._open(min(deadline, time.monotonic() + START_LIMIT))
                for pair, outcome in self._outcomes(left, deadline):
                    found[pair] = outcome
            except OSError as error:
                self._close()
                if time.monotonic() >= deadline:
                    break
                failed, self.fault = True, str(error)
            except BaseException:  # an interrupt would leave replies that the next question must not read
                self._close()
                raise
        if Outcome.LOST in found.values() and not failed:
            failed, self.fault = True, "a comparison was killed"
        return {pair: found.get(pair, Outcome.LOST if failed else Outcome.LATE) for pair in pairs}

    def _outcomes(self, pairs: list[Pair], deadline: float) -> Iterator[tuple[Pair, Outcome]]:
        """As they are decided; `OSError` when the process is gone, hangs, or has no time left."""
        for begin in range(0, len(pairs), BATCH):
            batch = pairs[begin : begin + BATCH]
            self._connection.send_bytes(json.dumps([self.workers, self.time_limit, batch]).encode())
            for _ in batch:
                index, outcome = self._receive(min(deadline, time.monotonic() + STARVED * self.time_limit))
                yield batch[index], Outcome(outcome)

    def _open(self, deadline: float) -> None:
        """Start the process, if there is none, and wait until it has imported math-verify.

        Raises:
            UserError: math-verify cannot be imported.
            OSError: the process did not start, died, or did not get ready in time.
        """
        if self._process:
            return
        self._connection, theirs = Pipe()
        paths = [os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # SymPy's results can depend on the order of sets; a verdict must not differ between two runs.
                env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                process_group=0,  # Ctrl-C is ours to handle, and its children end with it
            )
        if failure := self._receive(deadline):
            self._close()
            raise UserError(f"answers cannot be compared: {failure}; pip install math-verify, which this package needs")

    def _receive(self, deadline: float) -> object:
        """The next reply; `TimeoutError` from the deadline on, `ConnectionError` when the process is gone."""
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("the answer worker did not reply in time")
        try:
            return json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise ConnectionError(f"the answer worker died with exit code {self._process.wait()}") from None

    def _close(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
        if self._connection:
            self._connection.close()
        self._process = self._connection = None


pool = SymbolicPool()
atexit.register(pool.close)
