"""Fixtures of the engine's tests: engines with an oracle."""

import dataclasses

import jax
import pytest

from retool_jax.mesh import MeshConfig, make_mesh

from .machine import Machine, make_machine


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen2 tp=2", "qwen3 tp=2"])
def machine(request, model) -> Machine:
    family, *split = request.param.split()
    if family == "qwen3":
        model = dataclasses.replace(model, qkv_bias=False, qk_norm=True, head_dim=16, tie_embeddings=True)
    parts = 2 if split else 1
    return make_machine(model, make_mesh(MeshConfig(1, 1, parts), jax.devices()[:parts]))


@pytest.fixture(scope="module")
def plain(model, mesh) -> Machine:
    return make_machine(model, mesh)


@pytest.fixture
def fresh(plain) -> Machine:
    """The plain machine with nothing in it."""
    plain.engine.clear()
    plain.rows.clear()
    return plain
