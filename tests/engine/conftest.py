"""Fixtures of the engine's tests: engines with an oracle, and engines for conversations."""

import dataclasses
from dataclasses import replace

import jax
import pytest

from retool_jax.engine.engine import Engine
from retool_jax.mesh import MeshConfig, make_mesh

from .chats import Chat, chats, run
from .machine import Machine, make_machine


@pytest.fixture(scope="module", params=["qwen2 tp=2", "qwen3"])  # `plain` is qwen2 on one device
def machine(request, model) -> Machine:
    family, *split = request.param.split()
    if family == "qwen3":
        model = dataclasses.replace(model, qkv_bias=False, qk_norm=True, head_dim=16, tie_embeddings=True)
    parts = 2 if split else 1
    return make_machine(model, make_mesh(MeshConfig(1, 1, parts), jax.devices()[:parts]))


@pytest.fixture(scope="session")
def plain(model, mesh) -> Machine:
    return make_machine(model, mesh)


@pytest.fixture
def fresh(plain) -> Machine:
    """The plain machine with empty rows."""
    plain.engine.clear()
    plain.rows.clear()
    return plain


@pytest.fixture(scope="session")
def engines(make_engine, model):
    """`engines(slots, decode_steps, seed)`: each engine is built once; every 16th id ends a turn."""
    built: dict[tuple[int, int, int], Engine] = {}

    def get(slots: int = 4, decode_steps: int = 8, tool_lag: int = 1, seed: int = 0) -> Engine:
        key = (slots, decode_steps, seed)
        if key not in built:
            stops = range(0, model.vocab_size, 16)
            built[key] = make_engine(seed, stops, slots=slots, decode_steps=decode_steps)
        built[key].config = replace(built[key].config, tool_lag=tool_lag, stale_rows="rewrite")
        return built[key]

    return get


@pytest.fixture(scope="session")
def many(make_engine, model) -> Engine:
    """An engine with many slots, and too few pages for all of them."""
    stops = range(0, model.vocab_size, 4)
    engine = make_engine(0, stops, slots=64, decode_steps=4, page_size=8, pages=200, tool_lag=-1)
    engine.warm_up()
    return engine


@pytest.fixture(scope="session")
def reference(engines) -> list[Chat]:
    conversations = chats()
    run(engines(), conversations)
    return conversations
