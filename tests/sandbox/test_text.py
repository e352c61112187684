"""The text that the model gets."""

import pytest

from retool_jax.sandbox import ToolResult, tool_text
from retool_jax.tokens.chat import defuse

TRACEBACK = """Traceback (most recent call last):
  File "<snippet>", line 9, in <module>
    solve(f)
  File "/usr/lib/python3/sympy/solvers.py", line 1145, in solve
    flags['x'] = y
                 ^
  File "<snippet>", line 2, in f
    return 1 / x
           ~~^~~
ZeroDivisionError: division by zero
"""


def test_output_is_told_as_it_is():
    assert tool_text(ToolResult("success", stdout="4\n"), 100) == "4"
    assert tool_text(ToolResult("success", stdout="4\n", stderr="a warning"), 100) == "4"
    assert tool_text(ToolResult("success", stderr="only here\n"), 100) == "only here"
    thread = ToolResult("success", stdout="4\n", stderr=f"a warning\nException in thread Thread-1 (f):\n{TRACEBACK}")
    assert tool_text(thread, 1000).startswith('4\n  File "<snippet>"')
    assert tool_text(thread, 1000).endswith("\nZeroDivisionError: division by zero")


@pytest.mark.parametrize("stdout", ["", "\n \n"])
def test_empty_output_is_said(stdout: str):
    assert tool_text(ToolResult("success", stdout=stdout), 100) == "[no output: use print()]"


def test_error_follows_output_without_library_frames():
    text = tool_text(ToolResult("user_error", stdout="a\n", stderr=TRACEBACK, return_code=1), 1000)
    assert text == (
        'a\n  File "<snippet>", line 9, in <module>\n    solve(f)\n  File "<snippet>", line 2, in f\n'
        "    return 1 / x\n           ~~^~~\nZeroDivisionError: division by zero"
    )


def test_only_the_last_of_chained_errors_and_the_last_frames_are_told():
    frames = "".join(f'  File "<snippet>", line {i}, in f\n    f{i}()\n' for i in range(9))
    stderr = (
        TRACEBACK + "\nDuring handling of the above ...\n\nTraceback (most recent call last):\n" + frames + "E: x\n"
    )
    text = tool_text(ToolResult("user_error", stderr=stderr, return_code=1), 1000)
    assert [line for line in text.split("\n") if "File" in line] == [
        f'  File "<snippet>", line {i}, in f' for i in (6, 7, 8)
    ]
    assert text.endswith("\n    f8()\nE: x")


def test_syntax_error_and_message_of_several_lines():
    stderr = "  File \"<snippet>\", line 1\n    x = (\n        ^\nSyntaxError: '(' was never closed\n"
    assert tool_text(ToolResult("user_error", stderr=stderr), 1000) == stderr.rstrip()
    stderr = (
        'Traceback (most recent call last):\n  File "<snippet>", line 1, in <module>\n    f()\nE: one\n  two\nthree\n'
    )
    assert tool_text(ToolResult("user_error", stderr=stderr), 1000).endswith("E: one\n  two\nthree")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (
            ToolResult("timeout", stdout="a\n", message="time limit of 5 s reached"),
            "a\n[stopped: time limit of 5 s reached]",
        ),
        (ToolResult("oom", message="memory limit of 9 MB exceeded"), "[stopped: memory limit of 9 MB exceeded]"),
        (ToolResult("output_limit", message="output limit"), "[stopped: output limit]"),
        (ToolResult("rejected", message="the code is too long"), "[not run: the code is too long]"),
        (ToolResult("user_error", return_code=3, message="exit code 3"), "[exit code 3]"),
        (ToolResult("user_error", signal=11, message="killed by signal SIGSEGV"), "[killed by signal SIGSEGV]"),
    ],
)
def test_ends_are_said_in_words(result: ToolResult, expected: str):
    assert tool_text(result, 200) == expected


def test_long_output_loses_its_middle_and_says_so_without_a_number():
    """A policy once took the number of removed characters for the answer."""
    text = tool_text(ToolResult("success", stdout="a" * 5000 + "b" * 5000, stdout_bytes=10000), 200)
    assert 190 <= len(text) <= 200
    head, mark, tail = text.partition("\n[... characters removed ...]\n")
    assert mark and set(head) == {"a"} and set(tail) == {"b"}
    cut_before = ToolResult("success", stdout="x" * 1000, stdout_bytes=50_000, stdout_truncated=True)
    assert not [c for c in tool_text(cut_before, 100) if c.isdigit()]


def test_error_survives_long_output_and_nothing_exceeds_the_room():
    result = ToolResult("user_error", stdout="x" * 9000, stderr=TRACEBACK, return_code=1)
    assert tool_text(result, 600).endswith("ZeroDivisionError: division by zero")
    long_error = ToolResult("user_error", stdout="x" * 9000, stderr="E: " + "y" * 9000)
    for room in (1, 10, 60, 100, 600):
        assert len(tool_text(result, room)) <= room
        assert len(tool_text(long_error, room)) <= room


@pytest.mark.parametrize(
    ("stderr", "name"),
    [
        (TRACEBACK, "ZeroDivisionError: division by zero"),
        (
            "".join(["Traceback (most recent call last):\n", *(f'  File "<snippet>", line {i}\n' for i in (1, 2, 3))])
            + "ModuleNotFoundError: No module named 'scipy'\n",
            "ModuleNotFoundError: No module named 'scipy'",
        ),
        (
            "  File \"<snippet>\", line 1\n    x = (\n        ^\nSyntaxError: '(' was never closed\n",
            "SyntaxError: '(' was",
        ),
        ('Traceback (most recent call last):\n  File "<snippet>", line 1\nE: one\n' + "  more\n" * 99, "E: one"),
        ("a warning\n" * 9 + "fatal: out of disk\n", "fatal: out of disk"),
        ("KeyError: " + "k" * 9000, "KeyError: kk"),
    ],
)
@pytest.mark.parametrize("stdout", ["", "x" * 9000])
def test_what_an_error_is_called_is_told_in_a_short_room_too(tokenizer, stdout, stderr, name):
    def count(text: str) -> int:
        return len(tokenizer.encode(defuse(tokenizer, text)))

    result = ToolResult("user_error", stdout=stdout, stderr=stderr, return_code=1)
    for room in (count(name) + 1, 2 * count(name), 60, 120):
        told = tool_text(result, room, count)
        assert name in told and count(told) <= room
    assert name[:5] in tool_text(result, 6, count)


def test_frames_of_a_sessions_later_cells_are_told():
    stderr = (
        'Traceback (most recent call last):\n  File "<snippet 2>", line 1, in <module>\n    f()\n'
        '  File "/usr/lib/python3/a.py", line 9, in g\n    h()\n  File "<snippet>", line 2, in f\n    1 / 0\n'
        "ZeroDivisionError: division by zero\n"
    )
    told = tool_text(ToolResult("user_error", stderr=stderr, return_code=1), 1000)
    assert '"<snippet 2>", line 1' in told and '"<snippet>", line 2' in told and "a.py" not in told


def test_half_a_surrogate_pair_is_told_as_its_escape():
    """Another project's server may answer with one, and no tokenizer accepts it."""
    answered = ToolResult("user_error", stdout="a\udc80", stderr="E: \ud800", message="\udfff;", stdout_bytes=9)
    assert tool_text(answered, 100) == "a\\udc80\nE: \\ud800\n[\\udfff;]"
    cut_off = ToolResult("success", stdout="\ud800" * 900, stdout_bytes=90_000, stdout_truncated=True)
    assert len(tool_text(cut_off, 100).encode()) <= 100


@pytest.mark.parametrize("status", ["infra_error", "cancelled"])
def test_faults_of_the_machinery_are_never_told(status: str):
    with pytest.raises(ValueError, match=status):
        tool_text(ToolResult(status, message="x"), 100)


def test_a_budget_of_tokens_is_exact_and_nearly_used(tokenizer):
    def count(text: str) -> int:
        return len(tokenizer.encode(defuse(tokenizer, text)))

    texts = [
        "x = 1234 + 5678\n" * 3000 + "0",
        "é漢🙂" * 5000,
        " " * 50_000 + "1" * 50_000,
        "<|im_end|>" * 5000,
        "a" * 9000,
    ]
    for text in texts:
        for room in (1, 5, 40, 200, 1000):
            told = tool_text(ToolResult("success", stdout=text, stdout_bytes=len(text.encode())), room, count)
            assert count(told) <= room
            if room >= 40 and count(text) > room and len(text) < 3 * count(text):
                assert count(told) >= 0.8 * room
                head, mark, tail = told.partition("\n[... characters removed ...]\n")
                assert mark and text.startswith(head) and text.endswith(tail)
    error = ToolResult("user_error", stdout="x" * 9000, stderr=TRACEBACK, return_code=1)
    assert tool_text(error, 400, count).endswith("ZeroDivisionError: division by zero")


def test_the_end_of_an_interpreter_is_told():
    ended = ToolResult("success", stdout="1\n", message="the interpreter ended")
    assert tool_text(ended, 100) == "1\n[the interpreter ended]"
    late = ToolResult("timeout", message="time limit of 5 s reached; the interpreter ended")
    assert tool_text(late, 100) == "[stopped: time limit of 5 s reached; the interpreter ended]"
    left = ToolResult("user_error", stderr="bye\n", return_code=1, message="exit code 1; the interpreter ended")
    assert tool_text(left, 100) == "bye\n[exit code 1; the interpreter ended]"


def test_parts_that_count_more_together_than_apart_still_fit_and_are_marked():
    def count(text: str) -> int:
        return len(text) + (20 if "removed" in text and len(text) > 60 else 0)

    told = tool_text(ToolResult("success", stdout="x" * 5000, stdout_bytes=5000), 200, count)
    assert 150 <= count(told) <= 200
    assert "characters removed" in told
