"""Checkpoints: the whole train state and the run's own notes, one folder per step, complete or not there.

A folder is a path of this machine or an address such as gs://bucket/run (`etils.epath`; the latter needs gcsfs).
"""

import copy
import json
import logging
import os
import re
import shutil
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from retool_jax import hosts
from retool_jax.errors import UserError

# Orbax reports every file it touches, and every error several times before it raises it.
absl_logging.set_verbosity(absl_logging.FATAL)
logging.getLogger("orbax").setLevel(logging.CRITICAL)

# Items of a checkpoint, a folder each. Weights have one of their own, so that who wants them alone reads no moments.
PARAMS, REST, NOTES = "params", "rest", "notes"
WHOLE = "state"  # in the place of the first two in older checkpoints
PATIENCE_S = 30.0  # with a thread of a save that failed
LONGEST_SAVE_S = 4 * 3600
DIGESTS = "digests.json"  # beside the items of a checkpoint: size and CRC-32 of each of its files


class Checkpoints:
    """The last `keep` checkpoints of a run. A save is atomic: killed half-way, it is swept at the next start.

    A save goes on in threads after `save` has returned, one save at a time. Whatever asks for checkpoints waits for
    it, and the next call of any method tells what it met. With `keep=None` the checkpoints are another run's, there to
    be read: nothing is made, kept or swept.
    """

    def __init__(self, folder: epath.PathLike, keep: int | None) -> None:
        self.folder = epath.Path(folder)
        if keep is not None and hosts.is_first():
            _sweep(self.folder, "*")  # orbax leaves one that was killed between its last file and its new name
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=keep is not None,
            # Folders are made before `save` returns: where a thread could not make them, others would wait for it.
            async_options=ocp.options.AsyncOptions(
                timeout_secs=LONGEST_SAVE_S, create_directories_asynchronously=False
            ),
            cleanup_tmp_directories=keep is not None,
            read_only=keep is None,
            create=keep is not None,
        )
        absolute = self.folder if _is_remote(self.folder) else self.folder.resolve()
        self._manager = ocp.CheckpointManager(absolute, options=options, handler_registry=_handlers())
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # sees a save to its end
        self._saving: tuple[int, Future] | None = None  # the last one, until somebody asked how it went

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        self.wait()
        return hosts.agreed(self._manager.latest_step())

    def save(self, step: int, state: Any, notes: dict) -> None:
        """Write the train state (a NamedTuple with `params`) and `notes` (JSON) as checkpoint `step`.

        Returns when both are copied, so that an update may consume the state; they are written meanwhile.

        Raises:
            UserError: the disk is full or refuses, now or at the save before; complete checkpoints stay as they are.
        """
        self.wait()
        if reason := _too_little_room(self.folder, state):
            raise self._refusal(step, reason)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(_copied(state)).items()}
        arguments = ocp.args.Composite(**items, **{NOTES: ocp.args.JsonSave(copy.deepcopy(notes))})
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:  # of the disk, of orbax or of tensorstore
            raise self._failed(step, error) from None
        self._saving = step, self._thread.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        write_digests(self.folder / str(step), jax.process_index())

    def wait(self) -> None:
        """Return when the last save is complete.

        Raises:
            UserError: it failed; told once.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        if error := future.exception():
            raise self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> UserError:
        """Clear away a save that failed; what to say of it."""
        with suppress(Exception):  # the manager tells each thread once
            self._manager.wait_until_finished()
        _join_threads()
        _sweep(self.folder, str(step))  # what is there of it takes the room that is missing
        self._manager.reload()  # it has forgotten those that the failed one was to replace
        return self._refusal(step, _reason(error))

    def _refusal(self, step: int, reason: str) -> UserError:
        last = self._manager.latest_step()
        kept = "no checkpoint exists yet" if last is None else f"checkpoint {last} is intact"
        return UserError(
            f"cannot save checkpoint {step} in {self.folder} ({reason}); {kept};"
            " make room and start the same command again"
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """The train state and notes of checkpoint `step`; `like` gives shapes and shardings.

        Raises:
            UserError: the checkpoint is corrupt, or that of another model.
        """
        parts, notes = self._read(step, _items(like))
        return type(like)(params=parts[PARAMS], **parts[REST]), notes

    def restore_params(self, step: int, like: Any) -> tuple[Any, dict]:
        """As `restore`, of the weights alone: no other bytes of the checkpoint are read."""
        parts, notes = self._read(step, {PARAMS: like})
        return parts[PARAMS], notes

    def _read(self, step: int, like: dict[str, Any]) -> tuple[dict, dict]:
        """Items of a checkpoint by their names, and its notes, after their files were found to be as written."""
        self.wait()
        path = self.folder / str(step)
        whole = (path / WHOLE).is_dir()
        trees = {WHOLE: {PARAMS: like[PARAMS]} | like.get(REST, {})} if whole else like
        others = [other for other in self._manager.all_steps() if other != step]
        way_out = f"; the one of step {max(others)} is used then" if others else " to start over"
        # Asked before orbax is: it reads some damaged arrays as if nothing had happened, and on others its threads
        # print their tracebacks past every handler.
        if damaged := damaged_file(path, [*trees, NOTES]):
            raise UserError(f"checkpoint {path} is corrupt ({damaged}): remove that folder{way_out}")

        def item(tree: Any) -> ocp.args.PyTreeRestore:
            arguments = ocp.checkpoint_utils.construct_restore_args(tree)
            return ocp.args.PyTreeRestore(tree, arguments, partial_restore=whole)

        items = {name: item(tree) for name, tree in trees.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items, **{NOTES: ocp.args.JsonRestore()}))
        except Exception as error:  # tensorstore has no common kind of error
            raise UserError(
                f"cannot read checkpoint {path} as the state of this config ({_reason(error)}):"
                f" choose the folder of a run of this model, or remove that one{way_out}"
            ) from error
        if whole:
            fields = dict(restored[WHOLE])
            return {PARAMS: fields.pop(PARAMS), REST: fields}, restored[NOTES]
        return restored, restored[NOTES]

    def close(self) -> None:
        """Wait for the last save and let go of the folder.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes of a state with the shardings that it is to be restored to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def write_digests(folder: epath.PathLike, process: int = 0) -> None:
    """Note the size and the CRC-32 of each file of a checkpoint that this process wrote, in it.

    A full disk leaves it without: unchecked.
    """
    folder = epath.Path(folder)
    files = sorted(str((above / name).relative_to(folder)) for above, _, names in folder.walk() for name in names)
    own = [name for name in files if _writer(name) == process and not name.startswith("digests.")]
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


def damaged_file(folder: epath.PathLike, items: Sequence[str]) -> str | None:
    """What is wrong with the files of some items of a checkpoint, and with those beside all items, in words.

    None if each is as it was written, or if that is not known.
    """
    folder, digests = epath.Path(folder), {}
    for path in sorted(folder.glob("digests.*json")):
        try:
            digests |= dict(json.loads(path.read_text()))
        except (TypeError, ValueError):
            return f"{path.name} is not JSON, or no table"
    for name, expected in digests.items():
        path = folder / name
        if "/" in name and name.split("/")[0] not in items:
            continue
        if not path.exists():
            return f"{name} is missing"
        if path.stat().length != expected[0]:
            return f"{name} has {path.stat().length} of {expected[0]} bytes"
        if _digest(path) != expected:
            return f"{name} is not as it was written"
    return None


def _digest(path: epath.Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().length, crc]


def _sweep(folder: epath.Path, step: str) -> None:
    for half in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        with suppress(OSError):
            half.rmtree()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """What reads and writes each item.

    Without a limit on the bytes in flight, orbax writes the arrays of an item in one transaction, so that a disk which
    refuses is one error. With one, as is its default, every array is written by itself: where one fails, the others
    go on, and their threads print that the event loop which they report to is closed.

    Arrays are written as they are: compressed, trained weights and moments are a twelfth smaller, and a save takes more
    than twice the processor's time.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in (PARAMS, REST, WHOLE):
        how = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=None, use_compression=False)
        arrays = ocp.PyTreeCheckpointHandler(handler_impl=how)
        registry.add(name, ocp.args.PyTreeSave, arrays)
        registry.add(name, ocp.args.PyTreeRestore, arrays)
    notes = ocp.handlers.JsonCheckpointHandler()
    registry.add(NOTES, ocp.args.JsonSave, notes)
    registry.add(NOTES, ocp.args.JsonRestore, notes)
    return registry


def _is_remote(folder: epath.Path) -> bool:
    return "://" in os.fspath(folder)


def _items(state: Any) -> dict[str, Any]:
    """A train state as the items of a checkpoint."""
    fields = state._asdict()
    return {PARAMS: fields.pop(PARAMS), REST: fields}


def _copied(state: Any) -> Any:
    """A state whose buffers nobody overwrites while they are written.

    From an accelerator orbax takes a copy before its `save` returns. On a CPU it takes none: it would write from the
    very memory that the next update is given to use again.
    """

    def copied(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return np.array(x)
        if any(device.platform != "cpu" for device in x.sharding.device_set):
            return x
        # Shard by shard: an array that is spread over several processes is otherwise returned as it is.
        shards = [jax.device_put(shard.data, shard.device, may_alias=False) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    return jax.tree.map(copied, state)


def _too_little_room(folder: epath.Path, state: Any) -> str | None:
    """Why a state does not fit on the disk, where that is known in advance."""
    if _is_remote(folder):
        return None
    needed, free = (x / 1e6 for x in (sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(folder).free))
    return f"it takes up to {needed:.1f} MB, the disk has {free:.1f} MB left" if free < needed else None


def _join_threads() -> None:
    """Wait for what a save that failed left going: the other items are written by threads that nobody asks any more."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):  # orbax's threads raise what they met when they are joined
                thread.join(PATIENCE_S)


def _reason(error: BaseException) -> str:
    """An error on one short line; of tensorstore's long ones, what the operating system said."""
    text = " ".join(str(error).split())
    if said := re.search(r": ([A-Z][a-z][^:\[\]]*) \[(?:os_error_code|tensorstore_spec)=", text):
        return said[1]
    return f"{type(error).__name__}: {text[:160]}"
