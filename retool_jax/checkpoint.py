"""Checkpoints: the whole train state and notes of the run, a folder for each step; a folder is complete or absent.

A folder is a local path or an address such as gs://bucket/run (`etils.epath`; the latter needs gcsfs).
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

# Orbax logs every file, and every error several times before it raises it.
absl_logging.set_verbosity(absl_logging.FATAL)
logging.getLogger("orbax").setLevel(logging.CRITICAL)

# Items of a checkpoint, a folder each. Weights have their own, so that they can be read without the moments.
PARAMS, REST, NOTES = "params", "rest", "notes"
WHOLE = "state"  # older checkpoints have this item instead of the first two
PATIENCE_S = 30.0  # how long to wait for a thread of a save that failed
LONGEST_SAVE_S = 4 * 3600
DIGESTS = "digests.json"  # beside the items of a checkpoint: size and CRC-32 of each file


class Checkpoints:
    """The last `keep` checkpoints of a run. Saves are atomic: what a killed save left is removed at the next start.

    A save continues in threads after `save` has returned; there is one save at a time. Every method waits for it
    first and raises its error. With `keep=None` the checkpoints are another run's and only read: nothing is created or
    removed.
    """

    def __init__(self, folder: epath.PathLike, keep: int | None) -> None:
        self.folder = epath.Path(folder)
        if keep is not None and hosts.is_first():
            _remove_unfinished(self.folder, "*")  # orbax leaves one that was killed before its final rename
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=keep is not None,
            # Make folders before `save` returns: if a thread failed to make them, other threads would wait for it.
            async_options=ocp.options.AsyncOptions(
                timeout_secs=LONGEST_SAVE_S, create_directories_asynchronously=False
            ),
            cleanup_tmp_directories=keep is not None,
            read_only=keep is None,
            create=keep is not None,
        )
        absolute = self.folder if _is_remote(self.folder) else self.folder.resolve()
        self._manager = ocp.CheckpointManager(absolute, options=options, handler_registry=_handlers())
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # finishes a save
        self._saving: tuple[int, Future] | None = None  # the last save, until `wait` has taken its result

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        self.wait()
        return hosts.broadcast(self._manager.latest_step())

    def save(self, step: int, state: Any, notes: dict) -> None:
        """Write the train state (a NamedTuple with `params`) and `notes` (JSON) as checkpoint `step`.

        Returns when both are copied, so that an update may consume the state; writing continues in the background.

        Raises:
            UserError: writing failed, now or in the previous save; complete checkpoints stay as they are.
        """
        self.wait()
        if reason := _too_little_room(self.folder, state):
            raise self._refusal(step, reason)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(_copied(state)).items()}
        arguments = ocp.args.Composite(**items, **{NOTES: ocp.args.JsonSave(copy.deepcopy(notes))})
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:  # from the disk, orbax or tensorstore
            raise self._failed(step, error) from None
        self._saving = step, self._thread.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        write_digests(self.folder / str(step), jax.process_index())

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            UserError: it failed; raised once.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        if error := future.exception():
            raise self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> UserError:
        """Remove what a failed save left, and return the error to raise."""
        with suppress(Exception):  # the manager raises the error once in each thread
            self._manager.wait_until_finished()
        _join_threads()
        _remove_unfinished(self.folder, str(step))  # its files take the room that is missing
        self._manager.reload()  # it has forgotten the checkpoints that the failed one was to replace
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
            UserError: the checkpoint is corrupt, or of another model.
        """
        parts, notes = self._read(step, _items(like))
        return type(like)(params=parts[PARAMS], **parts[REST]), notes

    def restore_params(self, step: int, like: Any) -> tuple[Any, dict]:
        """As `restore`, but only the weights and notes; nothing else of the checkpoint is read."""
        parts, notes = self._read(step, {PARAMS: like})
        return parts[PARAMS], notes

    def _read(self, step: int, like: dict[str, Any]) -> tuple[dict, dict]:
        """Items of a checkpoint by name, and its notes, after a check of their files' digests."""
        self.wait()
        path = self.folder / str(step)
        whole = (path / WHOLE).is_dir()
        trees = {WHOLE: {PARAMS: like[PARAMS]} | like.get(REST, {})} if whole else like
        others = [other for other in self._manager.all_steps() if other != step]
        way_out = f"; the one of step {max(others)} is used then" if others else " to start over"
        # Checked before orbax reads: it returns some damaged arrays without an error, and for others its threads print
        # tracebacks that no handler can catch.
        if damaged := next(filter(None, hosts.gather(damaged_file(path, [*trees, NOTES]))), None):
            raise UserError(f"checkpoint {path} is corrupt ({damaged}): remove that folder{way_out}")

        def item(tree: Any) -> ocp.args.PyTreeRestore:
            arguments = ocp.checkpoint_utils.construct_restore_args(tree)
            return ocp.args.PyTreeRestore(tree, arguments, partial_restore=whole)

        items = {name: item(tree) for name, tree in trees.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items, **{NOTES: ocp.args.JsonRestore()}))
        except Exception as error:  # tensorstore's errors have no common type
            raise UserError(
                f"cannot read checkpoint {path} as the state of this config ({_reason(error)}):"
                f" choose the folder of a run of this model, or remove that one{way_out}"
            ) from error
        if whole:
            fields = dict(restored[WHOLE])
            return {PARAMS: fields.pop(PARAMS), REST: fields}, restored[NOTES]
        return restored, restored[NOTES]

    def close(self) -> None:
        """Wait for the last save and release the folder.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state, with the shardings to restore it to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def write_digests(folder: epath.PathLike, process: int = 0) -> None:
    """Write size and CRC-32 of each file that this process wrote in a checkpoint's folder into a file there.

    If the disk is full that file is missing, and the checkpoint will not be checked.
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
    """The process that wrote a file: each has a folder for its shards, and the first one writes all other files."""
    own = re.search(r"/ocdbt\.process_(\d+)/", name)
    return int(own[1]) if own else 0


def damaged_file(folder: epath.PathLike, items: Sequence[str]) -> str | None:
    """The first error, in words, in the files of these items of a checkpoint and in the files beside all items.

    None if all files match their digests, or if there are no digests. Of several hosts each checks its share of the
    files.
    """
    folder, digests = epath.Path(folder), {}
    for path in sorted(folder.glob("digests.*json")):
        try:
            digests |= dict(json.loads(path.read_text()))
        except (TypeError, ValueError):
            return f"{path.name} is not JSON, or no table"
    wanted = [name for name in digests if "/" not in name or name.split("/")[0] in items]
    for name in (name for number, name in enumerate(wanted) if hosts.is_mine(number)):
        path, expected = folder / name, digests[name]
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


def _remove_unfinished(folder: epath.Path, step: str) -> None:
    for path in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        with suppress(OSError):
            path.rmtree()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Handlers that read and write each item.

    Without a limit on the bytes in flight, orbax writes the arrays of an item in one transaction, so that a disk error
    is raised once. With a limit, orbax's default, each array is written by itself: when one fails, the others go on,
    and their threads print that the event loop which they report to is closed.

    Arrays are not compressed: compression makes trained weights and moments a twelfth smaller, and a save takes more
    than twice the CPU time.
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
    """The items of a checkpoint that hold a train state."""
    fields = state._asdict()
    return {PARAMS: fields.pop(PARAMS), REST: fields}


def _copied(state: Any) -> Any:
    """A copy of a state on CPU, whose buffers the next update cannot overwrite while they are written.

    Arrays of an accelerator are returned as they are, since orbax copies them before its `save` returns. From CPU
    arrays it would write directly, and the next update reuses their memory.
    """

    def copied(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return np.array(x)
        if any(device.platform != "cpu" for device in x.sharding.device_set):
            return x
        # Shard by shard, since device_put does not copy an array that is spread over several processes.
        shards = [jax.device_put(shard.data, shard.device, may_alias=False) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    return jax.tree.map(copied, state)


def _too_little_room(folder: epath.Path, state: Any) -> str | None:
    """Why a state does not fit on the disk, if that is known in advance."""
    if _is_remote(folder):
        return None
    needed, free = (x / 1e6 for x in (sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(folder).free))
    return f"it takes up to {needed:.1f} MB, the disk has {free:.1f} MB left" if free < needed else None


def _join_threads() -> None:
    """Wait for orbax's threads after a failed save: those that write the other items are still running."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            with suppress(Exception):  # orbax's threads raise their error when they are joined
                thread.join(PATIENCE_S)


def _reason(error: BaseException) -> str:
    """An error on one short line; of tensorstore's long messages only the operating system's part."""
    text = " ".join(str(error).split())
    if said := re.search(r": ([A-Z][a-z][^:\[\]]*) \[(?:os_error_code|tensorstore_spec)=", text):
        return said[1]
    return f"{type(error).__name__}: {text[:160]}"
