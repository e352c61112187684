"""The Python and the packages that programs see, and how a launcher puts them into a sandbox."""

import json
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from retool_jax.errors import UserError

INSIDE_TARGET = "/inside"  # where the programs of `inside/` are mounted
OWN_FOLDERS = ("/tmp/", "/var/tmp/", "/dev/shm/")  # programs have their own folders here
MANIFEST = "manifest.json"
ROOT = "root"
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")


@dataclass(frozen=True)
class Runtime:
    """A Python for programs."""

    python: str  # the interpreter's path inside
    version: str  # the `sys.version` that the interpreter must report
    packages: tuple[str, ...]  # folders for `sys.path`, as paths inside
    root: Path | None = None  # a root file system to mount read-only, with folders for /proc, /dev, /tmp, /inside
    binds: tuple[str, ...] = ()  # without a root: paths of the host to mount read-only at the same place
    links: tuple[tuple[str, str], ...] = ()  # and links to make: (what it points to, where it lies)


def images_folder() -> Path:
    """Where images are built unless a folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # "~" itself for a user without a home
    return Path(cache) / "retool_jax" / "images"


def read_manifest(folder: Path) -> dict:
    """The manifest of an image. Raises UserError if the folder holds no image."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"sandbox.image: {folder} holds no runtime image ({error}); "
            "build one with `python -m retool_jax.sandbox.image` or leave sandbox.image empty"
        ) from None


def newest_image() -> Path | None:
    """Folder of the image that was built last, if any."""
    found = [path.parent for path in images_folder().glob(f"*/{MANIFEST}")]
    return max(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime, default=None)


def find_runtime(image: str) -> Runtime:
    """The runtime in the folder `image`; if `image` is empty, the newest image, or else this Python.

    Raises UserError if the folder holds no image.
    """
    folder = Path(image).expanduser().absolute() if image else newest_image()
    if folder is None:
        return this_python()
    manifest = read_manifest(folder)
    if manifest["machine"] != os.uname().machine:
        raise UserError(f"sandbox.image: {folder} is for {manifest['machine']}, this machine is {os.uname().machine}")
    return Runtime(
        python=manifest["executable"],
        version=manifest["python"],
        packages=(manifest["packages_folder"],),
        root=folder / ROOT,
    )


def this_python() -> Runtime:
    """The interpreter that runs this code, with its packages and the system's libraries.

    Raises UserError if they lie where programs have their own folders.
    """
    executable = Path(sys.executable)
    folders = {Path(sys.base_prefix), Path(os.path.realpath(sys.base_prefix)), Path(sys.prefix)}
    folders |= {executable.parent, executable.resolve().parent}
    packages = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    folders |= {Path(folder) for folder in packages if Path(folder).is_dir()}
    links, binds = [], {str(folder) for folder in folders}
    for name in SYSTEM_LIBRARIES:
        if os.path.islink(name):
            links.append((os.readlink(name), name))
        elif os.path.isdir(name):
            binds.add(name)
    for path in sorted(binds):
        if path.startswith(OWN_FOLDERS):
            raise UserError(
                f"{path} cannot be shown to programs, which have their own {', '.join(OWN_FOLDERS)}; install this"
                " Python and its packages elsewhere, or build an image: `python -m retool_jax.sandbox.image`"
            )
    outermost = [path for path in binds if not any(path.startswith(f"{other}/") for other in binds)]
    return Runtime(
        python=sys.executable,
        version=sys.version,
        packages=packages,
        binds=tuple(sorted(outermost)),
        links=tuple(links),
    )
