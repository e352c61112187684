"""Every program is compiled before the engine works, in few shapes, and calls have little padding."""

import pytest

from retool_jax.engine.config import EngineConfig, sizes
from retool_jax.engine.turns import Turn
from retool_jax.errors import UserError

from .machine import ROOM


def test_warm_up_knows_every_program(make_engine, compiles):
    """Any length, any number of rows: nothing is compiled after it, by our count and by XLA's."""
    engine = make_engine(slots=5, chunk_rows=3, row_buckets=(1,), token_buckets=(4, 40), read_buckets=(40,))
    assert engine.sizes.reads == (3, 6) and engine.sizes.rows == ((1, 3), (1, 3)) and engine.sizes.tokens == (4, 40)
    engine.warm_up()
    known = len(compiles)
    for length in range(1, ROOM):
        for row in range(5):
            engine.free(row)
        many = 1 + length % 5
        engine.append(range(many), [[7] * max(length - row, 1) for row in range(many)])
        engine.fork([0], [many % 5])
        engine.start(0, Turn(0, ROOM - length))
        engine.read(engine.decode(1 + length % 8))
    assert engine.compiles == 0 and len(compiles) <= known + 3  # the dense rows of each width


def test_sizes_are_cut_to_what_a_row_can_hold():
    assert sizes(EngineConfig(slots=192, max_length=128), "xla") == (16, 192 * 8, ((32,),) * 3, (16, 64, 128), (8,))
    large = EngineConfig(slots=64, max_length=16_384)
    assert sizes(large, "ragged")[:2] == (128, 64 * 128) and sizes(large, "ragged").reads == (128,)
    assert sizes(large, "xla").reads == tuple(16 << i for i in range(7))
    assert sizes(EngineConfig(2, 100, page_size=64, pages=3), "xla")[:2] == (64, 3)
    for bad in ({"page_size": -1}, {"token_buckets": (0,)}):
        with pytest.raises(UserError, match=f"engine.{next(iter(bad))}"):
            EngineConfig(**bad)
