"""The engine through google-jetstream's own abstract class, as its test of the mock engine uses one."""

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("jetstream") is None:
    pytest.skip("google-jetstream is absent: pip install --no-deps google-jetstream==0.2.2", allow_module_level=True)

from retool_jax.engine.engine import Turn
from retool_jax.serving.jetstream import JetStreamEngine, engine_api


@pytest.fixture(scope="module")
def engine(make_engine) -> JetStreamEngine:
    return JetStreamEngine(make_engine(stop_ids=(), slots=4), "miniature")


def greedy(engine: JetStreamEngine, ids: list[int], count: int) -> list[int]:
    """What the engine itself draws behind these ids."""
    inner = engine.engine
    inner.init_decode_state()
    inner.append([0], [ids])
    inner.start(0, Turn(0, count, temperature=0.0))
    drawn: list[int] = []
    while len(drawn) < count:
        turns = inner.read(inner.decode())
        drawn += turns.tokens[0, : turns.counts[0]].tolist()
    return drawn


def test_it_is_an_engine_with_every_property(engine):
    assert isinstance(engine, engine_api.Engine) and not JetStreamEngine.__abstractmethods__
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (4, 1, 96)
    assert engine.mesh.size == 1 and engine.colocated_cpus is None
    assert engine.get_prefix_destination_sharding().is_fully_replicated


def test_prefill_insert_and_generate_give_the_greedy_tokens_in_their_slot(engine):
    """The five methods in the order in which an orchestrator calls them, from text to text."""
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    padded, true_length = tokenizer.encode("What is 6 * 7?", is_bos=False)
    assert len(padded) in engine.engine.sizes.tokens and true_length < len(padded)
    expected = greedy(engine, padded[:true_length].tolist(), 6)

    params = engine.load_params()
    state = engine.init_decode_state()
    prefix = engine.prefill(params=params, padded_tokens=padded, true_length=true_length)
    state = engine.insert(prefix=prefix, decode_state=state, slot=1)
    drawn = []
    for step in range(6):
        state, tokens = engine.generate(params=params, decode_state=state)
        tokens.copy_to_host_async()
        found = tokens.convert_to_numpy().get_result_at_slot(1)
        assert found.valid.item() == 1 and found.lengths.item() == true_length + step + 1
        drawn.append(found.tokens.item())
        assert tokens.convert_to_numpy().get_result_at_slot(0).valid.item() == 0
    assert drawn == expected and tokenizer.decode(drawn) == tokenizer._tokenizer.decode(expected)


def test_an_existing_prefix_is_continued_and_kept(engine):
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 60, 9), rng.integers(1, 60, 5)
    expected = greedy(engine, [*first.tolist(), *second.tolist()], 4)
    params, state = engine.load_params(), engine.init_decode_state()
    prefix = engine.prefill(params=params, padded_tokens=first, true_length=9)
    longer = engine.prefill(params=params, existing_prefix=prefix, padded_tokens=second, true_length=5)
    assert (prefix.length, longer.length) == (9, 14)
    for slot in (0, 3):  # a prefix may be inserted more than once
        state = engine.insert(longer, state, slot)
    drawn = []
    for _ in range(4):
        state, tokens = engine.generate(params, state)
        drawn.append([tokens.convert_to_numpy().get_result_at_slot(slot).tokens.item() for slot in (0, 3)])
    assert drawn == [[token, token] for token in expected]
