"""A command keeps compiled programs, in jax's folder or below the user's cache, and prints which."""

import os
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import sys
import jax
from retool_jax.compile_cache import keep_programs
keep_programs()
print(jax.config.jax_compilation_cache_dir, file=sys.stderr)
"""


def start(home: Path, **variables: str) -> tuple[str, str]:
    """A command's output, and the folder in which jax keeps its programs."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_CACHE"))}
    environment = without | {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | variables
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr.strip().splitlines()[-1]


def test_programs_are_kept_below_the_users_cache(tmp_path):
    told, folder = start(tmp_path)
    assert Path(folder).is_dir() and Path(folder).parent == tmp_path / ".cache" / "retool_jax"
    assert folder in told and "JAX_ENABLE_COMPILATION_CACHE=0" in told
    old, new = Path(folder) / "old-cache", Path(folder) / "new-cache"
    for file, days in ((old, 61), (new, 59)):
        file.write_bytes(b"a program")
        os.utime(file, (time.time() - days * 86400,) * 2)
    assert start(tmp_path)[1] == folder
    assert not old.exists() and new.exists()


def test_the_folder_that_jax_was_told_is_used_and_none_where_it_keeps_none(tmp_path):
    told, folder = start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "there"))
    assert folder == str(tmp_path / "there") and folder in told
    assert start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0") == ("", "None")
    assert not (tmp_path / ".cache").exists()


def test_a_home_that_cannot_be_written_to_is_said_and_the_run_goes_on(tmp_path):
    (tmp_path / "file").touch()
    told, folder = start(tmp_path / "file")
    assert "are not kept" in told and folder == "None"
