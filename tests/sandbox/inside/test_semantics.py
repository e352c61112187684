"""What a program finds inside: the language, its streams, its limits."""

import asyncio

import pytest

from retool_jax.sandbox import Limits, SandboxConfig, ToolResult, open_sandbox, tool_text
from retool_jax.sandbox.text import DIGITS_HELP

PATIENT = Limits(wall_s=60)
PROGRAMS = {
    "print": ("print(2 + 2)", "4\n"),
    "last expression": ("x = 20\nx + 1", "21\n"),
    "last expression as a notebook shows it": ("'a'", "'a'\n"),
    "None is not shown": ("print('a')", "a\n"),
    "an assignment stays one": ("x = [1,\n 2]", ""),
    "a loop's value is not shown": ("for i in range(2):\n    i", ""),
    "multi-line strings keep their indentation": ("s = '''a\n  b\n'''\nprint(s, end='')", "a\n  b\n"),
    "recursion": ("def f(n):\n    return 1 if n == 0 else n * f(n - 1)\nf(5)", "120\n"),
    "comprehensions see globals": ("n = 3\n[n * i for i in range(n)]", "[0, 3, 6]\n"),
    "main guard": ("def main():\n    print('main')\nif __name__ == '__main__':\n    main()", "main\n"),
    "classes pickle": ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)", "A\n"),
    "source is there for inspect": (
        "import inspect\ndef f():\n    return 1\nprint(inspect.getsource(f), end='')",
        "def f():\n    return 1\n",
    ),
    "exit with 0": ("print(1)\nexit()\nprint(2)", "1\n"),
    "atexit and threads finish": (
        "import atexit, threading, time\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.05), print('thread'))).start()",
        "thread\nlast\n",
    ),
    "byte order mark": ("\ufeffprint(1)", "1\n"),
    "unicode": ("print('π ≈ 3')", "π ≈ 3\n"),
    "lone surrogate": ("print('\\ud800')", "\\ud800\n"),
    "empty": ("", ""),
    "numpy": ("import numpy as np\nint(np.arange(4).sum())", "6\n"),
    "process pool": ("import multiprocessing as m\nwith m.Pool(2) as p:\n    print(p.map(abs, [-1, 2]))", "[1, 2]\n"),
    "a library in C prints": ("print(1)\nimport ctypes\nctypes.CDLL(None).puts(b'2')\nNone", "1\n2\n"),
    "as many processes as cores": (  # whatever the machine has
        "import multiprocessing as m, concurrent.futures as c, os\nwith m.Pool() as p:\n    print(p._processes)\n"
        "with c.ProcessPoolExecutor() as p:\n    print(p._max_workers)\nos.cpu_count()",
        "1\n1\n1\n",
    ),
    "no trace of the supervisor": (
        "import sys\nprint(sys.argv, sys.modules['__main__'].__dict__.get('Capture'))",
        "[''] None\n",
    ),
}


def test_programs_that_succeed(box):
    results = box.run(*(code for code, _ in PROGRAMS.values()))
    assert {name: (r.status, r.stdout, r.stderr) for name, r in zip(PROGRAMS, results, strict=True)} == {
        name: ("success", expected, "") for name, (_, expected) in PROGRAMS.items()
    }


OPTED = (
    *("1 + 1", "import math\nprint(math.pi > 3)"),
    *("import os", "from json import loads", "def f():\n import re\nf()"),
)


def check_options(results: list[ToolResult]) -> None:
    """Results of `OPTED` if the last expression is not shown and two modules are allowed."""
    silent, allowed, *refused = results
    assert (silent.status, silent.stdout) == ("success", "")
    assert (allowed.status, allowed.stdout) == ("success", "True\n")
    for result, name in zip(refused, ("os", "json", "re"), strict=True):
        assert result.status == "user_error"
        assert result.stderr.endswith(f"ImportError: module '{name}' is not allowed here; these are: math, decimal\n")
        assert result.stderr.count("File ") == result.stderr.count('File "<snippet>"')


def test_options_of_a_call(box):
    check_options(box.run(*OPTED, show_last_expression=False, allowed_modules=("math", "decimal")))


def test_options_of_the_configuration():
    async def main() -> list[ToolResult]:
        config = SandboxConfig(("process",), slots=1, show_last_expression=False, allowed_modules=("math", "decimal"))
        async with open_sandbox(config) as box:
            return [await box.run(program) for program in OPTED]

    check_options(asyncio.run(main()))


def test_stdin(box):
    (result,) = box.run("print(input(), input())\ninput()", stdin="a\nb\n")
    assert result.stdout == "a b\n"
    assert result.stderr.endswith("EOFError: EOF when reading a line\n")


def test_traceback_has_the_source_line_and_only_the_programs_frames(box):
    code = "def f(x):\n    return 1 / x\nprint('before')\nf(0)"
    result, syntax, nested, exits = box.run(code, "x = (1,\n2", "(" * 500 + ")" * 500, "import sys\nsys.exit('no')")
    assert (result.status, result.return_code, result.stdout) == ("user_error", 1, "before\n")
    assert "    return 1 / x\n" in result.stderr
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert [line for line in result.stderr.split("\n") if "File " in line] == [
        '  File "<snippet>", line 4, in <module>',
        '  File "<snippet>", line 2, in f',
    ]
    assert syntax.status == nested.status == "user_error"
    assert syntax.stderr.startswith('  File "<snippet>", line 1\n')
    assert (exits.status, exits.return_code, exits.stderr) == ("user_error", 1, "no\n")


def test_a_last_expression_that_does_not_compile_stops_the_program_before_it_starts(box):
    (result,) = box.run("print('ran')\n(yield)")
    assert (result.status, result.stdout) == ("user_error", "")


def test_fatal_signal_is_the_programs_fault(box):
    (result,) = box.run("import ctypes\nctypes.string_at(0)")
    assert (result.status, result.signal, result.return_code) == ("user_error", 11, -11)
    assert "SIGSEGV" in result.message


def test_timeout_keeps_partial_output_and_the_wall_limit_starts_with_the_program(box):
    code = "import time\nprint('partial')\ntry:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)"
    results = box.run(*[code] * 4, limits=Limits(wall_s=0.4))
    assert [(r.status, r.stdout) for r in results] == [("timeout", "partial\n")] * 4
    assert all(0.4 <= r.wall_s < 30 for r in results)  # not the 60 that it sleeps
    assert max(r.queue_s for r in results) > 0.3  # the first may have begun before the last was queued
    assert "0.4 s" in results[0].message


# Output that is still in the buffer when a program ends: (program, status, stdout, stderr).
CUT_OFF = {
    "time runs out in a line": (
        "for i in range(12):\n    print(i, end=' ')\nwhile True:\n    pass",
        *("timeout", "0 1 2 3 4 5 6 7 8 9 10 11 ", ""),
    ),
    "a signal": ("import os, sys\nsys.stdout.write('42')\nos.kill(os.getpid(), 9)", "user_error", "42", ""),
    "a crash": ("import ctypes\nprint(1)\nprint(2, end='')\nctypes.string_at(0)", "user_error", "1\n2", ""),
    "an abort, errors": ("import os, sys\nsys.stderr.write('half')\nos.abort()", "user_error", "", "half"),
    "an exit that flushes nothing": ("import os\nprint('a', end='')\nos._exit(3)", "user_error", "a", ""),
    "bytes": ("import os, sys\nsys.stdout.buffer.write(b'raw')\nos.kill(os.getpid(), 15)", "user_error", "raw", ""),
    "the other stream's flood": (
        "import os, sys\nsys.stdout.write('42')\nwhile True:\n    os.write(2, b'x' * 9999)",
        *("output_limit", "42", None),
    ),
    "more than a buffer holds": (
        "import os, sys\nfor _ in range(300):\n    sys.stdout.write('x' * 100)\nos.kill(os.getpid(), 9)",
        *("user_error", "x" * 30_000, ""),
    ),
    "lines that are sent in blocks": (
        "import os\nfor i in range(101):\n    print(i)\nos.write(1, b'-\\n')\nprint('a')\nos.kill(os.getpid(), 9)",
        *("user_error", "".join(f"{i}\n" for i in range(100)) + "-\n100\na\n", ""),
    ),
    "a child of a program that prints in blocks": (
        "import os\nfor i in range(150):\n    print('a')\nprint('b', end='')\nif os.fork() == 0:\n    print('c')\n"
        "    os._exit(0)\nos.wait()\nos.kill(os.getpid(), 9)",
        *("user_error", "a\n" * 150 + "bc\nb", ""),
    ),
    "a child has a copy, as ever": (
        "import os\nprint('a', end='')\nif os.fork() == 0:\n    print('b')\n    os._exit(0)\nos.wait()\n"
        "os.kill(os.getpid(), 9)",
        *("user_error", "ab\na", ""),
    ),
}


def test_what_was_written_before_a_kill_is_shown_whether_or_not_its_line_is_at_an_end(box):
    limits = Limits(wall_s=1.5, raw_output_bytes=200_000)
    results = box.run(*(code for code, *_ in CUT_OFF.values()), limits=limits)
    for (name, (_, status, stdout, stderr)), result in zip(CUT_OFF.items(), results, strict=True):
        told = result.stderr if stderr is not None else None
        assert (result.status, result.stdout, told) == (status, stdout, stderr), name
    left = "import sys\nprint(sys.stdout.buffer.used, sys.stderr.buffer.used)"
    assert [result.stdout for result in box.run(left, left)] == ["False False\n"] * 2, (
        "nothing is left for the next program"
    )


SQUARES = """
import multiprocessing
print("begun")
def square(x):
    return x * x
with multiprocessing.get_context("WAY").Pool(2) as pool:
    print(pool.map(square, range(5)))
"""
GUARDED = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
class Point:
    def __init__(self, x):
        self.x = x
    def moved(self, by=1):
        return Point(self.x + by)
if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        print([point.x for point in pool.map(Point.moved, map(Point, range(3)))])
"""
QUEUE = """
import multiprocessing
LIMIT = 3
def count(queue):
    for i in range(LIMIT):
        queue.put((__name__, i))
context = multiprocessing.get_context("forkserver")
queue = context.Queue()
process = context.Process(target=count, args=(queue,))
process.start()
print([queue.get()[1] for _ in range(3)])
process.join()
print(process.exitcode)
"""


def test_new_interpreters_of_multiprocessing_find_the_programs_functions(box):
    (result,) = box.run(SQUARES.replace("WAY", "forkserver"), limits=PATIENT)
    assert (result.status, result.stdout, result.stderr) == ("success", "begun\n[0, 1, 4, 9, 16]\n", "")


@pytest.mark.parametrize("box", ["process"], indirect=True)
def test_what_such_children_find_is_the_program_as_far_as_it_comes_without_them(box):
    spawned, guarded, queue, source = box.run(
        *(SQUARES.replace("WAY", "spawn"), GUARDED, QUEUE, "import inspect\nclass A:\n    x = 1\ninspect.getsource(A)"),
        limits=PATIENT,
    )
    assert (spawned.stdout, spawned.stderr) == ("begun\n[0, 1, 4, 9, 16]\n", "")
    assert (guarded.stdout, guarded.stderr) == ("[1, 2, 3]\n", "")
    assert (queue.stdout, queue.stderr) == ("[0, 1, 2]\n0\n", "")
    assert source.stdout == "'class A:\\n    x = 1\\n'\n"


@pytest.mark.parametrize("box", ["process"], indirect=True)
def test_a_number_of_many_digits_is_refused_in_words_that_lift_the_limit(box):
    programs = "print(2**20000)", "2**20000", "f'{2**20000}'", "int('1' * 5000)", "'%d' % 10**5000", "str(10**4300)"
    lift = DIGITS_HELP.removesuffix("]").partition(": ")[2]
    refused, lifted = box.run(*programs), box.run(*(f"{lift}\n{code}" for code in programs))
    for result in refused:
        assert "Exceeds the limit (4300 digits)" in result.stderr
        assert tool_text(result, 500).endswith(f"\n{DIGITS_HELP}")
    assert [result.stdout_bytes for result in lifted] == [6022, 6022, 6024, 5001, 5004, 4304]
    (literal,) = box.run("x = 1" + "0" * 5000)
    assert "Consider hexadecimal" in literal.stderr and DIGITS_HELP not in tool_text(literal, 500)


def test_endless_output_is_stopped_and_only_its_ends_are_kept(box):
    limits = Limits(output_bytes=1000, raw_output_bytes=1 << 20)
    code = "import sys\nsys.stdout.write('first\\n')\nwhile True:\n    sys.stdout.write('x' * 65536)"
    (result,) = box.run(code, limits=limits)
    assert result.status == "output_limit"
    assert result.stdout_truncated and 1 << 20 < result.stdout_bytes < 2 << 20
    assert len(result.stdout) < 1100
    assert result.stdout.startswith("first\n")
    assert "[... bytes removed ...]" in result.stdout


def test_long_output_below_the_raw_limit_ends_normally(box):
    (result,) = box.run("print('a' * 500_000)\nprint('end')", limits=Limits(output_bytes=2000))
    assert (result.status, result.stdout_bytes, result.stderr_truncated) == ("success", 500_005, False)
    assert result.stdout.endswith("a\nend\n")


def test_output_that_is_not_utf8(box):
    (result,) = box.run("import os\nos.write(1, b'a\\xffb')\nNone")
    assert (result.status, result.stdout, result.stdout_bytes) == ("success", "a\ufffdb", 3)


@pytest.mark.parametrize("code", ["x = [0] * 10**10", "x = []\nwhile True:\n    x.append(bytearray(1 << 20))"])
def test_memory_bomb(box, code: str):
    (result,) = box.run(code, limits=Limits(memory_mb=64))
    assert (result.status, result.peak_rss_mb < 150) == ("oom", True)
    assert result.stderr.endswith("MemoryError\n")
    assert "64 MB" in result.message


def test_memory_limit_leaves_room_for_numpy(box):
    (result,) = box.run("import numpy as np\nnp.ones(10).sum()", limits=Limits(memory_mb=256))
    assert result.status == "success"


def test_programs_cannot_reach_each_others_state(box):
    write = "import math\nmath.pi = 3\nopen('f', 'w').write('x')\nopen('/dev/shm/f', 'w').write('x')\nleak = 1\nNone"
    read = "import math, os\nprint(math.pi > 3, os.listdir('.'), os.path.exists('/dev/shm/f'), 'leak' in globals())"
    mounts = "len(open('/proc/self/mountinfo').readlines())"

    # Several rounds, because each worker may take any program.
    programs = (write, read, "import random\nrandom.random()", mounts)
    results = [result for program in programs * 2 for result in box.run(program)]
    assert [r.status for r in results] == ["success"] * 8
    assert results[1].stdout == results[5].stdout == "True [] False False\n"
    assert results[2].stdout != results[6].stdout
    assert results[3].stdout == results[7].stdout


def test_many_mixed_programs_all_come_back_right(box):
    programs, expected = [], []
    for i in range(25):
        programs += [f"print({i})", f"{i} * 2", f"raise ValueError({i})", f"import sys\nsys.exit({i + 1})"]
        expected += [("success", f"{i}\n", 0), ("success", f"{i * 2}\n", 0), ("user_error", "", 1)]
        expected += [("user_error", "", i + 1)]
    results = [result for i in range(0, len(programs), 50) for result in box.run(*programs[i : i + 50])]
    assert [(r.status, r.stdout, r.return_code) for r in results] == expected
