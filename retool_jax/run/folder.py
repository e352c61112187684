"""A run's folder: check that it belongs to this run, lock it for one process, and keep the resolved config in it."""

import dataclasses
import errno
import fcntl
import fnmatch
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import OmegaConf

from retool_jax import hosts
from retool_jax.errors import UserError
from retool_jax.fields import defaults_of, flatten, flatten_dict, nested, secret_keys, show
from retool_jax.files import CONFIG, LOCK, replacing
from retool_jax.models.config import ModelConfig
from retool_jax.run.load import make, read_yaml
from retool_jax.run.schema import Run, SFTRun, task_of

UNFINISHED = "config.tmp"  # left by a start that was killed
POLL_S = 0.5

# Patterns of keys that may change when a run is resumed. Every other key decides the run's numbers, or what they are
# compared with, and must be as it was when the folder was made.
MAY_CHANGE = (
    # Folder, length, how often it evaluates and saves. An evaluation changes no weights; what it measures is fixed.
    *("run", "rl.steps", "rl.max_dropped", "rl.save_rollouts", "evaluation.every", "checkpoint.*"),
    # The layout on devices: the same formulas, so the same numbers up to the order of float sums. A gradient does not
    # depend on how its batch is split (contract 6), nor a draw on the slots and pages around it (contract 5).
    *("mesh.*", "hosts.*", "sft.rows_per_micro", "rl.rows_per_micro", "rl.row_length", "rl.share_prefixes"),
    *("model.remat", "model.head_chunk", "model.attention_kernel", "model.cache_kernel"),
    *("engine.slots", "engine.chunk_*", "engine.decode_steps", "engine.read_late", "engine.page_size"),
    *("engine.pages", "engine.prefix_tokens", "engine.*_buckets", "engine.tp"),
    "model.max_positions",  # no computation uses it
    *("compare", "evaluation.max_dropped"),  # what an evaluation is compared with, and when it gives up
    "replay",  # the same trajectories, from a file
    "logger",  # where numbers are sent
    # Where programs run and how the workers are kept: their faults are no signal (contract 7). What a program sees and
    # may use (image, modules, limits) decides its output, so it is fixed.
    *("sandbox.backend", "sandbox.slots", "sandbox.urls", "sandbox.token", "sandbox.queue_*", "sandbox.retries"),
    *("sandbox.recycle_*", "sandbox.probe_s", "sandbox.session*"),
)
# Those of them that may also differ between the hosts of a run.
OF_A_HOST = ("run", "compare", "logger", "hosts.*", "sandbox.*")
# Keys of older folders that this version no longer has, with the values at which they had no effect.
REMOVED: dict[str, tuple[object, ...]] = {
    "rollout.tool_output_chars": (),  # outputs are cut by tokens now, and no number of characters does the same
}


@contextmanager
def claim_folder(run: Run, wait: bool = False) -> Iterator[Path]:
    """Lock the run's folder until the block or the process ends, however it ends; create it if needed.

    A new folder gets its `config.yaml`. The config of an existing one is left as it is: `write_config` updates it once
    all checks have passed. Of several processes of one run the first holds the lock for all. With `wait`, wait for a
    folder that is in use.

    Raises:
        UserError: the folder holds a run of another config, or no run, or is in use.
    """
    folder = Path(run.run)
    check_folder(run)  # before the lock file is made: nothing may be written in a folder of something else
    if not hosts.is_first():
        hosts.broadcast(None)  # waits until the first host has the lock
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, folder, wait)
        check_folder(run)  # another process may have begun another run here meanwhile
        if not (folder / CONFIG).is_file():
            write_config(run)
        hosts.broadcast(None)
        yield folder
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, wait: bool) -> None:
    announced = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            if not wait:
                raise UserError(
                    f"{folder} is in use by {holder}; wait until it ends, or choose another run=FOLDER"
                ) from None
            if not announced:
                print(f"waiting for {folder}, which is in use by {holder}", flush=True)
            announced = True
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(f"{folder}: its file system has no locks ({error.strerror}); make sure that no other run uses it")
            break
    with suppress(OSError):  # on a full disk the lock holds without the holder's name
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)


def may_change(key: str, patterns: Sequence[str] = MAY_CHANGE) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def check_hosts(run: Run) -> None:
    """A `UserError` when this host was started with another config than the first one."""
    flat = to_flat(run)
    hosts.require_same({key: flat[key] for key in flat if not (may_change(key) and may_change(key, OF_A_HOST))})


def check_folder(run: Run) -> None:
    """Compare a run with its folder, without writing.

    Raises:
        UserError: the folder holds a run of another config, or no run.
    """
    folder = Path(run.run)
    if (folder / CONFIG).is_file():
        there = saved_config(folder)
        if found := [difference for difference in differences(run, there) if not may_change(difference[0])]:
            key, before, here = found[0]
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(
                f"{folder} holds another run: {key} is {show(before)} there and {show(here)} here{more};"
                " choose another run=FOLDER, or remove that one"
            )
        for key in sorted(there.keys() - to_flat(run).keys()):
            if not may_change(key) and there[key] not in REMOVED.get(key, ()):
                raise UserError(
                    f"{folder} was begun with {key}={show(there[key])}, a key that this version does not have; go on"
                    " with the version that began it, choose another run=FOLDER, or remove the key from"
                    f" {folder / CONFIG} to go on without it"
                )
    elif folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK, UNFINISHED}):
        raise UserError(f"{folder} is not empty and holds no run; choose another run=FOLDER")


def saved_config(folder: Path) -> dict[str, object]:
    """Dotted keys and values of the config of a run's folder.

    Raises:
        UserError: that config cannot be read.
    """
    return flatten_dict(read_yaml(str(folder / CONFIG)))


def differences(run: Run, there: dict[str, object]) -> list[tuple[str, object, object]]:
    """(key, saved value, value here) of each key whose value differs; secrets are not compared."""
    here = to_flat(run)
    if there.get("task") != here["task"]:
        return [("task", there.get("task"), here["task"])]
    there = defaults_of(type(run)) | meaning_of_absent_keys(there) | there
    keys = sorted(here.keys() - secret_keys(type(run)))
    return [(key, there[key], here[key]) for key in keys if there[key] != here[key]]


def meaning_of_absent_keys(there: dict[str, object]) -> dict[str, object]:
    """Values of keys that an older folder lacks, where its version did something else than today's default."""
    trained = "sft" if there.get("task") == "sft" else "rl"
    dtype = there.get("model.param_dtype", "float32")  # gradients and moments had the dtype of the weights
    meant: dict[str, object] = {f"{trained}.optimizer.{kind}_dtype": dtype for kind in ("gradient", "moment")}
    meant["evaluation.answer_tokens"] = 0  # evaluations reserved no tokens for an answer
    if there.get("tokenizer") != "miniature":  # the miniature has a prompt of its own
        sections = [section for section in ("rollout", "sft") if there.get(f"{section}.grammar") == "retool"]
        meant |= {f"{section}.tool_prompt": "paper" for section in sections}  # retool had no other prompt
    return meant


def write_config(run: Run) -> None:
    """Save the resolved config in the run's folder, without secrets; the file is replaced atomically."""
    if not hosts.is_first():
        return
    folder = Path(run.run)
    if (folder / CONFIG).is_file():
        for key, there, here in differences(run, saved_config(folder)):
            if key != "run":
                print(f"{key} is {show(here)} from here on; it was {show(there)}")
    with replacing(folder / CONFIG) as file:
        file.write(OmegaConf.to_yaml(nested(to_flat(run))))


def to_flat(run: Run) -> dict[str, object]:
    """Dotted keys and values of a run in YAML's types, with its task; secrets are empty."""
    flat = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(run).items()}
    return {"task": task_of(type(run))} | flat | dict.fromkeys(secret_keys(type(run)), "")


def read_model(folder: Path) -> tuple[ModelConfig, str]:
    """The model of a run's folder and the name of its tokenizer; folders of older versions can be read, too.

    Raises:
        UserError: its config cannot be read, or is not that of a run.
    """
    values = read_yaml(str(folder / CONFIG))
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(values.get("tokenizer"), str):
        raise UserError(f"{folder / CONFIG} is not the config of a run; choose the folder of one")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {"model": {key: value for key, value in model.items() if key in known}, "tokenizer": values["tokenizer"]}
    found = make(SFTRun, values)
    return found.model, found.tokenizer
