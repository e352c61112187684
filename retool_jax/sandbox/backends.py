"""`open_sandbox`: the first back-end of a list that works here."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from retool_jax.errors import UserError
from retool_jax.sandbox.host.member import WorkerFault
from retool_jax.sandbox.host.pool import Sandbox
from retool_jax.sandbox.launch.launchers import LAUNCHERS
from retool_jax.sandbox.remote.client import RemoteSandbox
from retool_jax.sandbox.types import SandboxConfig

AUTO = ("gvisor", "bubblewrap")
NAMES = ("auto", *LAUNCHERS, "remote")


def candidates(backend: Sequence[str]) -> list[str]:
    """Back-ends to try, in order, with `auto` spelled out. Raises UserError for a name that is none."""
    for name in backend:
        if name not in NAMES:
            raise UserError(f"sandbox.backend: there is no {name!r}; there is {', '.join(NAMES)}")
    expanded = [each for name in backend for each in (AUTO if name == "auto" else (name,))]
    return list(dict.fromkeys(expanded))


@asynccontextmanager
async def open_sandbox(config: SandboxConfig | None = None) -> AsyncIterator[Sandbox | RemoteSandbox]:
    """The first back-end of the list that works here and passes its self-test.

    Raises UserError if none does: it gives each one's reason, and the ways out.
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
