"""The program that compares two answers. `retool_jax.answers.workers` starts it and sends JSON through a pipe.

    question  [most children at the same time, CPU seconds of each, [["truth", "answer"], ...]]
    reply     [index of the pair, value of an `Outcome`], one for each pair as soon as it is decided

The first reply is an empty string, or says why math-verify cannot be imported. A forked child compares each pair. So
every comparison begins with the same state of the program, whatever was compared before, and a child that crashes
affects nothing else. A child's limit is CPU time, since a busy machine is not the answer's fault. The kernel enforces
it, since no limit inside Python can stop a long multiplication.
"""

import json
import logging
import os
import random
import re
import resource
import signal
from collections.abc import Callable
from enum import StrEnum
from multiprocessing.connection import Connection

MEMORY_LIMIT = 2 << 30  # bytes of address space; SymPy itself needs about a fifth
# Compared once before the first question, so that no child has to build the tables of the LaTeX parser.
_WARM_UP = [
    (r"\frac{\sqrt{2}}{2}", r"2^{-1}\sqrt{2}+0.0"),
    (r"(x+1)(x-1)^{n}\sin x", r"x^2-\ln(x)e^{x}"),
    (r"(1,\pi)\cup\{1,2\}", "2*pi"),
    (r"-1<x\le 2", "x_1=3y"),
]
_LOG = re.compile(r"\\log(?!\s*_|[a-zA-Z])")


class Outcome(StrEnum):
    """The result of a comparison. The last two are not the answer's fault."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"  # an error inside SymPy
    TIMEOUT = "timeout"  # out of its own time or memory
    LATE = "late"  # the time for all comparisons of the step ran out
    LOST = "lost"  # the process could not be started, or died


_CODES = {64 + index: outcome for index, outcome in enumerate(Outcome)}
# GMP aborts if it gets no memory. SIGKILL comes from outside: from a person, or from a kernel that is out of memory.
_SIGNALS = {signal.SIGPROF: Outcome.TIMEOUT, signal.SIGABRT: Outcome.TIMEOUT, signal.SIGKILL: Outcome.LOST}


def serve(descriptor: int) -> None:
    """Answer questions from the pipe with this file descriptor, until its other end is closed."""
    connection = Connection(descriptor)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT if hard < 0 else min(MEMORY_LIMIT, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()

    def reply(value: object) -> None:
        connection.send_bytes(json.dumps(value).encode())

    try:
        compare = comparison()
    except ImportError as error:
        return reply(f"math-verify cannot be imported ({error})")
    for truth, answer in _WARM_UP:
        compare(truth, answer)
    seed_random()
    reply("")
    while True:
        try:
            at_once, seconds, pairs = json.loads(connection.recv_bytes())
        except EOFError:
            return None
        waiting = list(enumerate(pairs))[::-1]
        running: dict[int, int] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                index, (truth, answer) = waiting.pop()
                child = os.fork()
                if child == 0:
                    connection.close()  # otherwise the trainer sees the end of this program only after the child's
                    _run_child(compare, truth, answer, seconds)
                running[child] = index
            child, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            reply([running.pop(child), _SIGNALS.get(-code) or _CODES.get(code, Outcome.UNDECIDED)])


def _run_child(compare: Callable[[str, str], Outcome], truth: str, answer: str, seconds: float) -> None:
    """Compare, and exit with the code of the outcome."""
    code = 1
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        code = next(code for code, outcome in _CODES.items() if outcome == compare(truth, answer))
    finally:
        os._exit(code)


def comparison() -> Callable[[str, str], Outcome]:
    """The function that compares a truth with an answer, without `$` or a box.

    Raises:
        ImportError: math-verify, or something that it needs, is missing.
    """
    from retool_jax.answers.equality import equal
    from retool_jax.answers.reading import read

    def compare(truth: str, answer: str) -> Outcome:
        outcome = Outcome.DIFFERENT  # if a text cannot be read
        try:
            for bare in (r"\log", r"\ln"):  # try a logarithm without a base as decimal and as natural, on both sides
                values = [read(_LOG.sub(lambda _, bare=bare: bare, text)) for text in (truth, answer)]
                outcome = Outcome.UNDECIDED
                if equal(*values):
                    return Outcome.EQUAL
                if not _LOG.search(truth + answer):
                    break
            return Outcome.DIFFERENT
        except MemoryError:
            return Outcome.TIMEOUT
        except Exception:  # SymPy may raise anything
            return outcome

    return compare


def seed_random() -> None:
    """Make SymPy's random test points the same in every process and in every run."""
    from sympy.core.random import seed

    seed(0)
    random.seed(0)
