"""Commands on a system that is not as expected: closed streams, a missing folder, impossible paths."""

import errno
import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from retool_jax.errors import interruptible, run_command

PRINTS = """
import sys
from rich.console import Console
from retool_jax.errors import interruptible, run_command
def plainly(words): print("± " * 99_999, flush=True)
def by_rich(words): Console().print("\\udcff ± " * 99_999)
run_command(globals()[sys.argv[1]])
"""


@pytest.mark.parametrize("way", ["plainly", "by_rich"])
def test_output_that_nobody_reads_is_told_in_one_line(way):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", PRINTS, way], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the program that reads this output has ended, as `head` does;")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("way", ["plainly", "by_rich"])
def test_streams_of_ascii_get_escapes(way):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", PRINTS, way], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-500:]
    assert r"\xb1" in done.stdout and (way == "plainly" or r"\udcff" in done.stdout)


CLOSED = """
import os
from retool_jax.errors import interruptible, run_command
def main(words):
    with open("numbers", "w") as file: os.write(1, b"of a library"), os.write(2, b"of another"), file.write("mine")
run_command(main)
"""


def test_no_file_takes_the_place_of_a_stream_that_is_closed(tmp_path):
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c", CLOSED]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0 and (tmp_path / "numbers").read_text() == "mine"


ENDS = """
import atexit, gc
from retool_jax.errors import run_command
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # what is registered first is called last
run_command(lambda words: None)
"""


def test_a_command_ends_without_a_look_for_garbage():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


GONE = """
import os
from pathlib import Path
from retool_jax.errors import interruptible, run_command
os.rmdir(os.getcwd())
run_command(lambda words: Path("x").resolve())
"""


def test_a_folder_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", GONE],
        cwd=tmp_path / "gone",
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: the folder in which this command was started is gone; start it in another\n"


@pytest.mark.parametrize("name", ["ENAMETOOLONG", "EEXIST", "EISDIR", "ELOOP", "ENOENT", "EMFILE"])
def test_a_path_that_cannot_be_is_one_line(monkeypatch, capsys, name):
    def main(words: list[str]) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)), "runs/x")

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    error = capsys.readouterr().err
    assert error.startswith("error: cannot ") and f"runs/x ({os.strerror(getattr(errno, name))}); " in error
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_comes_while_python_collects_is_not_lost():
    sent = []

    def collected(*_: object) -> None:
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the signal is heard in here
            pass

    before = signal.getsignal(signal.SIGINT)
    gc.callbacks.append(collected)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            gc.collect()
            time.sleep(10)
    finally:
        gc.callbacks.remove(collected)
    assert sent and signal.getsignal(signal.SIGINT) is before
