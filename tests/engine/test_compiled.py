"""Every program is compiled before the engine works, in few shapes, and calls have little padding."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from retool_jax.engine.config import CALL_TOKENS, Call, EngineConfig, calls, sizes
from retool_jax.engine.turns import Turn

from .machine import ROOM


def test_warm_up_knows_every_program(make_engine, compiles):
    """Lengths around every size, any number of rows: nothing is compiled after it, by XLA's own count."""
    engine = make_engine(slots=5, chunk_rows=3, row_buckets=(1,), token_buckets=(4, 40), read_buckets=(40,))
    assert engine.sizes.reads == (3, 6) and engine.sizes.rows == ((1, 3), (1, 3)) and engine.sizes.tokens == (4, 40)
    engine.warm_up()
    known = len(compiles)
    for length in (1, 4, 5, 8, 16, 32, 33, 39, 40, 41, 44, 45, 47, 48, 49, 63, 64, 80, 94, ROOM - 1):
        for row in range(5):
            engine.free(row)
        many = 1 + length % 5
        engine.append(range(many), [[7] * max(length - row, 1) for row in range(many)])
        engine.fork([0], [many % 5])
        engine.start(0, Turn(0, ROOM - length))
        engine.read(engine.decode(1 + length % 8))
    assert len(compiles) == known


def test_sizes_are_cut_to_what_a_row_can_hold():
    assert sizes(EngineConfig(slots=192, max_length=128), "xla") == (16, 192 * 8, ((32,),) * 3, (16, 64, 128), (8,))
    large = EngineConfig(slots=64, max_length=16_384)
    assert sizes(large, "ragged")[:2] == (128, 64 * 128) and sizes(large, "ragged").reads == (128,)
    assert sizes(large, "xla").reads == tuple(16 << i for i in range(7))
    assert sizes(EngineConfig(2, 100, page_size=64, pages=3), "xla")[:2] == (64, 3)
    for bad in ({"page_size": -1}, {"token_buckets": (0,)}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            EngineConfig(**bad)


def test_few_long_prompts_are_padded_to_little_more_than_they_are():
    """Four prompts of 261 tokens were 32 x 512 before; short ones share one size of call, whatever their number."""
    known = sizes(EngineConfig(max_length=512), "xla")
    assert calls(known, [261] * 4) == [Call(2, 512, [0, 1]), Call(2, 512, [2, 3])]
    assert calls(known, [9, 60, 2, 33]) == [Call(32, 64, [0, 1, 2, 3])]


def test_rows_of_a_call_follow_from_its_tokens():
    default = sizes(EngineConfig(max_length=16_384), "ragged")
    assert default.tokens == (16, 64, 128, 256, 512, 1024)
    assert default.rows == ((32,), (32,), (32,), (4, 16), (2, 8), (1, 4))
    assert sizes(EngineConfig(max_length=300), "xla").rows[-1] == (3, 13)
    assert sizes(EngineConfig(max_length=300, row_buckets=(8,)), "xla").rows == ((8, 32),) * 5
    assert sizes(EngineConfig(max_length=1024, chunk_rows=1), "xla").rows == ((1,),) * 6


@given(st.lists(st.integers(1, 1024), min_size=1, max_size=100), st.sampled_from([1, 3, 32, 192]))
def test_calls_hold_every_row_once_in_compiled_shapes_with_bounded_padding(counts, chunk_rows):
    known = sizes(EngineConfig(max_length=2048, chunk_rows=chunk_rows), "ragged")
    shapes = {(rows, tokens) for tokens, each in zip(known.tokens, known.rows, strict=True) for rows in each}
    found = calls(known, counts)
    assert sorted(row for call in found for row in call.members) == list(range(len(counts)))
    for call in found:
        assert (call.rows, call.tokens) in shapes and call.rows * call.tokens <= CALL_TOKENS
        assert 1 <= len(call.members) <= call.rows
        assert max(counts[row] for row in call.members) <= call.tokens
    # One call of each size may be nearly empty; the others are at least half full of rows, and those half of tokens.
    long = [call for call in found if call.tokens > 128]
    padded = sum(call.rows * call.tokens for call in long)
    assert padded <= 4 * sum(counts[row] for call in long for row in call.members) + 3 * CALL_TOKENS // 4
