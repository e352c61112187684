"""A session's interpreter: what it keeps from one cell to the next, and what ends it."""

import pytest

from retool_jax.sandbox import Limits, ToolResult


def run_cells(box, *cells: str | tuple[str, dict]) -> list[ToolResult]:
    """Results of cells that run one after the other in a session; a cell with options is a pair."""

    async def main() -> list[ToolResult]:
        async with box.sandbox.session() as session:
            pairs = [(cell, {}) if isinstance(cell, str) else cell for cell in cells]
            return [await session.run(code, **options) for code, options in pairs]

    return box.runner.run(main())


def test_state_files_and_exceptions_survive(box):
    results = run_cells(
        box,
        "import os\nx = 1\ndef f():\n    return 1 / 0\nopen('note', 'w').write('kept')\nos.getpid()",
        "x += 1\nx, open('note').read()",
        "f()",
        ("print(input(), x)", {"stdin": "typed\n"}),
        ("print(input())", {"stdin": ""}),
        ("open('given').read()", {"files": {"given": b"up"}, "fetch": ("note",)}),
        "import os\nos.getpid()",
    )
    assert [r.status for r in results] == [
        *("success", "success", "user_error", "success", "user_error", "success", "success"),
    ]
    assert results[1].stdout == "(2, 'kept')\n"
    assert "    return 1 / 0\n" in results[2].stderr and "Traceback" in results[2].stderr
    assert results[3].stdout == "typed 2\n"
    assert results[4].stderr.endswith("EOFError: EOF when reading a line\n")
    assert (results[5].stdout, results[5].files) == ("'up'\n", {"note": b"kept"})
    assert results[6].stdout == results[0].stdout.split("\n")[-2] + "\n"


def test_limits_hold_for_each_cell(box):
    results = run_cells(
        box,
        ("x = 5\nprint('a' * 3000)", {"limits": Limits(output_bytes=1000)}),
        ("y = [0] * 10**9", {"limits": Limits(memory_mb=64)}),
        ("print('b' * 3000, x)", {}),
        ("z = bytearray(200 << 20)\nlen(z)", {}),
    )
    assert [r.status for r in results] == ["success", "oom", "success", "success"]
    assert results[0].stdout_truncated and not results[2].stdout_truncated
    assert results[2].stdout.endswith(" 5\n")
    assert results[1].stderr.endswith("MemoryError\n")


def test_a_time_out_ends_the_interpreter_and_the_next_cell_starts_afresh(box):
    before, late, after, state = run_cells(
        box,
        "x = 1\nopen('f', 'w').write('x')",
        ("print('partial')\nwhile True:\n    pass", {"limits": Limits(wall_s=0.3)}),
        "import os\nprint(os.listdir('.'))",
        "x",
    )
    assert (before.status, late.status, late.stdout) == ("success", "timeout", "partial\n")
    assert after.stdout == "[]\n"
    assert "NameError" in state.stderr


def test_what_a_cell_had_written_of_a_line_is_shown_where_it_is_killed(box):
    late, fresh, killed, after = run_cells(
        box,
        ("print('so far', end='')\nwhile True:\n    pass", {"limits": Limits(wall_s=1)}),
        "print('a', end='')",
        "import os\nprint('b', end='')\nos.kill(os.getpid(), 9)",
        "print('c')",
    )
    assert (late.status, late.stdout) == ("timeout", "so far")
    assert (fresh.status, fresh.stdout) == ("success", "a")
    assert (killed.status, killed.stdout) == ("user_error", "b")
    assert (after.status, after.stdout) == ("success", "c\n")


@pytest.mark.parametrize("box", ["process"], indirect=True)
def test_functions_of_earlier_cells_are_there_for_new_interpreters(box):
    *_, result = run_cells(
        box,
        "def double(x):\n    return 2 * x",
        "double(",
        "import multiprocessing as m\nwith m.get_context('spawn').Pool(1) as p:\n    print(p.map(double, [1, 2]))",
    )
    assert (result.stdout, result.stderr) == ("[2, 4]\n", "")


def test_output_without_end_and_exit_end_it_too(box):
    flood, gone, left, state = run_cells(
        box,
        ("x = 1\nwhile True:\n    print('x' * 1000)", {"limits": Limits(raw_output_bytes=1 << 20)}),
        "x",
        "import sys\nprint('bye')\nx = 2\nsys.exit(3)",
        "x",
    )
    assert flood.status == "output_limit"
    assert "NameError" in gone.stderr
    assert (left.status, left.return_code, left.stdout) == ("user_error", 3, "bye\n")
    assert "NameError" in state.stderr


def test_a_background_process_lives_as_long_as_the_session(box):
    start = (
        "import subprocess, sys\np = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'input()'], stdin=-1)\nNone"
    )
    started, running = run_cells(box, start, "p.poll()")
    assert (started.status, started.stderr) == ("success", "")
    assert (running.status, running.stdout) == ("success", "")
