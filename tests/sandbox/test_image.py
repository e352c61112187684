"""The runtime image: a small one is built, then used."""

import asyncio
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import SandboxConfig, image, open_sandbox
from retool_jax.sandbox.launch import bubblewrap, gvisor
from retool_jax.sandbox.launch.runtime import find_runtime, newest_image


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image without packages."""
    folder = tmp_path_factory.mktemp("images") / "small"
    image.main([f"to={folder}", "packages="])
    return folder


def test_the_manifest_says_what_is_in_it(small: Path):
    manifest = json.loads((small / "manifest.json").read_text())
    assert (manifest["python"], manifest["packages"]) == (sys.version, {})
    root = small / "root"
    assert (root / manifest["executable"].lstrip("/")).is_file()
    assert {"proc", "dev", "tmp", "inside"} <= {path.name for path in root.iterdir()}
    assert os.readlink(root / "var" / "tmp") == "/tmp"
    assert list(small.parent.iterdir()) == [small]  # the temporary folder of the build is gone
    assert not list(root.rglob("site-packages/*"))


@pytest.mark.parametrize("backend", ["bubblewrap", "gvisor"])
def test_programs_see_the_image_and_nothing_else(backend: str, small: Path):
    from retool_jax.sandbox.launch.launchers import LAUNCHERS

    config = SandboxConfig((backend,), slots=1, image=str(small))
    if reason := LAUNCHERS[backend].missing(config):
        pytest.skip(f"{backend}: {reason}")
    code = (
        "import ctypes, multiprocessing, os, subprocess, sys\nprint(sys.version)\nprint(sys.prefix, sys.executable)\n"
        "print(sorted(set(os.listdir('/')) - {'sys'}))\n"
        "libraries = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "print(all(path.startswith(('/lib', '/usr/lib', '/runtime')) for path in libraries))\n"
        "print(subprocess.run([sys.executable, '-c', 'print(6 * 7)'], capture_output=True, text=True).stdout)\n"
        "import numpy"
    )

    async def main():
        async with open_sandbox(config) as box:
            return await box.run(code)

    result = asyncio.run(main())
    version, places, folders, own, child = result.stdout.strip().split("\n")
    assert version == sys.version
    assert places.startswith("/runtime /runtime/bin/python")
    assert set(eval(folders)) <= {"dev", "inside", "lib", "lib64", "proc", "runtime", "tmp", "usr", "var"}
    assert (own, child) == ("True", "42")
    assert result.stderr.endswith("ModuleNotFoundError: No module named 'numpy'\n")


def test_another_python_than_the_manifests_is_refused(small: Path, tmp_path: Path):
    if reason := bubblewrap.missing(SandboxConfig()):
        pytest.skip(f"bubblewrap: {reason}")
    (tmp_path / "root").symlink_to(small / "root")
    manifest = json.loads((small / "manifest.json").read_text()) | {"python": "3.4.0 (from elsewhere)"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    async def main() -> None:
        async with open_sandbox(SandboxConfig(("bubblewrap",), slots=1, image=str(tmp_path))):
            pass

    with pytest.raises(UserError, match=r"should be Python '3\.4\.0 \(from elsewhere\)'"):
        asyncio.run(main())


def test_the_newest_image_is_taken_and_without_one_this_python(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert newest_image() is None
    assert (find_runtime("").python, find_runtime("").root) == (sys.executable, None)
    for age, name in ((20, "older"), (10, "newer")):
        folder = tmp_path / "retool_jax" / "images" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text((small / "manifest.json").read_text())
        when = (small / "manifest.json").stat().st_mtime - age
        os.utime(folder / "manifest.json", (when, when))
    assert newest_image() == tmp_path / "retool_jax" / "images" / "newer"
    runtime = find_runtime("")
    assert (runtime.root, runtime.version) == (newest_image() / "root", sys.version)
    assert find_runtime(str(small)).root == small / "root"


def test_errors_name_the_folder_and_the_way_out(small: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no runtime image.*python -m retool_jax.sandbox.image"):
        find_runtime(str(tmp_path))
    with pytest.raises(UserError, match=f"{small} exists already; name another folder"):
        image.main([f"to={small}", "packages="])
    with pytest.raises(UserError, match=r"cannot read 'size=3'; it takes to, packages \(see --help\)"):
        image.main(["size=3"])
    with pytest.raises(UserError, match=r"cannot read 'package=numpy'; did you mean packages=\.\.\.\?"):
        image.main(["package=numpy"])


@pytest.mark.parametrize("launcher", [gvisor, bubblewrap], ids=["gvisor", "bubblewrap"])
def test_packages_where_programs_have_folders_of_their_own_are_refused(
    launcher: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Programs could not see them, and every import would fail as if that were the program's fault."""
    if why := launcher.missing(SandboxConfig()):
        pytest.skip(why)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.prefix", "/tmp/some-venv")
    reason = launcher.missing(SandboxConfig())
    assert reason.startswith("/tmp/some-venv cannot be shown") and "python -m retool_jax.sandbox.image" in reason
