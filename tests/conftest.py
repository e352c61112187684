"""Fixtures that many tests share: a tiny model on one device, the miniature's tokenizer, a compiled engine."""

import os

# Eight virtual devices for the tests of meshes; everything else asks for the first one. Before jax is imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.engine.engine import Engine, EngineConfig
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.transformer import forward, init_params, logits
from retool_jax.tokens.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("miniature")


@pytest.fixture(scope="session")
def model(tokenizer):
    """A decoder small enough to run token by token; N / K = 2, so that grouping errors show."""
    return ModelConfig(
        vocab_size=len(tokenizer) + len(tokenizer) % 2,  # for tp=2
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )


@pytest.fixture(scope="session")
def params(model):
    """Random weights, norms and biases too, larger than at initialisation: nearly uniform logits hide differences."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype), init_params(model, jax.random.key(1))
    )


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def make_engine(model, params, mesh, tokenizer):
    """Build an engine on one device: `make_engine(slots=4, seed=7)`."""

    def make(seed: int = 0, stop_ids: Sequence[int] | None = None, **config) -> Engine:
        sizes = {"slots": 4, "max_length": 96, "decode_steps": 8, "chunk_rows": 4} | config
        stops = tokenizer.stop_ids if stop_ids is None else stop_ids
        return Engine(model, EngineConfig(**sizes), params, mesh, stops, seed)

    return make


@pytest.fixture(scope="session")
def fresh_logits(model, params):
    """The oracle of everything that grows a cache: `fresh_logits(lists of ids)`, one forward over each whole list.

    Returns [len(ids), V] per list, from the plain packed forward with one list a row.
    """

    @jax.jit
    def compute(tokens: jax.Array, segments: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return logits(model, params, forward(model, params, tokens, positions, segments))

    def run(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        rows, length = 4, 96
        results = []
        for at in range(0, len(sequences), rows):
            part = sequences[at : at + rows]
            tokens, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
            for row, ids in enumerate(part):
                tokens[row, : len(ids)] = ids
                segments[row, : len(ids)] = 1
            values = np.asarray(compute(tokens, segments))
            results += [values[row, : len(ids)] for row, ids in enumerate(part)]
        return results

    return run


@pytest.fixture(scope="session")
def compiles() -> list[str]:
    """Grows by one entry for every program that XLA compiles from now on."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen
