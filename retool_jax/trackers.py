"""Trackers that get a run's numbers beside `metrics.jsonl`, by their names in the key `logger`.

TensorBoard's files lie in the run's folder. Weights & Biases and Trackio are separate packages that are imported only
if they are named; they take keys, addresses and projects from their own environment variables. If one of these two
fails during a run, the run goes on: the failure is printed once, and the file has every number.
"""

import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from retool_jax.errors import UserError, one_line
from retool_jax.files import replacing

PROJECT = "retool_jax"  # unless WANDB_PROJECT or TRACKIO_PROJECT names another
TRACKERS_FILE = "trackers.json"  # the run's name or id at each service
UPLOAD_S = 300.0  # longest wait for the last upload at the end of a run; data that is not sent stays in its folder


class Tracker(Protocol):
    """Takes the numbers of a step, with names such as `rl/loss` and `eval/dev/accuracy`."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_loggers(names: Collection[str]) -> None:
    """Check that the named trackers are installed and that the logins work, before anything is written.

    Raises:
        UserError: a package is missing or cannot be imported, or a login fails.
    """
    for name in names:
        if name in SERVICES:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(
                    f"logger={name} needs the package {name}, which cannot be imported ({one_line(error)}):"
                    f" pip install 'retool_jax[{name}]', or leave it out of logger"
                ) from error
    if "wandb" in names:
        _log_in_to_wandb()
    if "trackio" in names and (space := os.environ.get("TRACKIO_SPACE_ID")):
        _check_hub_login(space)


def _log_in_to_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        known, reason = wandb.login(prompt=False, verify=True), "there is no key"
    except Exception as error:  # from the service, HTTP or the network
        known, reason = False, f"{type(error).__name__}: {one_line(error)}"
    if not known:
        raise UserError(
            f"logger=wandb cannot log in ({reason}); run wandb login or set WANDB_API_KEY, keep the run here with"
            " WANDB_MODE=offline, or leave it out of logger"
        )


def _check_hub_login(space: str) -> None:
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # from the hub, HTTP or the network
        raise UserError(
            f"logger=trackio cannot log in for TRACKIO_SPACE_ID={space} ({type(error).__name__}: {one_line(error)});"
            " run hf auth login, or unset TRACKIO_SPACE_ID to keep the run on this machine"
        ) from error


def known_names(folder: Path) -> dict[str, str]:
    """The run's name or id at each service that already has it."""
    path = folder / TRACKERS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON; remove it, and each service gets a new run") from error
    return {name: str(known) for name, known in found.items()} if isinstance(found, dict) else {}


def open_service(name: str, folder: Path, config: Mapping[str, object]) -> Tracker | None:
    """A service's writer, with the run's name or id there; if it fails, None, and the reason is printed."""
    known = known_names(folder)
    if name not in known:
        known[name] = secrets.token_hex(6)
        with replacing(folder / TRACKERS_FILE) as file:
            file.write(json.dumps(known) + "\n")
    try:
        return SERVICES[name](folder, known[name], config)
    except Exception as error:  # from another package
        report_failure(name, error)
        return None


def report_failure(name: str, error: Exception) -> None:
    """Print that a service gets no more numbers, and why."""
    print(
        f"{name} gets no more numbers ({type(error).__name__}: {one_line(error)}); the run goes on, and metrics.jsonl"
        " has all of them",
        flush=True,
    )


class TensorBoard:
    """Event files in `folder/tensorboard`, from step `first` on. A scalar is on the disk when `write` returns."""

    def __init__(self, folder: Path, first: int):
        # tensorboardX's SummaryWriter is not used: it writes from a thread, which dies on a full disk and then blocks
        # the caller.
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        # File names contain the time in seconds. The suffix distinguishes two files of the same second.
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        self._board = EventsWriter(str(board / "events"), filename_suffix=f".from-{first:08d}")
        # This event makes TensorBoard hide the values of earlier event files from this step on.
        self._board.write_event(
            Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._board.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Wandb:
    """A run of Weights & Biases; its own files lie in `folder/wandb`."""

    def __init__(self, folder: Path, identity: str, config: Mapping[str, object]):
        import wandb

        # Without its record of the machine, which contains the command's words and so perhaps a secret.
        settings = wandb.Settings(
            console="off",
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            save_code=False,
            finish_timeout=UPLOAD_S,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio: on this machine, or in the private Space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, identity: str, config: Mapping[str, object]):
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.resolve().name}-{identity}",  # Trackio finds a run to resume only by its name
            resume="allow",
            config=dict(config),
            private=True,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


SERVICES = {"wandb": Wandb, "trackio": Trackio}


@contextmanager
def _without_torch() -> Iterator[None]:
    """Make `import torch` fail in the block. tensorboardX imports it if it is installed, only to accept torch tensors;
    this would delay a run's start by four seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python marks a module that must not be imported
    try:
        yield
    finally:
        del sys.modules["torch"]
