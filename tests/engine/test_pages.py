"""Page tables: pages are exclusive when written, shared after a fork, and never lost."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool_jax.engine.engine import Engine, Turn
from retool_jax.engine.pages import OutOfPages, Pages


def test_a_row_takes_pages_as_it_grows_and_gives_them_back():
    pages = Pages(8, 4)
    assert pages.ensure("a", 0, 9) == []
    assert pages.table(["a"], 4).tolist() == [[0, 1, 2, 0]]
    assert pages.ensure("a", 9, 12) == [] and pages.counts()["used"] == 3
    pages.ensure("a", 12, 13)
    assert pages.counts() == {"free": 4, "used": 4, "shared": 0, "rows": 1}
    pages.truncate("a", 5)
    assert pages.table(["a"], 4).tolist() == [[0, 1, 0, 0]]
    pages.free("a")
    pages.free("a")
    assert pages.counts() == {"free": 8, "used": 0, "shared": 0, "rows": 0}


def test_a_group_shares_its_prompt_and_each_member_copies_one_page_when_it_writes():
    pages = Pages(64, 4)
    pages.ensure(0, 0, 10)
    for member in range(1, 16):
        pages.fork(0, member, 10)
    assert pages.counts() == {"free": 61, "used": 3, "shared": 3, "rows": 16}
    copies = [pages.ensure(member, 10, 11) for member in range(16)]
    # By then the last one is the only holder of the page.
    assert [len(copied) for copied in copies] == [1] * 15 + [0]
    assert {source for copied in copies for source, _ in copied} == {2}
    table = pages.table(range(16), 3)
    assert (table[:, :2] == [0, 1]).all() and len(set(table[:, 2])) == 16
    for member in range(16):
        pages.free(member)
    assert pages.counts()["free"] == 64


def test_a_fork_at_a_pages_end_copies_nothing():
    pages = Pages(8, 4)
    pages.ensure("a", 0, 8)
    pages.fork("a", "b", 8)
    assert pages.ensure("b", 8, 9) == [] and pages.ensure("a", 8, 9) == []


def test_rewriting_shared_pages_copies_only_the_one_that_is_kept_in_part():
    pages = Pages(16, 4)
    pages.ensure("a", 0, 12)
    pages.fork("a", "b", 12)
    pages.truncate("b", 5)
    assert pages.ensure("b", 5, 12) == [(1, 3)]
    assert pages.table(["a", "b"], 3).tolist() == [[0, 1, 2], [0, 3, 4]]
    # Overwriting whole shared pages needs no copy of their content.
    pages.fork("a", "c", 12)
    assert pages.ensure("c", 4, 12) == []
    assert pages.table(["a", "c"], 3).tolist() == [[0, 1, 2], [0, 5, 6]]


def test_running_out_is_an_error_that_changes_nothing():
    pages = Pages(4, 4)
    pages.ensure("a", 0, 9)
    pages.fork("a", "b", 9)
    before = pages.counts(), pages.table(["a", "b"], 4).tolist()
    with pytest.raises(OutOfPages, match=r"1 of 4 pages free and row 'b' needs 2 .* raise engine.pages"):
        pages.ensure("b", 9, 13)
    assert (pages.counts(), pages.table(["a", "b"], 4).tolist()) == before
    assert pages.ensure("b", 9, 12) == [(2, 3)]


ROWS = st.integers(0, 4)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), ROWS, st.integers(0, 40), st.integers(0, 12)),
        st.tuples(st.just("fork"), ROWS, ROWS, st.integers(0, 40)),
        st.tuples(st.just("truncate"), ROWS, st.integers(0, 40), st.just(0)),
        st.tuples(st.just("free"), ROWS, st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(ACTIONS)
def test_any_history_reads_back_what_each_row_wrote_and_leaks_nothing(actions):
    """Compare with lists: the test simulates the pool and makes the copies that `ensure` asks for."""
    pages = Pages(24, 4)
    pool = np.full((24, 4), -1)
    rows: dict[int, list[int]] = {}
    stamp = 0
    for name, row, at, more in actions:
        held = rows.get(row, [])
        if name == "write":
            start = min(at, len(held))
            try:
                for source, target in pages.ensure(row, start, start + more):
                    pool[target] = pool[source]
            except OutOfPages:
                continue
            rows[row] = held[:start] + list(range(stamp, stamp + more))
            pages.truncate(row, len(rows[row]))
            table = pages.table([row], 13)[0]
            for position in range(start, start + more):
                pool[table[position // 4], position % 4] = rows[row][position]
            stamp += more
        elif name == "fork" and held and row != at % 5:
            target = at % 5
            length = min(more, len(held))
            pages.fork(row, target, length)
            rows[target] = held[:length]
        elif name == "truncate":
            rows[row] = held[:at]
            pages.truncate(row, at)
        elif name == "free":
            rows.pop(row, None)
            pages.free(row)
        for other, expected in rows.items():
            table = pages.table([other], 13)[0]
            assert [int(pool[table[p // 4], p % 4]) for p in range(len(expected))] == expected
        used = {int(page) for other, ids in rows.items() for page in pages.table([other], 13)[0][: -(-len(ids) // 4)]}
        assert pages.counts()["used"] == len(used)
    for row in range(5):
        pages.free(row)
    assert pages.counts() == {"free": 24, "used": 0, "shared": 0, "rows": 0}


def test_a_row_of_nan_leaves_nothing_to_the_next_owner_of_its_pages(make_engine, params):
    """Weights that give NaN fill every page and dense row; with good weights the rows then are as always."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 64, length).tolist() for length in (5, 21, 40)]

    def work(engine: Engine) -> list[np.ndarray]:
        engine.append([0, 1, 2], prompts)
        engine.fork([1], [3])
        engine.append([3], [[7] * 4])
        hidden = np.asarray(engine._state.hidden)
        for row in range(4):
            engine.start(row, Turn(row, 30))
        drawn = [engine.read(engine.decode()) for _ in range(3)]
        return [hidden, *(x for turns in drawn for x in (turns.tokens, turns.logprobs))]

    engine = make_engine(page_size=8, stop_ids=[])
    expected = work(engine)
    engine.clear()
    engine.update_params(jax.tree.map(lambda x: x * np.nan, params))
    engine.append(range(4), [[1] * 64] * 4)
    for row in range(4):
        engine.start(row, Turn(row, 32))
    for _ in range(4):
        turns = engine.read(engine.decode())
    assert turns.ended.all() and engine.counts()["free"] == 0 and np.isnan(engine._state.cache).mean() > 0.95
    engine.clear()
    engine.update_params(params)
    for ours, theirs in zip(work(engine), expected, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)
