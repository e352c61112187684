"""launch_tpu.sh in a temporary checkout, with fakes for gcloud and kubectl."""

import json
import marshal
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = ("PROJECT=proj", "ZONE=us-east5-a", "NAME=run", "POLL_SECONDS=0")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A repository with launch_tpu.sh and deploy/tpu in its only commit."""
    folder = tmp_path_factory.mktemp("launch") / "checkout"
    shutil.copytree(ROOT / "deploy/tpu", folder / "deploy/tpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch_tpu.sh", folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", str(folder)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    return folder


@pytest.fixture
def cloud(tmp_path, checkout):
    """A new fake cloud: `run(*words)` runs the script, `paste(text)` a shell; `calls()` are the calls of both."""
    programs, home = tmp_path / "bin", tmp_path / "cloud"
    programs.mkdir()
    home.mkdir()
    source = (ROOT / "tests/launch/cloud.py").read_text()
    for name in ("gcloud", "kubectl"):
        (programs / name).write_text(f"#!{sys.executable} -SI\n{source}")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE_CLOUD": str(home),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }

    def shell(command: list[str], **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=checkout, env=environment | more, capture_output=True, text=True, timeout=120, input=""
        )

    def calls() -> list[dict]:
        path = home / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return SimpleNamespace(
        run=lambda *words, **more: shell(["./launch_tpu.sh", words[0], *PLACE, *words[1:]], **more),
        paste=lambda text, **more: shell(["bash", "-c", text], **more),
        calls=calls,
        lines=lambda: [" ".join(call["words"]) for call in calls()],
        forget=lambda: (home / "calls.jsonl").unlink(missing_ok=True),
        plan=lambda answers: (home / "plan").write_bytes(marshal.dumps(answers)),
        has=lambda *names: (home / "there").write_bytes(marshal.dumps(dict.fromkeys(names, ()))),
        ended=lambda *codes: (home / "status").write_text(
            "".join(f"host-{number} exit {code}\n" for number, code in enumerate(codes))
        ),
        there=lambda: [name for name in marshal.loads((home / "there").read_bytes()) if "buckets" not in name],
        home=home,
    )
