"""Continuation equals a fresh forward, whatever was done to the cache before, and costs no compilation."""

import dataclasses
import gc
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retool_jax.data.packing import Example, pack
from retool_jax.engine.engine import Engine, EngineConfig, Turn, Turns
from retool_jax.engine.layouts import sizes
from retool_jax.engine.pages import OutOfPages
from retool_jax.errors import UserError
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import forward, init_params, logits
from retool_jax.models.sharding import param_shardings
from retool_jax.update import token_logprobs

ROOM = 96
CONFIG = EngineConfig(
    slots=4, max_length=ROOM, decode_steps=8, chunk_rows=4, page_size=8, token_buckets=(32,), read_buckets=(40,)
)


def random_weights(config, key: int):
    """Norms and biases too, larger than at initialisation: nearly uniform logits hide differences."""
    rng = np.random.default_rng(key)
    fresh = init_params(config, jax.random.key(key))
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype), fresh)


@dataclasses.dataclass
class Machine:
    """An engine, what its rows should hold, and the oracle for it."""

    engine: Engine
    oracle: Callable[[list[list[int]]], np.ndarray]  # logits behind each list
    rows: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def logits(self) -> np.ndarray:
        """What the engine would draw each row's next token from, [slots, V]."""
        engine = self.engine
        rest = {name: engine.load_params()[name] for name in ("embedding",)}
        return np.asarray(logits(engine.model, rest, jax.device_get(engine._state.hidden)))

    def difference(self) -> float:
        """Between the engine's logits behind every drawable row and those of a fresh forward."""
        rows = [row for row, ids in self.rows.items() if ids and self.engine._drawable[row]]
        if not rows:
            return 0.0
        return float(np.abs(self.logits()[rows] - self.oracle([self.rows[row] for row in rows])).max())

    def decode(self, dispatches: int = 1, steps: int | None = None) -> list[Turns]:
        """All are dispatched before the first is read."""
        drawn = [self.engine.decode(steps) for _ in range(dispatches)]
        results = [self.engine.read(one) for one in drawn]
        for turns in results:
            for row in np.flatnonzero(turns.counts).tolist():
                ids = turns.tokens[row, : turns.counts[row]].tolist()
                self.rows[row] = self.rows[row] + (ids[:-1] if turns.ended[row] else ids)
                assert turns.ended[row] or ids[-1] not in self.engine.stop_ids
        return results


def make_machine(model, mesh, seed: int = 3, config: EngineConfig = CONFIG) -> Machine:
    """Stops at every eighth id, so that a random model's turns end in both ways."""
    weights = random_weights(model, 1)
    engine = Engine(model, config, weights, mesh, range(0, model.vocab_size, 8), seed)

    @jax.jit
    def behind(tokens: jax.Array, last: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(ROOM), tokens.shape)
        hidden = forward(model, weights, tokens, positions, jnp.ones_like(tokens))
        return logits(model, weights, hidden[jnp.arange(len(tokens)), last])

    def oracle(lists: list[list[int]]) -> np.ndarray:
        tokens, last = np.zeros((4, ROOM), np.int32), np.zeros(4, np.int32)
        for row, ids in enumerate(lists):
            tokens[row, : len(ids)], last[row] = ids, len(ids) - 1
        return np.asarray(behind(tokens, last))[: len(lists)]

    return Machine(engine, oracle)


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
    plain.engine.init_decode_state()
    plain.rows.clear()
    return plain


ROWS = st.integers(0, 3)
TOKENS = st.tuples(st.integers(0, 2**31), st.integers(1, 40))
SCHEDULES = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), ROWS, TOKENS),
        st.tuples(st.just("append"), st.sets(ROWS, min_size=1), TOKENS),
        st.tuples(st.just("fork"), ROWS, ROWS),
        st.tuples(
            st.just("decode"), st.sets(ROWS, min_size=1), st.integers(1, 40), st.integers(1, 3), st.integers(1, 8)
        ),
        st.tuples(st.just("truncate"), ROWS, st.integers(0, 40)),
        st.tuples(st.just("interrupt"), ROWS, st.integers(1, 40), st.integers(0, 10)),
        st.tuples(st.just("free"), ROWS),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEDULES)
def test_any_history_of_rows_equals_a_fresh_forward(machine, schedule):
    """Logits of the next token within 1e-4 of a forward over the whole list, after every action of any schedule."""
    engine, rows = machine.engine, machine.rows
    engine.init_decode_state()
    rows.clear()

    def some_ids(seed: int, most: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return rng.integers(0, engine.model.vocab_size, rng.integers(1, most + 1)).tolist()

    for name, *how in schedule:
        if name == "prefill":
            row, (seed, most) = how
            engine.free(row)
            rows[row] = some_ids(seed, most)
            engine.append([row], [rows[row]])
        elif name == "append":
            chosen, (seed, most) = how
            chosen = [row for row in chosen if len(rows.get(row, [])) <= ROOM - most]
            added = [some_ids(seed + row, most) for row in chosen]
            engine.append(chosen, added)
            rows |= {row: rows.get(row, []) + ids for row, ids in zip(chosen, added, strict=True)}
        elif name == "fork" and rows.get(how[0]) and how[0] != how[1]:
            engine.fork([how[0]], [how[1]])
            rows[how[1]] = rows[how[0]]
        elif name == "decode":
            chosen, budget, dispatches, steps = how
            for row in chosen:
                if rows.get(row) and engine._drawable[row] and len(rows[row]) < ROOM:
                    engine.start(row, Turn(row, min(budget, ROOM - len(rows[row])), 1.0))
            machine.decode(dispatches, steps)
            for row in rows:
                engine.truncate(row, len(rows[row]))  # turns end here, whether or not they are over
        elif name == "truncate" and how[0] in rows:
            rows[how[0]] = rows[how[0]][: how[1]]
            engine.truncate(how[0], len(rows[how[0]]))
        elif name == "interrupt":  # a stop string was found while the next dispatch was under way
            row, budget, keep = how
            if rows.get(row) and engine._drawable[row] and len(rows[row]) < ROOM:
                engine.start(row, Turn(row, min(budget, ROOM - len(rows[row])), 1.0))
                before = len(rows[row])
                first, second = engine.decode(), engine.decode()
                turns = engine.read(first)
                drawn = turns.tokens[row, : turns.counts[row]].tolist()[: max(turns.counts[row] - turns.ended[row], 0)]
                rows[row] = rows[row] + drawn[:keep]
                engine.truncate(row, len(rows[row]))
                other = engine.read(second)
                assert not other.counts[row] and engine.length(row) == len(rows[row]) <= before + 10
        elif name == "free":
            engine.free(how[0])
            rows.pop(how[0], None)
        assert machine.difference() <= 1e-4
        assert [engine.length(row) for row in rows] == [len(ids) for ids in rows.values()]
    for row in range(4):
        engine.free(row)
    assert engine.counts() == {"free": engine.sizes.pages, "used": 0, "shared": 0, "rows": 0}


def test_an_append_is_a_prefill_behind_a_prefix_and_an_insert_bit_for_bit(machine):
    """JetStream's way of going on, with two calls, against ours; the prefix stays what it was."""
    engine = machine.engine
    engine.init_decode_state()
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, engine.model.vocab_size, n).tolist() for n in (21, 7))
    engine.append([0], [first])
    engine.append([0], [second])
    prefix = engine.prefill(padded_tokens=[*first, 0, 0, 0], true_length=21)
    longer = engine.prefill(existing_prefix=prefix, padded_tokens=np.array(second), true_length=7)
    again = engine.prefill(existing_prefix=prefix, padded_tokens=second, true_length=7)
    for slot, source in ((1, longer), (2, again)):
        engine.insert(source, None, slot, Turn(0, 30))
    engine.start(0, Turn(0, 30))
    hidden = np.asarray(engine._state.hidden)
    np.testing.assert_array_equal(hidden[1], hidden[0])
    np.testing.assert_array_equal(hidden[2], hidden[0])
    turns = engine.read(engine.decode())
    assert turns.counts[0]
    np.testing.assert_array_equal(turns.tokens[1], turns.tokens[0])
    np.testing.assert_array_equal(turns.logprobs[1:3], np.stack([turns.logprobs[0]] * 2))
    engine.init_decode_state()
    assert engine.counts()["used"] == 3 + 2 + 2  # the first prefix's, and what the others do not share
    del prefix, longer, again, source
    gc.collect()
    assert engine.counts()["used"] == 0


def test_jetstream_callers_find_their_methods(fresh):
    """In the order of google-jetstream's own test of its mock engine, with greedy decoding as the expected values."""
    engine = fresh.engine
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (4, 1, ROOM)
    params = engine.load_params()
    prefix = engine.prefill(params=params, padded_tokens=np.array([3, 9, 27, 0, 0]), true_length=3)
    state = engine.insert(prefix, engine.init_decode_state(), slot=2)
    ids = [3, 9, 27]
    for _ in range(5):
        expected = int(fresh.oracle([ids])[0].argmax())
        state, result = engine.generate(params, state)
        token, real, length = np.asarray(result)[2]
        assert (token, real) == (expected, 1)
        if expected in engine.stop_ids:
            break
        ids.append(expected)
        assert length == len(ids)
    assert not np.asarray(result)[[0, 1, 3], 1].any()


def test_appends_and_decodes_leave_other_rows_alone(fresh, model):
    engine = fresh.engine
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, model.vocab_size, rng.integers(1, 21)).tolist() for _ in range(4)]
    engine.append(range(4), lists)
    kept = engine.pages.table([0, 2], 3)
    before = jax.device_get(engine._state)
    engine.append([1], [[1, 2, 3]])
    engine.fork([1], [3])
    engine.start(3, Turn(0, 8))
    engine.read(engine.decode())
    after = jax.device_get(engine._state)
    for at, row in enumerate((0, 2)):
        np.testing.assert_array_equal(after.hidden[row], before.hidden[row])
        pages = kept[at, : engine.pages.pages_for(len(lists[row]))]
        every_layer = (pages + np.arange(model.num_layers)[:, None] * engine.sizes.pages).ravel()
        np.testing.assert_array_equal(after.cache[every_layer], before.cache[every_layer])
    assert (after.hidden[1] != before.hidden[1]).any()


def test_one_append_may_name_more_rows_than_a_chunk_holds_and_longer_lists_than_a_bucket(make_engine, fresh_logits):
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 64, n).tolist() for n in (90, 3, 33, 16)]
    engine = make_engine(chunk_rows=3, token_buckets=(16,))
    engine.append([2, 0, 3, 1], lists)
    ours = logits(engine.model, engine.load_params(), jax.device_get(engine._state.hidden))
    for row, expected in zip([2, 0, 3, 1], fresh_logits(lists), strict=True):
        np.testing.assert_allclose(ours[row], expected[-1], atol=1e-4)


def test_decode_ends_each_row_at_its_stop_or_its_budget(fresh):
    engine = fresh.engine
    engine.append(range(4), [[row + 1, 17] for row in range(4)])
    budgets = {0: 1, 1: 3, 2: 50, 3: 50}
    for row, budget in budgets.items():
        engine.start(row, Turn(row, budget))
    turns = engine.read(engine.decode())
    for row, budget in budgets.items():
        count = int(turns.counts[row])
        stops = [token in engine.stop_ids for token in turns.tokens[row, :count].tolist()]
        assert not any(stops[:-1])
        assert count == min(budget, 8) or stops[-1]
        assert turns.ended[row] == (stops[-1] or count == budget)
        for values in (turns.tokens, turns.logprobs, turns.plain_logprobs):
            assert not values[row, count:].any()
    engine.init_decode_state()
    assert not engine.read(engine.decode()).counts.any()


@pytest.mark.parametrize("ahead", [1, 3])
def test_dispatches_may_run_ahead_of_their_results(fresh, ahead):
    """Same ids and log-probs whether each result is waited for or not, and whatever the steps of a dispatch."""
    engine = fresh.engine
    results = []
    for dispatches, steps in ((1, 8), (ahead, 8), (ahead, 5)):
        engine.init_decode_state()
        engine.append(range(4), [[row + 1, 17, 5] for row in range(4)])
        for row in range(4):
            engine.start(row, Turn(10 + row, 40))
        drawn: list[list] = [[] for _ in range(4)]
        under_way = []
        while engine._budget.any():
            while len(under_way) < dispatches:
                under_way.append(engine.decode(steps))
            turns = engine.read(under_way.pop(0))
            for row in range(4):
                drawn[row] += zip(turns.tokens[row, : turns.counts[row]], turns.logprobs[row], strict=False)
        for left in under_way:
            assert not engine.read(left).counts.any()
        results.append(drawn)
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert [token for token, _ in ours] == [token for token, _ in expected]
            np.testing.assert_allclose([p for _, p in ours], [p for _, p in expected], atol=1e-5)
    assert max(map(len, results[0])) > 8
    with pytest.raises(ValueError, match="in the order"):
        engine.read(left if ahead > 1 else under_way)


def test_pages_are_taken_as_far_as_a_dispatch_may_come_and_surplus_is_given_back(fresh):
    engine = fresh.engine  # pages of 8 tokens
    engine.append([0], [list(range(1, 8))])
    assert engine.counts()["used"] == 1
    engine.start(0, Turn(0, 60))
    first, second = engine.decode(), engine.decode()
    assert engine.counts()["used"] == 3  # 7 + 2 * 8 tokens
    engine.read(first)
    engine.read(second)
    assert engine.counts()["used"] == engine.pages.pages_for(engine.length(0))
    engine.truncate(0, 5)
    assert engine.counts()["used"] == 1


def test_a_cache_that_is_full_says_so_and_serves_on(make_engine):
    engine = make_engine(page_size=8, pages=14)
    engine.append([0], [[1] * 80])
    with pytest.raises(OutOfPages, match=r"4 of 14 pages free and row 1 needs 5 .* raise engine.pages"):
        engine.append([1], [[1] * 33])
    assert engine.counts() == {"free": 4, "used": 10, "shared": 0, "rows": 1}
    # Row 2 parts from what it shares before row 3 finds no room: its copy is made, and what both took is given back.
    engine.append([1], [[1] * 4])
    engine.fork([1], [2])
    with pytest.raises(OutOfPages, match="row 3 needs"):
        engine.append([2, 3], [[2], [1] * 30])
    assert engine.counts()["used"] == 12
    first, second = (engine._state.cache[page] for page in engine.pages.table([1, 2], 1)[:, 0])
    np.testing.assert_array_equal(first[:4], second[:4])
    engine.free(2)
    engine.free(1)
    engine.append([1], [[1] * 32])
    engine.start(1, Turn(0, 20))
    with pytest.raises(OutOfPages, match="row 1 needs 1 more"):
        engine.decode()
    engine.free(0)
    assert engine.read(engine.decode()).counts[1]
    with pytest.raises(UserError, match=r"engine.pages=3 of 8 tokens do not hold one row .* at least 12"):
        make_engine(page_size=8, pages=3)


def test_a_group_shares_the_pages_of_its_prompt(make_engine):
    engine = make_engine(slots=16, page_size=8)
    engine.append([0], [list(range(1, 44))])
    engine.fork([0] * 15, range(1, 16))
    assert engine.counts() == {"free": 192 - 6, "used": 6, "shared": 6, "rows": 16}
    for row in range(16):
        engine.start(row, Turn(row, 3))
    engine.read(engine.decode())
    # Five full pages for all, and one of its own for each that drew.
    assert engine.counts()["used"] == 5 + 16 and engine.counts()["shared"] == 5


def test_a_row_holds_exactly_its_length(fresh, model):
    engine = fresh.engine
    ids = np.random.default_rng(0).integers(0, model.vocab_size, ROOM).tolist()
    engine.append([0, 1], [ids, ids[:90]])
    engine.append([1], [ids[90:]])
    np.testing.assert_allclose(fresh.logits()[:2], np.stack([fresh.oracle([ids])[0]] * 2), atol=1e-4)
    engine.truncate(1, 90)
    with pytest.raises(ValueError, match="truncated to 90 tokens; append"):
        engine.start(1, Turn(0, 1))
    with pytest.raises(ValueError, match="97 of 96"):
        engine.append([1], [ids[:7]])
    with pytest.raises(ValueError, match="no tokens"):
        engine.append([1], [[]])
    engine.append([1], [[3]])
    with pytest.raises(ValueError, match="has 91 of 96 tokens and cannot draw 6"):
        engine.start(1, Turn(0, 6))
    engine.start(1, Turn(0, 5))
    for action in (partial(engine.append, [1], [[1]]), partial(engine.fork, [1], [2]), partial(engine.fork, [0], [1])):
        with pytest.raises(ValueError, match="row 1 is drawing"):
            action()
    with pytest.raises(ValueError, match="cannot keep 97"):
        engine.truncate(1, 97)


def test_new_weights_are_taken_copied_and_cost_no_compilation(plain, fresh, compiles):
    engine = fresh.engine
    params = random_weights(engine.model, 1)

    def work() -> np.ndarray:
        engine.init_decode_state()
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
    old = jax.tree.leaves(engine.load_params())
    engine.update_params(other)
    assert all(x.is_deleted() for x in old)  # their memory holds the new ones
    jax.tree.map(lambda x: x.delete(), other)  # as the trainer's next update does
    changed = work()
    engine.update_params(params)
    np.testing.assert_array_equal(work(), before)
    assert np.abs(changed - before).max() > 0.01
    assert len(compiles) == known


def test_weights_of_another_sharding_are_taken(model):
    """The trainer's are split over fsdp and tp, the engine's over tp alone."""
    devices = jax.devices()[:4]
    trainer, rollout = make_mesh(MeshConfig(1, 2, 2), devices), make_mesh(MeshConfig(2, 1, 2), devices)
    weights = random_weights(model, 1)
    placed = jax.device_put(weights, param_shardings(model, trainer))
    engine = Engine(model, CONFIG, placed, rollout, [], 0)
    engine.update_params(placed)
    engine.append([0], [[5, 6, 7]])
    alone = make_machine(model, make_mesh(MeshConfig(), devices[:1])).engine
    alone.append([0], [[5, 6, 7]])
    np.testing.assert_allclose(engine._state.hidden[0], alone._state.hidden[0], atol=1e-5)


def test_warm_up_knows_every_program(make_engine, compiles):
    """Any length, any number of rows: nothing is compiled after it, by our count and by XLA's."""
    engine = make_engine(slots=5, chunk_rows=3, row_buckets=(1,), token_buckets=(4, 40), read_buckets=(40,))
    assert engine.sizes.reads == (3, 6) and engine.sizes.rows == (1, 3) and engine.sizes.tokens == (4, 40)
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
    assert sizes(EngineConfig(slots=192, max_length=128), "xla") == (16, 192 * 8, (32,), (16, 64, 128), (8,))
    large = EngineConfig(slots=64, max_length=16_384)
    assert sizes(large, "ragged") == (128, 64 * 128, (32,), (16, 64, 256, 1024), (128,))
    assert sizes(large, "xla").reads == tuple(16 << i for i in range(7))
    assert sizes(EngineConfig(2, 100, page_size=64, pages=3), "xla")[:2] == (64, 3)
    for bad in ({"page_size": -1}, {"token_buckets": (0,)}):
        with pytest.raises(UserError, match=f"engine.{next(iter(bad))}"):
            EngineConfig(**bad)


def test_ids_without_a_token_are_never_drawn_and_the_trainer_agrees(model, params, mesh):
    """The vocabulary's padding is made the likeliest by far; log-probs of what is drawn are still the trainer's."""
    params = jax.tree.map(jnp.array, params)
    params["embedding"][...] = params["embedding"][...].at[60:].mul(20.0)
    config = dataclasses.replace(model, real_vocab=60)
    engine = Engine(config, EngineConfig(4, 96, decode_steps=40, chunk_rows=4), params, mesh, [], 0)
    prompts = {row: [row + 1, 17] for row in range(4)}
    even = jax.nn.softmax(logits(model, params, engine._state.hidden + 1.0))
    assert even[:, 60:].sum() > 0.5 * even.sum()
    compute = jax.jit(partial(token_logprobs, config, params), static_argnames="temperature")
    for how in ({"temperature": 1.0}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0}):
        engine.init_decode_state()
        engine.append(range(4), list(prompts.values()))
        for row in range(4):
            engine.start(row, Turn(row, 41, **how))
        turns = engine.read(engine.decode())
        assert turns.tokens.max() < 60 and np.isfinite(turns.logprobs).all()
        assert ((turns.logprobs > turns.plain_logprobs + 1e-3).any()) == ("top_k" in how)
        sampled = [False] * 2 + [True] * 40
        examples = [
            Example(prompts[row] + turns.tokens[row].tolist(), sampled, np.r_[0.0, 0.0, turns.plain_logprobs[row]])
            for row in range(4)
        ]
        batch = pack(examples, 48, 4, 1)
        rows = batch._replace(**{name: x[0] for name, x in batch._asdict().items() if x.ndim})
        ours, entropy = compute(batch=rows, temperature=how["temperature"] or 1.0)
        assert rows.sampled.sum() == 160 and np.isfinite(entropy).all()
        assert np.abs(np.asarray(ours) - rows.logprobs)[rows.sampled].max() <= 1e-4
