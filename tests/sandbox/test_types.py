"""Configuration: errors name values out of bounds, and defaults depend on the machine."""

import os

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import Limits, SandboxConfig


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SandboxConfig(slots=-1), "sandbox.slots is -1; it must lie between 0"),
        (lambda: SandboxConfig(backend=()), "sandbox.backend is empty"),
        (lambda: SandboxConfig(backend="process"), "write a list"),
        (lambda: SandboxConfig(urls="http://x"), "write a list"),
        (lambda: Limits(wall_s=0), "limits.wall_s is 0; it must lie between"),
        (lambda: Limits(wall_s=float("nan")), "limits.wall_s is nan"),
        (lambda: Limits(raw_output_bytes=1000), "limits.raw_output_bytes is 1000"),
    ],
)
def test_bad_values_are_named(make, words: str):
    with pytest.raises(UserError, match=words):
        make()


def test_slots_default_to_half_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    assert (SandboxConfig().slot_count, SandboxConfig().max_waiting, SandboxConfig(slots=3).slot_count) == (4, 256, 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert SandboxConfig().slot_count == 1
