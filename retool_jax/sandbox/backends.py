"""`open_sandbox`: opens the first back-end of a list that works on this machine."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from retool_jax.errors import UserError
from retool_jax.sandbox.host.member import WorkerFault
from retool_jax.sandbox.host.pool import Sandbox
from retool_jax.sandbox.launch.launchers import LAUNCHERS
from retool_jax.sandbox.launch.procfs import machine_memory_mb
from retool_jax.sandbox.remote.client import RemoteSandbox
from retool_jax.sandbox.types import SandboxConfig

AUTO = ("gvisor", "bubblewrap")
WORKER_MB = 64  # memory of a worker whose programs use NumPy and SymPy; under gVisor it is more
NAMES = ("auto", *LAUNCHERS, "remote")


def candidates(backend: Sequence[str]) -> list[str]:
    """Back-ends to try, in order, with `auto` spelled out. Raises UserError for an unknown name."""
    for name in backend:
        if name not in NAMES:
            raise UserError(f"sandbox.backend: there is no {name!r}; there is {', '.join(NAMES)}")
    expanded = [each for name in backend for each in (AUTO if name == "auto" else (name,))]
    return list(dict.fromkeys(expanded))


def _check_slots(slots: int) -> None:
    """Raise UserError if the workers of so many slots do not fit into this machine's memory."""
    most = machine_memory_mb() // WORKER_MB
    if slots > most:
        raise UserError(
            f"sandbox.slots={slots} is more than this machine's memory holds, as a worker takes about {WORKER_MB} MiB;"
            f" lower it to {most} or less (more than the cores make time limits unfair)"
        )


@asynccontextmanager
async def open_sandbox(config: SandboxConfig | None = None) -> AsyncIterator[Sandbox | RemoteSandbox]:
    """Open the first back-end of the list that works here and passes its self-test.

    Raises UserError if none does, with the reason of each and what to do, or if the slots do not fit into memory.
    """
    config = config or SandboxConfig()
    names = candidates(config.backend)
    reasons = []
    for name in names:
        if name == "remote":
            box: Sandbox | RemoteSandbox = RemoteSandbox(config)
        elif reason := LAUNCHERS[name].missing(config):
            reasons.append(f"{name}: {reason}")
            continue
        else:
            _check_slots(config.slot_count)
            box = Sandbox(name, config)
        try:
            try:
                await box.open()
            except (WorkerFault, UserError) as fault:
                reasons.append(f"{name}: {fault}")
                continue
            yield box
            return
        finally:
            await box.aclose()
    risk = "" if "process" in names else "; or accept the risk of plain processes: sandbox.backend=[process]"
    raise UserError(f"no sandbox back-end of {names} works here. {'; '.join(reasons)}{risk}")
