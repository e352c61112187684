"""Symbolic equality of two answers, decided by math-verify in a child process with a time limit.

SymPy has no bound on what a short expression can cost (`9^{9^{9}}` fills the memory), math-verify's own limit is
`signal.alarm`, which works in a main thread only and cannot stop a long multiplication, and a process that runs JAX
has threads and must not fork. So the comparison lives in an interpreter of its own, started from scratch at the first
question, spoken to in lines of JSON, and killed when it is late. This module is both ends: imported, it is the client
and needs the standard library only; run as a program, it is the worker and imports math-verify.

    question  ["truth", "answer"]          reply  true | false | null (it failed)
"""

import atexit
import contextlib
import functools
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from typing import IO

logger = logging.getLogger(__name__)

START_LIMIT = 60.0  # seconds to import SymPy from a cold disk
MEMORY_LIMIT = 4 << 30  # bytes of address space; SymPy itself needs about a tenth


class SymbolicWorker:
    """A math-verify process that is started at the first question and replaced after a time-out or a death.

    Questions from several threads take turns.

    Args:
        time_limit: seconds that one comparison may take; start-up is not counted.
    """

    def __init__(self, time_limit: float = 5.0):
        self.time_limit = time_limit
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._unread = b""
        self._missing = False

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, None when there is none."""
        return self._process.pid if self._process else None

    def equal(self, truth: str, answer: str) -> bool | None:
        """Whether two LaTeX expressions (without `$` or a box) have the same value; None when undecided.

        Undecided is: out of time or memory, an error inside SymPy, or math-verify is not installed. A worker that is
        found dead is replaced and asked once more, as what killed it may have been the machine; if that one dies too,
        or none can be started, the error is `ConnectionError`.
        """
        question = json.dumps([truth, answer]).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                try:
                    return self._ask(question)
                except TimeoutError:
                    self._stop()
                    return None
                except OSError as error:
                    self._stop()
                    reason = error
                    logger.warning("the answer worker died (%s)", error)
            raise ConnectionError(f"two answer workers died on one question: {reason}")

    def close(self) -> None:
        """End the worker, if there is one; a later question starts another."""
        with self._lock:
            self._stop()

    def _ask(self, question: bytes) -> bool | None:
        if self._missing or (self._process is None and not self._start()):
            return None
        self._process.stdin.write(question)
        self._process.stdin.flush()
        return self._read_line(self.time_limit)

    def _start(self) -> bool:
        """Start the interpreter and wait until it has imported math-verify; False when that is not installed."""
        self._unread = b""
        self._process = subprocess.Popen(
            # -P: this file's folder is no import path, or its neighbours would shadow other packages' modules.
            [sys.executable, "-P", __file__, str(self.time_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # SymPy's results can depend on the order of sets; a verdict must not differ between two runs.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        failure = self._read_line(START_LIMIT)
        if failure:
            logger.warning("answers are compared as numbers and text only: %s", failure)
            self._missing = True
            self._stop()
        return not failure

    def _read_line(self, limit: float) -> bool | str | None:
        """The next reply; `TimeoutError` after `limit` seconds, `ConnectionError` when the worker is gone."""
        deadline = time.monotonic() + limit
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            poll = select.poll()  # not select(): a trainer may hold more than 1024 open files
            poll.register(pipe, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"no reply within {limit} s")
            chunk = os.read(pipe, 65536)
            if not chunk:
                raise ConnectionError(f"exit code {self._process.wait()}")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.stdout.close()
            with contextlib.suppress(OSError):  # what was not written yet has no reader
                self._process.stdin.close()
            self._process.wait()
            self._process = None


_worker = SymbolicWorker()
atexit.register(_worker.close)


# The samples of a group often agree, and then cost one comparison, or wait for one time-out. A death is an exception
# and so is not remembered: it says nothing about the answer.
_remembered = functools.lru_cache(maxsize=65536)(_worker.equal)


def symbolically_equal(truth: str, answer: str) -> bool | None:
    """`SymbolicWorker.equal` on the process-wide worker, remembered; None also when no worker stays alive."""
    try:
        return _remembered(truth, answer)
    except ConnectionError:
        return None


def _serve(questions: IO[str], replies: IO[str], time_limit: float) -> None:
    """The worker's loop: one line in, one line out, until the parent closes the pipe."""
    import faulthandler
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT if hard < 0 else min(MEMORY_LIMIT, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()

    def reply(value: bool | str | None) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        return reply(f"math-verify cannot be imported ({error}); pip install math-verify")

    # LaTeX only: math-verify's plain-expression reader ends in SymPy's parse_expr, which is eval().
    # units=False: it takes any trailing m, g or d for a unit, so that 5d would equal 5.
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    reader = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=rules)

    def value(latex: str) -> list:
        return parse(rf"\boxed{{{latex}}}", [reader], fallback_mode="no_fallback", parsing_timeout=None)

    reply("")
    for line in questions:
        # A parent that was killed in the middle of a question cannot kill its worker: this timer does.
        faulthandler.dump_traceback_later(time_limit + 1, exit=True)
        try:
            truth, answer = (value(latex) for latex in json.loads(line))
            # 12 decimals, not the default 6: 0.0000672 is not 0.0000674, and 2.236 is not the square root of 5.
            equal = bool(truth and answer) and verify(truth, answer, float_rounding=12, timeout_seconds=None)
        except Exception:  # SymPy raises everything there is, and the next question wants its answer
            equal = None
        faulthandler.cancel_dump_traceback_later()
        reply(equal)


if __name__ == "__main__":
    _replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    _serve(sys.stdin, _replies, float(sys.argv[1]))
