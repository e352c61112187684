"""Symbolic equality of answers: the process that compares, and whose fault it is if it does not answer.

A short expression can cost SymPy any amount of time and memory (`9^{9^{9}}` fills the memory), and a process that runs
JAX has threads and must not fork. So comparisons run in a separate new interpreter, which runs
`retool_jax.answers.symbolic` and forks a child for each question. If a child runs out of time or memory, or SymPy fails
in it, that is the answer's fault. If the process does not start, dies or hangs, that is the machinery's fault: the
question is asked again, and if that does not help the comparison is `LOST`, which is not a verdict (contract 7).
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

TIME_LIMIT = 1.0  # CPU seconds of one comparison; the slowest of MATH-500 and DeepMath takes a quarter of that
STEP_LIMIT = 60.0  # seconds for all comparisons of a step
START_LIMIT = 60.0  # seconds to import SymPy from a cold disk
STARVED = 40  # if no reply comes within this many times the time limit, the process hangs
PAUSES = (0.0, 0.5, 2.0)  # seconds before each attempt
BATCH = 200  # pairs sent together: they fit into a socket's buffer, so sending never blocks
REMEMBERED = 65536  # comparisons
_PROGRAM = "import sys; from retool_jax.answers.symbolic import serve; serve(int(sys.argv[1]))"


class SymbolicPool:
    """Compares many answers, several at the same time, and remembers the outcomes.

    An outcome depends only on the two expressions, because every comparison begins with the same state. The process is
    started at the first question and replaced if it is lost. Only one thread is served at a time.

    Args:
        workers: the most comparisons at the same time.
        time_limit: CPU seconds of one comparison, without start-up.
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
        self.fault = ""  # why comparisons were lost most recently
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()
        self._known: dict[Pair, Outcome] = {}

    @property
    def pid(self) -> int | None:
        """The id of the process that forks for each question; None if there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process now, so that a failure is seen before it is needed.

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
        """The outcome of every (truth, answer). Equal pairs, which are common in a group, cost only one comparison.

        Pairs that are not decided after `step_limit` seconds are `LATE`, or `LOST` if the machinery failed meanwhile.

        Raises:
            UserError: math-verify cannot be imported.
        """
        pairs = list(dict.fromkeys(pairs))
        with self._lock:
            known = {pair: self._known[pair] for pair in pairs if pair in self._known}
            # Short ones first, so that more of them are decided if the time runs out.
            found = self._ask(sorted((p for p in pairs if p not in known), key=lambda pair: sum(map(len, pair))))
            late, lost = (list(found.values()).count(outcome) for outcome in (Outcome.LATE, Outcome.LOST))
            if lost:
                logger.warning("%d comparisons of answers were lost (%s); they are no signal", lost, self.fault)
            if late:
                seconds = f"{self.step_limit:g}"
                logger.warning("%d answers were not compared within %s s and count as time-outs", late, seconds)
            if len(self._known) + len(found) > REMEMBERED:
                self._known.clear()
            # Outcomes that say nothing about the answer are not remembered.
            self._known |= {p: o for p, o in found.items() if o not in (Outcome.LATE, Outcome.LOST)}
            return known | found

    def close(self) -> None:
        """End the process and its children, if there is one. A later question starts another process."""
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
            except BaseException:  # after an interrupt, unread replies must not reach the next question
                self._close()
                raise
        if Outcome.LOST in found.values() and not failed:
            failed, self.fault = True, "a comparison was killed"
        return {pair: found.get(pair, Outcome.LOST if failed else Outcome.LATE) for pair in pairs}

    def _outcomes(self, pairs: list[Pair], deadline: float) -> Iterator[tuple[Pair, Outcome]]:
        """Outcomes as soon as they are decided; `OSError` if the process is gone, hangs, or has no time left."""
        for begin in range(0, len(pairs), BATCH):
            batch = pairs[begin : begin + BATCH]
            self._connection.send_bytes(json.dumps([self.workers, self.time_limit, batch]).encode())
            for _ in batch:
                index, outcome = self._receive(min(deadline, time.monotonic() + STARVED * self.time_limit))
                yield batch[index], Outcome(outcome)

    def _open(self, deadline: float) -> None:
        """Start the process if there is none, and wait until it has imported math-verify.

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
                # SymPy's results can depend on the order of sets, but verdicts must be the same in every run.
                env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                process_group=0,  # so that only this process gets Ctrl-C, and the children can be ended together
            )
        if failure := self._receive(deadline):
            self._close()
            raise UserError(f"answers cannot be compared: {failure}; pip install math-verify, which this package needs")

    def _receive(self, deadline: float) -> object:
        """The next reply; `TimeoutError` after the deadline, `ConnectionError` if the process is gone."""
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
