"""deploy/tpu/worker.sh, with fakes for the installers and the training."""

import os
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def worker(tmp_path):
    """`run(verb, ends)` runs worker.sh in a temporary root with fake installers; the training exits with `ends`."""
    programs, root = tmp_path / "bin", tmp_path / "root"
    folder = root / "mnt/retool/run"
    for path in (programs, root / "var/log", folder / "code"):
        path.mkdir(parents=True)
    to = 'to=${@: -1}; mkdir -p "$to/bin"; '  # the last argument is the environment to create
    tools = {
        "pip": "exit 0",
        "uv": f'[ $1 != venv ] || {{ {to} cp "{tmp_path}/tools/python" "$to/bin"; }}; echo "uv $*" >>"$RECORD"',
        "python": 'echo "trained $* $HF_TOKEN $JAX_COMPILATION_CACHE_DIR"; exit $TRAINING_ENDS',
    }
    stubs = {
        "python3": f'{to} cp "{tmp_path}"/tools/* "$to/bin"',
        "systemctl": 'echo "systemctl $*" >>"$RECORD"',
        "systemd-run": 'echo "systemd-run $*" >>"$RECORD"',
        "hostname": "echo host-3",
        **dict.fromkeys(("apt-get", "runsc", "gcsfuse", "mountpoint", "curl", "gpg"), "exit 0"),
    }
    for folder_of, texts in ((tmp_path / "tools", tools), (programs, stubs)):
        folder_of.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder_of / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder_of / name).chmod(0o755)
    with tarfile.open(folder / "code/abc.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "pyproject.toml", "pyproject.toml")
    record = tmp_path / "record"
    record.write_text("")

    def run(verb: str, ends: int = 0) -> subprocess.CompletedProcess:
        settings = ["BUCKET=b", "NAME=run", "CODE=abc", "PINNED_AT=2026-11-27T00:00:00Z", "UV_VERSION=1"]
        command = ["bash", str(ROOT / "deploy/tpu/worker.sh"), verb, *settings, "PYTHON_VERSION=3.12"]
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RETOOL_ROOT": str(root),
            "RECORD": str(record),
            "TRAINING_ENDS": str(ends),
            "HF_TOKEN": "token",
        }
        words = [*command, "SECRETS=HF_TOKEN", "--", "python", "-m", "retool_jax.train", "config=grpo"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)

    return SimpleNamespace(run=run, folder=folder, root=root, record=record)


@pytest.mark.parametrize("ends", [0, 2])
def test_a_worker_records_the_exit_status_of_its_training(worker, ends):
    done = worker.run("work", ends)
    assert done.returncode == ends, done.stderr
    assert (worker.folder / "status/host-3").read_text() == f"host-3 exit {ends}\n"
    log = (worker.folder / "logs/host-3.log").read_text()
    assert f"trained -m retool_jax.train config=grpo token {worker.root}/mnt/retool/compiled" in log
    assert Path(worker.root / "opt/retool/abc/code/runs").resolve() == worker.folder.parent / "runs"
    (install,) = [line for line in worker.record.read_text().splitlines() if " pip install " in line]
    assert "--exclude-newer 2026-11-27T00:00:00Z" in install and install.endswith("/code[tpu]")


def test_a_worker_that_cannot_install_records_the_failure(worker):
    (worker.folder / "code/abc.tar.gz").unlink()
    assert worker.run("work").returncode != 0
    assert "exit" in (worker.folder / "status/host-3").read_text()
    assert "abc.tar.gz" in (worker.folder / "logs/host-3.log").read_text()


def test_start_replaces_the_unit_of_an_earlier_start(worker):
    (worker.folder / "status").mkdir()
    (worker.folder / "status/host-3").write_text("host-3 exit 143\n")
    assert worker.run("start").returncode == 0
    assert not (worker.folder / "status/host-3").exists()
    stop, *_, begin = worker.record.read_text().splitlines()
    assert stop == "systemctl stop retool" and begin.startswith("systemd-run --unit=retool ")
    assert begin.endswith("-- python -m retool_jax.train config=grpo") and " work BUCKET=b NAME=run " in begin


def test_an_unknown_setting_of_a_worker_is_refused():
    command = ["bash", str(ROOT / "deploy/tpu/worker.sh"), "work", "PTAH=/", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "PTAH" in done.stderr
