"""`python -m retool_jax.sandbox.image`: builds the runtime that programs see.

The runtime is a root file system with a Python, its libraries and packages, and nothing else.
"""

import compileall
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from retool_jax.errors import UserError, run_command
from retool_jax.sandbox.launch.runtime import MANIFEST, ROOT, images_folder
from retool_jax.sandbox.words import help_text, option, read_words

PACKAGES = "numpy==2.4.6 sympy==1.14.0 scipy==1.17.1 mpmath==1.3.0 networkx==3.6.1 pandas==3.1.1"
ABOUT = "Build the runtime that programs see: a root file system with a Python, its libraries and some packages."
PREFIX = "runtime"
# Parts of the standard library that are useless without a terminal, a display or an installer.
LEFT_OUT = (
    *("site-packages", "test", "idlelib", "lib2to3", "tkinter", "_tkinter*", "turtledemo", "ensurepip", "config-*"),
)
MOUNT_POINTS = ("proc", "dev", "tmp", "inside", "var")


def say(text: str) -> None:
    print(text, flush=True)


def libraries(files: Iterable[Path]) -> set[Path]:
    """The shared libraries that the dynamic linker finds for these files, and the linker itself."""
    done = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False)
    return {Path(path) for path in re.findall(r"(?:=>|^)\s*(/\S+) \(0x", done.stdout, re.MULTILINE)}


def copy_python(root: Path) -> tuple[Path, Path]:
    """Copy the interpreter and the standard library; returns the interpreter and the folder for packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = root / PREFIX / "bin" / version
    interpreter.parent.mkdir(parents=True)
    shutil.copy2(os.path.realpath(sys.executable), interpreter)
    for name in ("python", "python3"):
        (interpreter.parent / name).symlink_to(version)
    library = root / PREFIX / "lib" / version
    for name in dict.fromkeys(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib")):
        source = Path(name.replace(sys.prefix, sys.base_prefix))
        shutil.copytree(source, library, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    packages = library / "site-packages"
    packages.mkdir()
    return interpreter, packages


def install(packages: list[str], folder: Path) -> dict[str, str]:
    """Install packages and their dependencies into `folder` with pip; returns names and versions. Raises UserError."""
    if packages:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-warn-conflicts", "--no-compile", "--only-binary=:all:", "--target", str(folder), *packages]
        if subprocess.run(command, check=False).returncode != 0:
            raise UserError(f"pip could not install {' '.join(packages)}; see above")
    shutil.rmtree(folder / "bin", ignore_errors=True)
    for tests in sorted(folder.rglob("tests"), reverse=True):
        shutil.rmtree(tests)
    found = {entry.metadata["Name"]: entry.version for entry in importlib.metadata.distributions(path=[str(folder)])}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def copy_libraries(root: Path) -> tuple[Path, Path]:
    """Copy the system libraries that the image needs; returns the linker and the libraries' folder.

    `ldd` gets the interpreter of this machine, not the copy: it may find its libpython relative to its own place or at
    a fixed one, which the image does not have. In the image all libraries lie in the folder of libc, where the linker
    looks by default, so that it cannot pick up one of another version.
    """
    # Files of the image use libraries of the image or of the system; only those of the system are copied.
    needed = libraries([Path(os.path.realpath(sys.executable))])
    needed |= libraries(path for path in root.rglob("*.so*") if path.is_file())
    needed = {path for path in needed if not path.is_relative_to(root)}
    linker = next((path for path in needed if path.name.startswith(("ld-linux", "ld-musl", "ld64"))), None)
    libc = next((path for path in needed if path.name.startswith("libc.")), linker)
    if linker is None or libc is None:
        raise UserError(f"ldd does not name the libraries of {sys.executable}; is it there, and is it in the PATH?")
    for path in sorted(needed):
        home = path.parent if path == linker else libc.parent
        target = root / home.relative_to("/") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy2(path, target)
    return root / linker.relative_to("/"), root / libc.parent.relative_to("/")


def try_out(linker: Path, folder: Path, interpreter: Path, packages: Iterable[str]) -> None:
    """Run the image's interpreter with only the image's libraries. Raises UserError if it fails."""
    imports = ["ctypes", "ssl", "sqlite3", "zlib", *packages]
    code = "import importlib.util as u, sys\n" + "".join(
        f"import {name}\n" if name not in ("ssl", "sqlite3") else f"u.find_spec('_{name}') and __import__('{name}')\n"
        for name in imports
    )
    command = [str(linker), "--library-path", str(folder), str(interpreter), "-I", "-c", f"{code}print(sys.version)"]
    done = subprocess.run(command, capture_output=True, text=True, env={"LANG": "C.UTF-8"}, cwd="/", check=False)
    if done.stdout.strip() != sys.version:
        raise UserError(f"the image's Python does not work: {(done.stderr or done.stdout).strip()[-500:]}")


def build(to: Path, packages: list[str]) -> None:
    """Build an image in the folder `to`, which must not exist. Raises UserError."""
    if to.exists():
        raise UserError(f"to={to} exists already; name another folder, or remove it once no sandbox uses it")
    beside = to.parent / f".{to.name}.{os.getpid()}"  # renamed to `to` when it is complete
    root = beside / ROOT
    started = time.monotonic()
    try:
        root.mkdir(parents=True)
        for name in MOUNT_POINTS:
            (root / name).mkdir()
        (root / "var" / "tmp").symlink_to("/tmp")
        say(f"copying Python {sys.version.split()[0]}")
        interpreter, folder = copy_python(root)
        if packages:
            say(f"installing {' '.join(packages)}")
        versions = install(packages, folder)
        say("compiling")
        compileall.compile_dir(interpreter.parent.parent / "lib", quiet=2, stripdir=str(root), workers=1)
        say("copying libraries")
        linker, shared = copy_libraries(root)
        say("trying it")
        try_out(linker, shared, interpreter, [re.split(r"[\s=<>!~\[;]", name, maxsplit=1)[0] for name in packages])
        manifest = {
            "python": sys.version,
            "machine": os.uname().machine,
            "executable": "/" + str(interpreter.relative_to(root)),
            "packages_folder": "/" + str(folder.relative_to(root)),
            "packages": versions,
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (beside, root):
            path.chmod(0o755)
        beside.rename(to)
    finally:
        if beside.exists():
            shutil.rmtree(beside)
    size = sum(path.lstat().st_size for path in to.rglob("*")) >> 20
    say(f"built {to} ({size} MB) in {time.monotonic() - started:.0f} s")


@dataclass(frozen=True)
class Options:
    """The command line."""

    to: str = option(
        "", "folder to build; empty: a new one below ~/.cache/retool_jax/images, of which the sandbox takes the newest"
    )
    packages: str = option(PACKAGES, "packages for pip, with spaces between them; empty: none")


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(help_text("python -m retool_jax.sandbox.image", ABOUT, Options))
        return
    options = read_words(words, Options)
    if sys.platform != "linux":
        raise UserError(f"a runtime image is for Linux, this is {sys.platform}; build it in a Linux container")
    name = f"python{sys.version.split()[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    to = Path(options.to).expanduser().absolute() if options.to else images_folder() / name
    build(to, options.packages.split())


if __name__ == "__main__":
    run_command(main)
