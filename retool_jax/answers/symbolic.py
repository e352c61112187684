"""The program that compares two answers with math-verify. `retool_jax.answers.workers` starts it and writes JSON lines.

    question  ["truth", "answer", CPU seconds]          reply  the value of an `Outcome`

The first reply is an empty string, or says why math-verify cannot be imported. Each question is answered by a forked
child. So every question finds the state that the program had when it began, whatever was asked before, and a child that
crashes takes nothing with it. The limit of a child is CPU time and the kernel ends it: math-verify's own limit cannot
stop a long multiplication, and a busy machine is not the answer's fault.
"""

import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import IO

MEMORY_LIMIT = 2 << 30  # bytes of address space; SymPy itself needs about a fifth
# Read once before the first question, so that no child has to build the tables of the LaTeX parser.
_REHEARSED = [(r"\frac{\sqrt{2}}{2}", r"2^{-1}\sqrt{2}+0.0"), ("(x+1)(x-1)", "x^2-1"), (r"\{1,\pi\}", "(1,2]")]


class Outcome(StrEnum):
    """What became of a comparison. The answer is to blame for all but the last two."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"  # an error inside SymPy
    TIMEOUT = "timeout"  # out of its own time or memory
    LATE = "late"  # the time for all comparisons of its step was over
    LOST = "lost"  # no worker could be started or stayed alive; says nothing about the answer


_CODES = {64 + index: outcome for index, outcome in enumerate(Outcome)}
# GMP aborts where memory ends. Only others send SIGKILL: somebody, or the kernel of a machine without memory.
_SIGNALS = {signal.SIGPROF: Outcome.TIMEOUT, signal.SIGABRT: Outcome.TIMEOUT, signal.SIGKILL: Outcome.LOST}


def serve(questions: IO[str], replies: IO[str]) -> None:
    """One line in, one line out, until the parent closes the pipe."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT if hard < 0 else min(MEMORY_LIMIT, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()

    def reply(value: str) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        compare = comparison()
    except ImportError as error:
        return reply(f"math-verify cannot be imported ({error})")
    for truth, answer in _REHEARSED:
        compare(truth, answer)
    seed_random()
    reply("")
    for line in questions:
        truth, answer, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.setitimer(signal.ITIMER_PROF, seconds)
                code = next(code for code, outcome in _CODES.items() if outcome == compare(truth, answer))
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        reply(_SIGNALS.get(-code) or _CODES.get(code, Outcome.UNDECIDED))


def comparison() -> Callable[[str, str], Outcome]:
    """The function that compares a truth with an answer, two LaTeX expressions without `$` or a box.

    Raises:
        ImportError: math-verify is not there, or something that it needs.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: math-verify's plain-expression reader ends in SymPy's parse_expr, which is eval().
    # units=False: it takes any trailing m, g or d for a unit, so that 5d would equal 5.
    rules = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    reader = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=rules)

    def value(latex: str) -> list:
        return parse(rf"\boxed{{{latex}}}", [reader], fallback_mode="no_fallback", parsing_timeout=None)

    def compare(truth: str, answer: str) -> Outcome:
        try:
            left, right = value(truth), value(answer)
            # 12 decimals, not the default 6: 0.0000672 is not 0.0000674, and 2.236 is not the square root of 5.
            equal = bool(left and right) and verify(left, right, float_rounding=12, timeout_seconds=None)
        except MemoryError:
            return Outcome.TIMEOUT
        except Exception:  # SymPy raises everything there is
            return Outcome.UNDECIDED
        return Outcome.EQUAL if equal else Outcome.DIFFERENT

    return compare


def seed_random() -> None:
    """SymPy tries equalities at random points: the same ones in every worker and in every run."""
    from sympy.core.random import seed

    seed(0)
    random.seed(0)


if __name__ == "__main__":
    _replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    serve(sys.stdin, _replies)
