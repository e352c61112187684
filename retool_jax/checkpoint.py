"""Checkpoints: the whole train state and the run's own notes, one folder per step, complete or not there."""

import gc
import json
import logging
import re
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from retool_jax.errors import UserError

absl_logging.set_verbosity(absl_logging.ERROR)  # orbax reports every file it touches
logging.getLogger("orbax").setLevel(logging.ERROR)

# Items of a checkpoint, a folder each. Weights have one of their own, so that who wants them alone reads no moments.
PARAMS, REST, NOTES = "params", "rest", "notes"
WHOLE = "state"  # in the place of the first two in older checkpoints
PATIENCE_S = 30.0  # with a thread of a save that failed
DIGESTS = "digests.json"  # beside the items of a checkpoint: size and CRC-32 of each of its files


class Checkpoints:
    """The last `keep` checkpoints of a run. A save is atomic: killed half-way, it is swept at the next start.

    With `keep=None` they are another run's, there to be read: nothing is made, kept or swept.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder
        if keep is not None and jax.process_index() == 0:
            _sweep(folder, "*")  # orbax leaves one that was killed between its last file and its new name
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=keep is not None,
            read_only=keep is None,
            create=keep is not None,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, notes: dict) -> None:
        """Write the train state (a NamedTuple with `params`) and `notes` (JSON) as checkpoint `step`.

        Raises:
            UserError: the disk is full or refuses; the checkpoints before stay as they are.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        arguments = ocp.args.Composite(**items, **{NOTES: ocp.args.JsonSave(notes)})
        needed, free = (x / 1e6 for x in (_bytes(state), shutil.disk_usage(self.folder).free))
        reason = f"it takes up to {needed:.1f} MB, the disk has {free:.1f} MB left" if free < needed else None
        if reason is None:
            _, reason = _attempt(lambda: self._manager.save(step, args=arguments, force=True))
        if reason is not None:
            _sweep(self.folder, str(step))  # what is there of it takes the room that is missing
            last = self.latest()
            kept = "no checkpoint exists yet" if last is None else f"checkpoint {last} is intact"
            raise UserError(
                f"cannot save checkpoint {step} in {self.folder} ({reason}); {kept};"
                " make room and start the same command again"
            )
        write_digests(self.folder / str(step), jax.process_index())

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """The train state and notes of checkpoint `step`; `like` gives shapes and shardings.

        Raises:
            UserError: the checkpoint is corrupt, or that of another model.
        """
        if (self.folder / str(step) / WHOLE).is_dir():
            restored = self._restore(step, {WHOLE: like})
            return restored[WHOLE], restored[NOTES]
        restored = self._restore(step, _items(like))
        return type(like)(params=restored[PARAMS], **restored[REST]), restored[NOTES]

    def restore_params(self, step: int, like: Any) -> tuple[Any, dict]:
        """The weights and notes of checkpoint `step`, and no other bytes of it; `like` is as in `restore`.

        Raises:
            UserError: as `restore`.
        """
        whole = self.folder.absolute() / str(step) / WHOLE
        if not whole.is_dir():
            restored = self._restore(step, {PARAMS: like})
            return restored[PARAMS], restored[NOTES]
        tree = {PARAMS: like}
        shardings = ocp.checkpoint_utils.construct_restore_args(tree)
        part = ocp.args.PyTreeRestore(item=tree, restore_args=shardings, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            params = self._read(step, [WHOLE], lambda: reader.restore(whole, args=part))[PARAMS]
        return params, self._restore(step, {})[NOTES]

    def _restore(self, step: int, like: dict[str, Any]) -> Any:
        """Items of a checkpoint by their names, and its notes."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        arguments = ocp.args.Composite(**items, **{NOTES: ocp.args.JsonRestore()})
        return self._read(step, [*items, NOTES], lambda: self._manager.restore(step, args=arguments))

    def _read(self, step: int, items: Sequence[str], read: Callable[[], Any]) -> Any:
        """What `read` returns of these items, after their files were found to be as they were written."""
        path = self.folder / str(step)
        others = [other for other in self._manager.all_steps() if other != step]
        way_out = f"; the one of step {max(others)} is used then" if others else " to start over"
        # Asked before orbax is: it reads some damaged arrays as if nothing had happened, and on others its threads
        # print their tracebacks past every handler.
        if damaged := damaged_file(path, items):
            raise UserError(f"checkpoint {path} is corrupt ({damaged}): remove that folder{way_out}")
        restored, reason = _attempt(read)
        if reason is not None:
            raise UserError(
                f"cannot read checkpoint {path} as the state of this config ({reason}):"
                f" choose the folder of a run of this model, or remove that one{way_out}"
            )
        return restored

    def close(self) -> None:
        self._manager.close()


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes of a state with the shardings that it is to be restored to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def write_digests(folder: Path, process: int = 0) -> None:
    """Note the size and the CRC-32 of each file of a checkpoint that this process wrote, in it.

    A full disk leaves it without: unchecked.
    """
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    own = (name for name in names if _writer(name) == process and not name.startswith("digests."))
    digests = {name: _digest(folder / name) for name in own}
    target = folder / (DIGESTS if process == 0 else f"digests.{process}.json")
    temporary = target.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(digests))
        temporary.replace(target)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _writer(name: str) -> int:
    """The process that wrote a file: each has a folder for its shards, and the first writes what is beside them."""
    own = re.search(r"/ocdbt\.process_(\d+)/", name)
    return int(own[1]) if own else 0


def damaged_file(folder: Path, items: Sequence[str]) -> str | None:
    """What is wrong with the files of some items of a checkpoint, and with those beside all items, in words.

    None if each is as it was written, or if that is not known.
    """
    digests = {}
    for path in sorted(folder.glob("digests.*json")):
        try:
            digests |= json.loads(path.read_text())
        except ValueError:
            return f"{path.name} is not JSON"
    for name, expected in digests.items():
        path = folder / name
        if "/" in name and name.split("/")[0] not in items:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected[0]:
            return f"{name} has {path.stat().st_size} of {expected[0]} bytes"
        if _digest(path) != expected:
            return f"{name} is not as it was written"
    return None


def _digest(path: Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _sweep(folder: Path, step: str) -> None:
    for half in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(half, ignore_errors=True)


def _items(state: Any) -> dict[str, Any]:
    """A train state as the items of a checkpoint."""
    fields = state._asdict()
    return {PARAMS: fields.pop(PARAMS), REST: fields}


def _bytes(state: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def _attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call of orbax returns, and None; or None, and why it failed (tensorstore has no common kind of error).

    One array that failed is reported many times over, past every handler: by orbax's threads, by tasks when they are
    collected, and, soon after, by tensorstore's threads, for which nobody waits any more. None of it is shown.
    """
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("absl", "asyncio"))}
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    result = reason = None
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        sys.unraisablehook = show
        try:
            result = call()
        except Exception as error:
            reason = _reason(error)
        if reason is not None:
            _join_threads()
            gc.collect()
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        if reason is None:
            sys.unraisablehook = shown
    return result, reason


def _join_threads() -> None:
    """Wait for what a call that failed left going: the other items are written by threads that nobody asks any more."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):  # orbax's threads raise what they met when they are joined
                thread.join(PATIENCE_S)


def _reason(error: Exception) -> str:
    """An error on one short line; of tensorstore's long ones, what the operating system said."""
    text = " ".join(str(error).split())
    if said := re.search(r": ([A-Z][a-z][^:\[\]]*) \[(?:os_error_code|tensorstore_spec)=", text):
        return said[1]
    return f"{type(error).__name__}: {text[:160]}"
