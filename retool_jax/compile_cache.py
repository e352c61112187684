"""Compiled programs on the disk, so that the next start of a command need not compile them again."""

import os
import time
import zlib
from contextlib import suppress
from pathlib import Path

import jax

LEAST_S = 0.03  # a program that compiles faster than this is not kept
KEPT_DAYS = 60  # older files are removed, since most belong to old code or configs


def keep_programs() -> None:
    """Set jax's compilation cache to a folder below ~/.cache/retool_jax, and print which folder is used.

    jax's own variables have priority: JAX_COMPILATION_CACHE_DIR sets another folder, JAX_ENABLE_COMPILATION_CACHE=0
    turns the cache off. If the folder cannot be made or read, the run goes on without a cache. Files in our folder that
    are older than `KEPT_DAYS` are removed.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if not jax.config.jax_compilation_cache_dir:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(cache) / "retool_jax" / f"compiled-{_processor():08x}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = list(folder.iterdir())
        except OSError as error:
            print(f"compiled programs are not kept: {folder} cannot be made or read ({error.strerror})")
            return
        oldest = time.time() - KEPT_DAYS * 86400
        for file in files:
            with suppress(OSError):  # another command may have removed it
                if file.stat().st_mtime < oldest:
                    file.unlink()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_S)
    print(f"compiled programs: {jax.config.jax_compilation_cache_dir} (JAX_ENABLE_COMPILATION_CACHE=0 keeps none)")


def _processor() -> int:
    """A digest of this processor's features: machines with other processors may share the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return 0
    return zlib.crc32(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").encode())
