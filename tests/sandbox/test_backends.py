"""The choice of a back-end."""

import asyncio

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.sandbox.backends import candidates
from retool_jax.sandbox.launch import bubblewrap, gvisor


def test_auto_is_never_weaker_than_bubblewrap():
    assert candidates(["auto"]) == ["gvisor", "bubblewrap"]
    assert candidates(["process", "auto", "gvisor"]) == ["process", "gvisor", "bubblewrap"]
    with pytest.raises(UserError, match="'gvisr'; there is auto, gvisor, bubblewrap, process, remote"):
        candidates(["process", "gvisr"])


def open_and_close(config: SandboxConfig) -> str:
    async def main() -> str:
        async with open_sandbox(config) as box:
            return box.backend

    return asyncio.run(main())


def test_more_workers_than_memory_holds_are_refused_before_one_is_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 18, "SC_PAGE_SIZE": 4096}[name])  # 1 GiB
    said = "sandbox.slots=1000 is more than this machine's memory holds, .*; lower it to 16 or less"
    with pytest.raises(UserError, match=said):
        open_and_close(SandboxConfig(backend=("process",), slots=1000))
    assert open_and_close(SandboxConfig(backend=("process",), slots=16)) == "process"


def test_where_nothing_works_every_reason_and_the_way_out_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gvisor, "missing", lambda _: "there is no runsc; apt-get install runsc")
    monkeypatch.setattr(bubblewrap, "missing", lambda _: "there is no bwrap")
    with pytest.raises(UserError) as caught:
        open_and_close(SandboxConfig())
    words = ("gvisor: there is no runsc; apt-get install runsc", "bubblewrap: there is no bwrap", "[process]")
    assert all(word in str(caught.value) for word in words)
    assert open_and_close(SandboxConfig(backend=("auto", "process"))) == "process", "only where it is named"
