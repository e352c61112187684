"""Continuing a row equals a fresh forward, whatever happened to the cache before."""

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retool_jax.engine.engine import Turn
from retool_jax.engine.pages import OutOfPages
from retool_jax.errors import UserError
from retool_jax.models.decoder import logits

from .machine import ROOM

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
    """After every action of any schedule the next token's logits are within 1e-4 of a forward over the whole list."""
    engine, rows = machine.engine, machine.rows
    engine.clear()
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
                engine.truncate(row, len(rows[row]))  # ends all turns
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


def test_an_append_equals_a_prefix_written_after_another_and_placed_bit_for_bit(machine):
    """A prefix written outside the slots in two calls equals appends; a prefix that is continued is not changed."""
    engine = machine.engine
    engine.clear()
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, engine.model.vocab_size, n).tolist() for n in (21, 7))
    engine.append([0], [first])
    engine.append([0], [second])
    prefix = engine.write_prefix(first)
    longer = engine.write_prefix(np.array(second), prefix)
    again = engine.write_prefix(second, prefix)
    for slot, source in ((1, longer), (2, again)):
        engine.place(source, slot)
        engine.start(slot, Turn(0, 30))
    engine.start(0, Turn(0, 30))
    hidden = np.asarray(engine._state.hidden)
    np.testing.assert_array_equal(hidden[1], hidden[0])
    np.testing.assert_array_equal(hidden[2], hidden[0])
    turns = engine.read(engine.decode())
    assert turns.counts[0]
    np.testing.assert_array_equal(turns.tokens[1], turns.tokens[0])
    np.testing.assert_array_equal(turns.logprobs[1:3], np.stack([turns.logprobs[0]] * 2))
    engine.clear()
    assert engine.counts()["used"] == 3 + 2 + 2  # the pages of the first prefix, and those that the others do not share
    del prefix, longer, again, source
    gc.collect()
    assert engine.counts()["used"] == 0


def test_a_placed_prefix_draws_what_a_fresh_forward_expects(fresh):
    """Greedy, one step at a time, in one of four slots; the others draw nothing."""
    engine = fresh.engine
    ids = [3, 9, 27]
    engine.place(engine.write_prefix(ids), 2)
    engine.start(2, Turn(2, ROOM - 3, temperature=0.0))
    for _ in range(5):
        expected = int(fresh.oracle([ids])[0].argmax())
        turns = engine.read(engine.decode(1))
        assert turns.counts.tolist() == [0, 0, 1, 0] and turns.tokens[2, 0] == expected
        if turns.ended[2]:
            break
        ids.append(expected)
        assert engine.length(2) == len(ids)
    assert turns.ended[2] == (expected in engine.stop_ids)


def test_a_released_prefix_gives_up_its_pages_and_rows_keep_theirs(fresh):
    engine = fresh.engine
    prefix = engine.write_prefix(list(range(1, 22)))
    engine.place(prefix, 1)
    before = engine.counts()
    with ThreadPoolExecutor(1) as other:  # any thread may do it
        other.submit(prefix.release).result()
    assert engine.counts() == before | {"shared": 0, "rows": 1}
    prefix.release()
    engine.free(1)
    assert engine.counts()["used"] == 0
    with pytest.raises(ValueError, match="a prefix of 97 tokens, 97 of them new: 1 to 96"):
        engine.write_prefix([1] * 97)


def test_a_call_from_another_thread_is_refused_with_the_owner(make_engine):
    """Its calls would donate buffers that the owner uses; it may take over an idle engine."""
    engine = make_engine()
    engine.append([0], [[5, 6, 7]])
    with ThreadPoolExecutor(1, "other") as other:
        work = partial(engine.append, [1], [[5]]), engine.decode, partial(engine.truncate, 0, 1)
        for action in (*work, partial(engine.update_params, None)):
            with pytest.raises(RuntimeError, match=r"by thread MainThread, and other_0 called it; .*take_over"):
                other.submit(action).result()
        other.submit(engine.take_over).result()
        other.submit(engine.append, [1], [[5]]).result()
        with pytest.raises(RuntimeError, match="used by thread other_0, and MainThread called it"):
            engine.decode()
    assert engine.length(1) == 1


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
    engine = make_engine(chunk_tokens=12, token_buckets=(4,))
    engine.append([2, 0, 3, 1], lists)
    ours = logits(engine.model, engine.weights, jax.device_get(engine._state.hidden))
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
    engine.clear()
    assert not engine.read(engine.decode()).counts.any()


@pytest.mark.parametrize("ahead", [1, 3])
def test_dispatches_may_run_ahead_of_their_results(fresh, ahead):
    """Ids and log-probs are the same whether each result is read at once or later, for any steps per dispatch."""
    engine = fresh.engine
    results = []
    for dispatches, steps in ((1, 8), (ahead, 8), (ahead, 5)):
        engine.clear()
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


def test_a_dispatch_takes_pages_for_its_longest_outcome_and_frees_the_surplus(fresh):
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
    engine = make_engine(page_size=8, pages=14, token_buckets=(96,))
    engine.append([0], [[1] * 80])
    with pytest.raises(OutOfPages, match=r"4 of 14 pages free and row 1 needs 5 .* raise engine.pages"):
        engine.append([1], [[1] * 33])
    assert engine.counts() == {"free": 4, "used": 10, "shared": 0, "rows": 1}
    # Row 2 gets its own copy of a shared page before row 3 finds no room; the pages that both took are freed.
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


def test_a_group_shares_the_pages_of_its_prompt(fresh):
    engine = fresh.engine
    engine.append([0], [list(range(1, 44))])
    engine.fork([0] * 3, [1, 2, 3])
    assert engine.counts() == {"free": 48 - 6, "used": 6, "shared": 6, "rows": 4}
    for row in range(4):
        engine.start(row, Turn(row, 3))
    engine.read(engine.decode())
    # All share five full pages, and each row that drew has one page of its own.
    assert engine.counts()["used"] == 5 + 4 and engine.counts()["shared"] == 5


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
