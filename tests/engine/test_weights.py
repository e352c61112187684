"""New weights reach an engine from any mesh, and the engine has its own mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.engine.compiled import decode_mesh
from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Turn
from retool_jax.errors import UserError
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import token_logprobs
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import logits
from retool_jax.models.sharding import param_shardings

from .chats import ROOM, chats, run
from .machine import CONFIG, device_bytes, random_weights


def test_new_weights_are_taken_copied_and_cost_no_compilation(plain, fresh, compiles):
    engine = fresh.engine
    params = random_weights(engine.model, 1)

    def work() -> np.ndarray:
        engine.clear()
        engine.append([0, 1], [[5, 6, 7], list(range(20))])
        engine.fork([0], [2])
        for row in range(3):
            engine.start(row, Turn(row, 8))
        engine.read(engine.decode())
        engine.free(0)
        engine.append([0], [[5, 6, 7, 9]])
        return np.asarray(engine._state.hidden)

    before = work()
    other = jax.tree.map(lambda x: x * 1.1, params)
    engine.update_params(params)
    known = len(compiles)
    old = jax.tree.leaves(engine.weights)
    engine.update_params(other)
    assert all(x.is_deleted() for x in old)  # the new weights took their memory
    jax.tree.map(lambda x: x.delete(), other)  # as the trainer's next update does
    changed = work()
    engine.update_params(params)
    np.testing.assert_array_equal(work(), before)
    assert np.abs(changed - before).max() > 0.01
    assert len(compiles) == known


def test_an_output_matrix_in_fp32_is_not_rounded_on_its_way(model, params, mesh):
    config = dataclasses.replace(model, compute_dtype="bfloat16", tie_embeddings=True, fp32_head=True)
    weights = Engine(config, CONFIG, params, mesh, [], 0).weights
    np.testing.assert_array_equal(weights["embedding"][...], params["embedding"][...])
    others = {x.dtype.name for name in weights if name != "embedding" for x in jax.tree.leaves(weights[name])}
    assert others == {"bfloat16"}


def test_weights_of_another_sharding_are_taken(model, fresh):
    """The trainer's weights are split over fsdp and tp, the engine's only over tp."""
    devices = jax.devices()[:4]
    trainer, rollout = make_mesh(MeshConfig(1, 2, 2), devices), make_mesh(MeshConfig(2, 1, 2), devices)
    weights = random_weights(model, 1)
    placed = jax.device_put(weights, param_shardings(model, trainer))
    engine = Engine(model, CONFIG, placed, rollout, [], 0)
    engine.update_params(placed)
    engine.append([0], [[5, 6, 7]])
    alone = fresh.engine  # of the same weights
    alone.append([0], [[5, 6, 7]])
    np.testing.assert_allclose(engine._state.hidden[0], alone._state.hidden[0], atol=1e-5)


def test_ids_without_a_token_are_never_drawn_and_the_trainer_agrees(model, params, mesh):
    """Padding ids get by far the largest logits; log-probs of the drawn tokens still equal the trainer's."""
    params = jax.tree.map(jnp.array, params)
    params["embedding"][...] = params["embedding"][...].at[60:].mul(20.0)
    config = dataclasses.replace(model, real_vocab=60)
    engine = Engine(config, EngineConfig(4, 96, decode_steps=40), params, mesh, [], 0)
    prompts = {row: [row + 1, 17] for row in range(4)}
    even = jax.nn.softmax(logits(model, params, engine._state.hidden + 1.0))
    assert even[:, 60:].sum() > 0.5 * even.sum()
    compute = jax.jit(partial(token_logprobs, config, params), static_argnames="temperature")
    for how in ({"temperature": 1.0}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0}):
        engine.clear()
        engine.append(range(4), list(prompts.values()))
        for row in range(4):
            engine.start(row, Turn(row, 41, **how))
        turns = engine.read(engine.decode())
        assert turns.tokens.max() < 60 and np.isfinite(turns.logprobs).all()
        assert ((turns.logprobs > turns.plain_logprobs + 1e-3).any()) == ("top_k" in how)
        sampled = [False] * 2 + [True] * 40
        examples = [
            Example(prompts[row] + turns.tokens[row].tolist(), sampled, {"old_logprobs": np.r_[0.0, 0.0, plain]})
            for row, plain in enumerate(turns.plain_logprobs)
        ]
        batch = pack(examples, 48, 4, 1)
        rows = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
        ours, entropy = compute(batch=rows, temperature=how["temperature"] or 1.0)
        assert rows.sampled.sum() == 160 and np.isfinite(entropy).all()
        assert np.abs(np.asarray(ours) - rows.columns["old_logprobs"])[rows.sampled].max() <= 1e-4


def test_a_trainer_with_fsdp_leaves_the_engine_its_own_devices(model, params, engines):
    """Heads are split over two devices, the number of key heads, and rows over two: nothing is copied four times."""
    trainer = make_mesh(MeshConfig(1, 4, 1), jax.devices()[:4])
    config = EngineConfig(slots=4, max_length=ROOM, decode_steps=8)
    placed = jax.device_put(params, param_shardings(model, trainer))
    stops = range(0, model.vocab_size, 16)
    engine = Engine(model, config, placed, trainer, stops, 0)
    alone = engines()
    assert dict(engine.mesh.shape) == {"data": 2, "fsdp": 1, "tp": 2}
    ours, expected = chats(temperature=0.0), chats(temperature=0.0)
    for each, conversations in ((engine, ours), (alone, expected)):
        run(each, conversations)
    for chat, other in zip(ours, expected, strict=True):
        assert chat.ids == other.ids
        np.testing.assert_allclose(chat.logprobs, other.logprobs, atol=1e-4)
    whole, part = device_bytes(alone), device_bytes(engine)
    assert part["rows"] * 4 == whole["rows"] and part["cache"] * 2 == whole["cache"]
    assert part["weights"] < 0.52 * whole["weights"], "all but the norms are halved"


def test_the_devices_that_split_heads_can_be_named(model):
    trainer = make_mesh(MeshConfig(2, 2, 2))
    assert dict(decode_mesh(model, trainer, 1).shape) == {"data": 8, "fsdp": 1, "tp": 1}
    assert decode_mesh(model, make_mesh(MeshConfig(4, 1, 2))) == make_mesh(MeshConfig(4, 1, 2))
    wide = dataclasses.replace(model, num_heads=24, num_kv_heads=12, intermediate_size=36, vocab_size=24)
    assert decode_mesh(wide, trainer).shape["tp"] == 4
    for tp, message in ((4, "engine.tp=4 does not divide model.num_kv_heads=2"), (3, "the devices of this process=8")):
        with pytest.raises(UserError, match=message):
            decode_mesh(model, trainer, tp)
