"""Where a run's numbers go beside `metrics.jsonl`, by the names that the key `logger` has for it.

TensorBoard's files lie in the run's folder. Weights & Biases and Trackio are packages of their own, imported only where
they are named, and they take their keys, addresses and projects from their own environment variables. What goes wrong
with those two once a run is under way ends nothing: it is told once, and the file has every number.
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

PROJECT = "retool_jax"  # where WANDB_PROJECT or TRACKIO_PROJECT names no other
TRACKERS_FILE = "trackers.json"  # by which name or id a service knows the run
UPLOAD_S = 300.0  # how long the end of a run waits for the last upload; the rest stays in its folder


class Tracker(Protocol):
    """Takes the numbers of a step, by names such as `rl/loss` and `eval/dev/accuracy`."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_loggers(names: Collection[str]) -> None:
    """See that what is named is there and takes us, before anything is written.

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
        _ask_hub_who_we_are(space)


def _log_in_to_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        known, reason = wandb.login(prompt=False, verify=True), "there is no key"
    except Exception as error:  # of the service, of HTTP or of the network
        known, reason = False, f"{type(error).__name__}: {one_line(error)}"
    if not known:
        raise UserError(
            f"logger=wandb cannot log in ({reason}); run wandb login or set WANDB_API_KEY, keep the run here with"
            " WANDB_MODE=offline, or leave it out of logger"
        )


def _ask_hub_who_we_are(space: str) -> None:
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # of the hub, of HTTP or of the network
        raise UserError(
            f"logger=trackio cannot log in for TRACKIO_SPACE_ID={space} ({type(error).__name__}: {one_line(error)});"
            " run hf auth login, or unset TRACKIO_SPACE_ID to keep the run on this machine"
        ) from error


def known_names(folder: Path) -> dict[str, str]:
    """The services that know the run of a folder already, and by which name or id."""
    path = folder / TRACKERS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON; remove it, and each service gets a new run") from error
    return {name: str(known) for name, known in found.items()} if isinstance(found, dict) else {}


def open_service(name: str, folder: Path, config: Mapping[str, object]) -> Tracker | None:
    """A service's writer, under the name or id that it knows the run by; None, and a line of why, where it fails."""
    known = known_names(folder)
    if name not in known:
        known[name] = secrets.token_hex(6)
        with replacing(folder / TRACKERS_FILE) as file:
            file.write(json.dumps(known) + "\n")
    try:
        return SERVICES[name](folder, known[name], config)
    except Exception as error:  # of a package of others
        tell_once(name, error)
        return None


def tell_once(name: str, error: Exception) -> None:
    """Say that a service gets no more numbers."""
    print(
        f"{name} gets no more numbers ({type(error).__name__}: {one_line(error)}); the run goes on, and metrics.jsonl"
        " has all of them",
        flush=True,
    )


class TensorBoard:
    """Event files in `folder/tensorboard`, from step `first` on. A scalar is on the disk when `write` returns."""

    def __init__(self, folder: Path, first: int):
        # tensorboardX's SummaryWriter would write from a thread of its own; one that met a full disk is dead, and
        # blocks writers.
        with _without_torch():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        # The suffix keeps two files apart that were begun within one second, which is all that their names resolve.
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        self._board = EventsWriter(str(board / "events"), filename_suffix=f".from-{first:08d}")
        # TensorBoard hides what earlier event files say about this step and later ones.
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

        # Without what it notes of the machine: the command's words are among that, and may hold a secret.
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
            name=f"{folder.resolve().name}-{identity}",  # its only handle to a run that goes on
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
    """Let `import torch` fail meanwhile: tensorboardX imports it where it is installed, for tensors that it is not
    given here, and a run would start four seconds later."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python marks a module that must not be imported
    try:
        yield
    finally:
        del sys.modules["torch"]
