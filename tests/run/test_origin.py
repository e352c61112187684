"""Which program trained in a folder: the commit and the changes of its own checkout, and of no other."""

import os
import subprocess
from pathlib import Path

import pytest

from retool_jax.run.origin import code_diff, write_origin


def git(folder: Path, *words: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *words], cwd=folder, env=own, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path) -> Path:
    """A package in a checkout of its own."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    git(folder.parent, "init", "-q")
    (folder / "__init__.py").write_text("one = 1\n")
    (folder.parent / "notes.txt").write_text("a\n")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_a_checkout_is_its_commit_what_changed_and_what_is_new(source):
    commit = f"# commit {git(source, 'rev-parse', 'HEAD')}\n"
    assert code_diff(source).decode() == commit
    (source.parent / "notes.txt").write_text("no source\n")
    assert code_diff(source).decode() == commit
    (source / "__init__.py").write_bytes(b"one = 2\n# \xff\n")
    (source / "new.py").write_text("")
    found = code_diff(source)
    assert found.startswith(f"{commit}# not in it: new.py\ndiff --git a/package/__init__.py".encode())
    assert b"\n-one = 1\n+one = 2\n+# \xff\n" in found and b"notes" not in found
    git(source, "add", "__init__.py")
    assert b"+one = 2" in code_diff(source), "what is staged is in no commit either"
    # It can be had again.
    (source.parent / "code.diff").write_bytes(found)
    git(source, "reset", "-q", "--hard")
    git(source.parent, "apply", "code.diff")
    assert (source / "__init__.py").read_bytes() == b"one = 2\n# \xff\n"


def test_no_checkout_and_that_of_another_project_are_not_followed(source, tmp_path, monkeypatch):
    def package(*parts: str) -> Path:
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        return folder

    assert code_diff(package("plain")) == b""
    assert code_diff(package("checkout", ".venv", "site-packages", "package")) == b"", "held by it, not of it"
    (source.parent / ".gitignore").write_text("venv/\n")
    assert code_diff(package("checkout", "venv", "package")) == b""
    fresh = package("fresh")
    git(fresh, "init", "-q")
    git(fresh, "add", ".")
    assert code_diff(fresh) == b"", "no commit yet"
    # A repository that the environment names, as in one's hook.
    monkeypatch.setenv("GIT_DIR", str(source.parent / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(source.parent))
    assert code_diff(tmp_path / "plain") == b"" and code_diff(source).startswith(b"# commit ")
    monkeypatch.setenv("PATH", "")
    assert code_diff(source) == b"", "no git"


def test_settings_of_the_checkout_run_no_program(source, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    (source / ".gitattributes").write_text("*.py diff=mine\n")
    for key in ("diff.external", "diff.mine.command", "diff.mine.textconv", "core.fsmonitor", "core.pager"):
        git(source, "config", key, str(program))
    (source / "__init__.py").write_text("one = 2\n")
    assert b"+one = 2" in code_diff(source) and not (tmp_path / "ran").exists()


def test_a_folder_tells_every_program_that_trained_in_it(tmp_path):
    for _ in range(2):
        write_origin(tmp_path)
    lines = (tmp_path / "versions.txt").read_text().splitlines()
    assert lines[0].startswith("# Python 3.") and sum(line.startswith("jax==") for line in lines) == 1
    (tmp_path / "versions.txt").write_text("jax==0.1\n")
    write_origin(tmp_path)
    assert (tmp_path / "versions.txt").read_text() == "\n".join(["jax==0.1", *lines, ""])
    write_origin(tmp_path / "nowhere")  # no folder, or a full disk, ends no run
