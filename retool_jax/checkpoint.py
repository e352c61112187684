"""Checkpoints: the whole train state and the run's own notes, one folder per step, complete or not there."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from retool_jax.errors import UserError

absl_logging.set_verbosity(absl_logging.ERROR)  # orbax reports every file it touches
logging.getLogger("orbax").setLevel(logging.ERROR)


class Checkpoints:
    """The last `keep` checkpoints of a run. A save is atomic: killed half-way, it is swept at the next start."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, notes: dict) -> None:
        """Write the train state (a pytree) and `notes` (JSON) as checkpoint `step`.

        Raises:
            UserError: the disk is full or refuses; the checkpoints before stay as they are.
        """
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:  # tensorstore has no common kind for a write that failed
            last = self.latest()
            kept = "no checkpoint exists yet" if last is None else f"checkpoint {last} is intact"
            raise UserError(
                f"cannot save checkpoint {step} in {self.folder} ({_first_line(error)}); {kept};"
                " make room and start the same command again"
            ) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """The train state and notes of checkpoint `step`; `like` gives shapes and shardings.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like), notes=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:  # as above, for reads
            others = [other for other in self._manager.all_steps() if other != step]
            way_out = f"; the one of step {max(others)} would be used instead" if others else " to start over"
            raise UserError(
                f"cannot read checkpoint {self.folder / str(step)} ({_first_line(error)}): remove that folder{way_out}"
            ) from error
        return restored["state"], restored["notes"]

    def close(self) -> None:
        self._manager.close()


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes of a state with the shardings that it is to be restored to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
