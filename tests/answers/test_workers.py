r"""Symbolic comparisons: limits, whose fault it is if there is no outcome, and no process is left behind."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from retool_jax import train
from retool_jax.answers import Verdict, check, check_all, workers
from retool_jax.answers.symbolic import Outcome
from retool_jax.answers.workers import SymbolicPool
from retool_jax.errors import UserError
from retool_jax.sandbox.launch.procfs import stat_fields

PACKAGE_PARENT = Path(workers.__file__).resolve().parents[2]
ENDLESS = "9^{9^{9}}"
COUNTER = itertools.count(100)
PAIRS = [
    ("45", "40+5"),
    ("45", "40+6"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("x^2-1", "(x+1)(x-1)"),
    ("(3,4)", "4,3"),
    ("1", r"\frac{0}{0}"),
    ("1", r"\sin(x)^2+\cos(x)^2"),
    ("4x + 3y = 6", "8x + 6y = 12"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("45", "("),
]


@pytest.fixture(scope="module")
def running() -> Iterator[SymbolicPool]:
    pool = SymbolicPool(workers=2)
    pool.start()
    yield pool
    pool.close()


@pytest.fixture
def warm(running, monkeypatch) -> SymbolicPool:
    """A pool that is started, with limits for this test alone. It remembers what other tests asked."""
    monkeypatch.setattr(running, "time_limit", 5.0)
    monkeypatch.setattr(running, "step_limit", 60.0)
    return running


@pytest.fixture
def pool(monkeypatch) -> Iterator[SymbolicPool]:
    """A new pool instead of the process's own; it remembers nothing and is not started yet."""
    pool = SymbolicPool(workers=2)
    monkeypatch.setattr(workers, "pool", pool)
    yield pool
    pool.close()


@pytest.fixture
def no_process(monkeypatch) -> Callable[[], None]:
    """No worker can be started, until this is called."""
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.01, 0.01))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.sys, "executable", "/bin/false")
        yield patch.undo


@pytest.fixture
def no_math_verify(tmp_path, monkeypatch) -> None:
    """Only math-verify's reader is used, which is a separate package."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "latex2sympy2_extended.py").write_text("raise ImportError('broken install')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))


def is_running(pid: int) -> bool:
    """False for a zombie too: an orphan may find no parent that reaps it."""
    try:
        return stat_fields(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def is_gone(*pids: int) -> bool:
    """Within half a minute."""
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def endless() -> tuple[str, str]:
    """A question that was never asked before and has no end."""
    return str(next(COUNTER)), ENDLESS


def ask(pool: SymbolicPool, truth: str, answer: str) -> Outcome:
    return pool.compare([(truth, answer)])[truth, answer]


def child_of(pid: int, but: Sequence[int] = ()) -> int:
    """The process that was forked for a question, other than the known ones."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if others := [child for child in children if child not in but]:
            return others[0]
        time.sleep(0.01)
    raise AssertionError("no child")


# --- the answer's fault -----------------------------------------------------------------------------------------------


def test_a_slow_comparison_is_ended_and_the_next_one_answered(warm):
    first, warm.time_limit = warm.pid, 0.3
    assert ask(warm, *endless()) is Outcome.TIMEOUT
    warm.time_limit = 5.0
    assert ask(warm, "45", "41+4") is Outcome.EQUAL
    assert warm.pid == first


def test_a_comparison_that_wants_all_memory_is_the_answers_fault(warm):
    first, warm.time_limit = warm.pid, 1.0
    assert ask(warm, "1", "2^{2^{40}}") in (Outcome.TIMEOUT, Outcome.UNDECIDED, Outcome.DIFFERENT)
    warm.time_limit = 5.0
    assert ask(warm, "45", "42+3") is Outcome.EQUAL and warm.pid == first


def test_the_time_of_a_comparison_is_its_own_and_not_the_machines(warm):
    """A child that is stopped for longer than its limit, as on a busy machine, still gets its CPU time."""
    warm.time_limit = 0.4
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(warm, *endless())))
    asking.start()
    child = child_of(warm.pid)
    os.kill(child, signal.SIGSTOP)
    time.sleep(0.8)
    assert not found and is_running(child)
    os.kill(child, signal.SIGCONT)
    asking.join()
    assert found == [Outcome.TIMEOUT]


# --- the machinery's fault --------------------------------------------------------------------------------------------


def test_a_dead_process_is_replaced_and_the_question_asked_again(warm):
    first = warm.pid
    os.kill(first, signal.SIGKILL)
    assert ask(warm, "45", "40+6") is Outcome.DIFFERENT
    assert warm.pid not in (first, None)


def test_a_process_that_dies_over_its_questions_is_replaced_and_no_outcome_is_lost(warm):
    """Outcomes that were decided before are kept; the other questions are asked again."""
    warm.time_limit = 0.8
    found, slow = {}, endless()
    asking = threading.Thread(target=lambda: found.update(warm.compare([("45", "44+1"), slow])))
    asking.start()
    child_of(first := warm.pid)
    os.kill(first, signal.SIGKILL)
    asking.join()
    assert found == {("45", "44+1"): Outcome.EQUAL, slow: Outcome.TIMEOUT} and warm.pid != first


def test_a_process_that_hangs_is_replaced_and_the_question_asked_again(warm, monkeypatch):
    first, warm.time_limit = warm.pid, 0.5
    monkeypatch.setattr(workers, "STARVED", 8)
    os.kill(first, signal.SIGSTOP)
    assert ask(warm, "45", "40+7") is Outcome.DIFFERENT
    assert is_gone(first)


def test_a_comparison_that_is_killed_from_outside_is_asked_again_and_at_last_lost(warm, monkeypatch):
    """Fewer kills than attempts change nothing."""
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.1, 0.1))
    warm.time_limit = 1.0
    for kills, outcome in ((2, Outcome.TIMEOUT), (3, Outcome.LOST)):
        found = []
        asking = threading.Thread(target=lambda found=found: found.append(ask(warm, *endless())))
        asking.start()
        killed: list[int] = []  # so that a process that is still dying is not counted again
        for _ in range(kills):
            killed.append(child_of(warm.pid, killed))
            os.kill(killed[-1], signal.SIGKILL)
        asking.join()
        assert found == [outcome]


def test_without_a_worker_nothing_is_known_and_nothing_remembered(pool, no_process):
    lost = Verdict(False, "40+5", "checker_lost")
    assert check_all([(r"\boxed{40+5}", "45"), (r"\boxed{44}", "45")]) == [lost, Verdict(False, "44", "mismatch")]
    assert "died with exit code 1" in pool.fault
    with pytest.raises(UserError, match=r"the answer checker was lost \(.*exit code 1\); start the same command again"):
        check(r"\boxed{40+5}", "45")
    with pytest.raises(UserError, match=r"the answer checker cannot be started \(.*; see that python runs here"):
        pool.start()
    no_process()
    assert check(r"\boxed{40+5}", "45") == Verdict(True, "40+5", "symbolic")


def test_a_missing_math_verify_is_told_at_once_and_never_taken_for_a_wrong_answer(pool, no_math_verify):
    said = r"answers cannot be compared: math-verify cannot be imported \(broken install\); pip install math-verify"
    with pytest.raises(UserError, match=said):
        pool.start()
    with pytest.raises(UserError, match=said):
        check(r"\boxed{40+5}", "45")


def test_a_run_without_math_verify_does_not_begin(pool, no_math_verify, tmp_path):
    sizes = ["mesh.data=8", "mesh.fsdp=1", "sft.rows_per_micro=8", "rl.rows_per_micro=8", "model.hidden_size=32"]
    with pytest.raises(UserError, match="answers cannot be compared: math-verify cannot be imported"):
        train.main(["config=grpo", *sizes, "tools=none", f"run={tmp_path / 'run'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


# --- many at once -----------------------------------------------------------------------------------------------------


def test_outcomes_depend_neither_on_order_nor_on_workers(warm):
    found = []
    other = SymbolicPool(1)
    for pool, seed in ((warm, 0), (other, 1)):
        outcomes = pool.compare(random.Random(seed).sample(PAIRS, len(PAIRS)))
        found.append([outcomes[pair] for pair in PAIRS])
    other.close()
    assert found[0] == found[1]
    assert {Outcome.EQUAL, Outcome.DIFFERENT} <= set(found[0]) and Outcome.LOST not in found[0]


def test_comparisons_run_side_by_side_and_no_more_than_are_wanted(warm):
    warm.time_limit = 0.5
    asking = threading.Thread(target=warm.compare, args=([endless() for _ in range(3)],))
    asking.start()
    seen = set()
    while asking.is_alive():
        seen.add(len(Path(f"/proc/{warm.pid}/task/{warm.pid}/children").read_text().split()))
        time.sleep(0.01)
    assert max(seen) == 2


def test_more_questions_than_are_sent_at_once_are_all_answered(warm, monkeypatch):
    monkeypatch.setattr(workers, "BATCH", 3)
    pairs = [(str(n), f"{n}+{n % 2}") for n in range(8)]
    assert list(warm.compare(pairs).values()).count(Outcome.EQUAL) == 4


def test_equal_questions_are_asked_once(pool):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pool.time_limit = 0.5
    assert set(pool.compare([("1", ENDLESS)] * 100).values()) == {Outcome.TIMEOUT}
    assert pool.compare([("1", ENDLESS)]) == {("1", ENDLESS): Outcome.TIMEOUT}
    pool.close()
    assert pool.compare([("1", ENDLESS)]) == {("1", ENDLESS): Outcome.TIMEOUT} and pool.pid is None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 20, "a hundred times half a second would be 50 s of work"


def test_a_step_has_a_time_after_which_what_is_left_counts_as_a_time_out(warm, caplog):
    warm.step_limit = 1.0
    slow = [("1", f"{base}^{{9^{{9}}}}") for base in range(3, 6)]
    outcomes = warm.compare([*slow, ("45", "39+6")])
    assert outcomes.pop(("45", "39+6")) is Outcome.EQUAL, "the shortest is asked first"
    assert set(outcomes.values()) == {Outcome.LATE}
    assert "3 answers were not compared within 1 s and count as time-outs" in caplog.text
    warm.step_limit, warm.time_limit = 60.0, 0.2
    assert set(warm.compare(slow).values()) == {Outcome.TIMEOUT}, "being late is not remembered"


def test_what_the_machinery_made_late_is_lost(pool, no_process, monkeypatch):
    monkeypatch.setattr(workers, "PAUSES", (0.0, 0.2, 0.2))
    pool.step_limit = 0.7
    outcomes = pool.compare([("45", f"{n}+1") for n in range(20)])
    assert set(outcomes.values()) == {Outcome.LOST}


# --- nothing is left behind -------------------------------------------------------------------------------------------


def test_a_closed_process_is_gone_with_its_child_and_can_start_again(warm):
    pid, warm.time_limit, warm.step_limit = warm.pid, 60.0, 1.0
    asking = threading.Thread(target=warm.compare, args=([endless()],))
    asking.start()
    child = child_of(pid)
    asking.join()
    warm.close()
    assert is_gone(pid, child)
    warm.step_limit = 60.0
    assert ask(warm, "45", "43+2") is Outcome.EQUAL


def test_a_killed_trainer_leaves_no_worker_even_a_busy_one():
    program = f"""
        from retool_jax.answers.workers import SymbolicPool
        pool = SymbolicPool(time_limit=1.0)
        pool.start()
        print(pool.pid, flush=True)
        pool.compare([("1", "{ENDLESS}")])
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, cwd=PACKAGE_PARENT, stdout=subprocess.PIPE) as trainer:
        pid = int(trainer.stdout.readline())
        child = child_of(pid)
        trainer.kill()
    assert is_gone(pid, child)


def test_sympy_stays_out_of_the_trainer_and_exit_is_clean():
    program = r"""
        import sys
        from retool_jax.answers import check, workers
        assert workers.pool.pid is None, "started before it was needed"
        assert check(r"\boxed{40+5}", "45").correct
        assert not {"sympy", "math_verify", "jax", "numpy"} & set(sys.modules)
        print(workers.pool.pid)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=PACKAGE_PARENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_gone(int(done.stdout))
