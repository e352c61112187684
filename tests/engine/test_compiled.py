"""Every program is compiled before the engine works, in few shapes, and writes have little padding."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from retool_jax.engine.config import CALL_TOKENS, FILLED, EngineConfig, Sizes, calls, sizes
from retool_jax.engine.engine import Engine, compile_ahead
from retool_jax.engine.turns import Turn

from .machine import ROOM


def waste(sizes: Sizes, counts: list[int]) -> float:
    """The share of padding when texts of these lengths are written together."""
    places = 0
    for size, blocks in calls(sizes, counts):
        at_once = sizes.at_once[size]
        places += -(-len(blocks) // at_once) * at_once * sizes.tokens[size]
    return 1 - sum(counts) / places


def test_warm_up_knows_every_program(make_engine, compiles):
    """With lengths around every size and any number of rows, nothing is compiled after it, by XLA's own count."""
    engine = make_engine(slots=5, chunk_tokens=8, token_buckets=(4, 80), read_buckets=(40,))
    assert engine.sizes.reads == (3, 6) and engine.sizes.tokens == (4, 80)
    engine.warm_up()
    known = len(compiles)
    for length in (1, 4, 5, 8, 16, 32, 33, 39, 40, 41, 44, 45, 47, 48, 49, 59, 60, 61, 64, 80, 94, ROOM - 1):
        for row in range(5):
            engine.free(row)
        many = 1 + length % 5
        engine.append(range(many), [[7] * max(length - row, 1) for row in range(many)])
        engine.fork([0], [many % 5])
        engine.start(0, Turn(0, ROOM - length))
        engine.read(engine.decode(1 + length % 8))
    assert len(compiles) == known


def test_programs_compiled_ahead_by_threads_are_compiled_once_and_waited_for(model, params, mesh, compiles):
    config = EngineConfig(slots=3, max_length=48, decode_steps=4, token_buckets=(4,))
    engine = Engine(model, config, params, mesh, [0], 0)
    known = len(compiles)
    with compile_ahead(model, config, mesh, [0]):
        engine.warm_up()  # while the threads compile
    assert len(compiles) == known + 6, "decode, write, place, two copies, and an empty dense copy"
    engine.append([0], [[5, 6, 7]])
    engine.start(0, Turn(0, 4))
    engine.read(engine.decode())
    assert len(compiles) == known + 6


def test_sizes_are_cut_to_what_a_row_can_hold():
    miniature = sizes(EngineConfig(slots=192, max_length=128), "xla")
    assert miniature == (16, 192 * 8, (4, 16), (512, 128), (16, 4), (8,))
    large = EngineConfig(slots=64, max_length=16_384)
    assert sizes(large, "ragged", "tpu") == (128, 64 * 128, (32,), (64,), (4,), (128,))
    assert sizes(large, "xla").reads == tuple(16 << i for i in range(7))
    assert sizes(EngineConfig(2, 100, page_size=64, pages=3), "xla")[:2] == (64, 3)
    assert sizes(EngineConfig(2, 3), "xla").tokens == (3,)
    assert sizes(large, "xla", "gpu", parts=4).at_once == (4 * 32, 4 * 8)
    for bad in ({"page_size": -1}, {"token_buckets": (0,)}, {"chunk_tokens": -1}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            EngineConfig(**bad)


def test_a_call_costs_what_is_written():
    """A tool rollout, the miniature's step, and the recipe's prompts and answers: at most a quarter is padding."""
    cpu = sizes(EngineConfig(max_length=512), "xla")
    assert waste(cpu, [261] * 4) < 0.05 and waste(cpu, [29] * 32) < 0.1
    miniature = sizes(EngineConfig(slots=192, max_length=128), "xla")
    assert waste(miniature, [20] * 24) < 0.1 and waste(miniature, [18] * 40 + [19] * 24) < 0.15
    recipe = sizes(EngineConfig(slots=64, max_length=18_432), "ragged", "tpu")
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(180), 0.5, 512).astype(int).clip(1, 2048).tolist()
    answers = rng.integers(20, 256, 2048).tolist()
    for texts in (prompts, answers):
        for at in range(0, len(texts), 4):  # a few texts at a time
            assert waste(recipe, texts[at : at + 4]) < 0.4
        assert np.mean([waste(recipe, texts[at : at + 4]) for at in range(0, len(texts), 4)]) < 0.25


@given(st.lists(st.integers(1, 1100), min_size=1, max_size=100), st.sampled_from(["xla", "ragged"]))
def test_blocks_hold_every_token_once_in_order_and_little_else(counts, kernel):
    known = sizes(EngineConfig(max_length=2048), kernel)
    done = [0] * len(counts)
    for size, blocks in calls(known, counts):
        tokens = known.tokens[size]
        assert 1 <= len(blocks) <= known.rows[size] and known.rows[size] * tokens <= CALL_TOKENS
        assert known.rows[size] % known.at_once[size] == 0
        for text, start, count in blocks:
            assert start == done[text], "a block comes behind those that it sees"
            assert (FILLED * tokens if size else 1) <= count <= tokens
            done[text] += count
    assert done == counts


def test_numbers_of_a_row_do_not_depend_on_its_neighbours(make_engine):
    """The hidden state has the same bits, alone and among others, whatever chunk a block is in."""
    engine = make_engine(slots=4, chunk_tokens=16)
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 64, length).tolist() for length in (61, 30, 77, 9)]
    engine.append(range(4), lists)
    together = jax.device_get(engine._state.hidden)
    for row, ids in enumerate(lists):
        engine.clear()
        engine.append([3 - row], [ids])
        np.testing.assert_array_equal(jax.device_get(engine._state.hidden)[3 - row], together[row])


def test_what_is_written_is_counted_with_its_padding(make_engine):
    engine = make_engine(slots=4, chunk_tokens=16, token_buckets=(4, 16))
    engine.append([0, 1], [[7] * 21, [7] * 3])  # blocks of 16, 4, 1 and 3: one chunk of 16 and one of four times 4
    assert (engine.written, engine.places) == (24, 32)
    engine.append([0], [[7]])
    assert (engine.written, engine.places) == (25, 48)
