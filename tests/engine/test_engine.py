"""Continuation equals a fresh forward, whatever was done to the cache before, and costs no compilation."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.data.packing import Example, pack
from retool_jax.engine.engine import Control, Drawn, Engine, EngineConfig
from retool_jax.models.transformer import logits
from retool_jax.update import token_logprobs


@pytest.fixture(scope="module")
def engine(make_engine, model) -> Engine:
    """Stops at every eighth id, so that a random model's turns end in both ways."""
    return make_engine(seed=3, stop_ids=range(0, model.vocab_size, 8))


@pytest.fixture(scope="module")
def next_logits(engine):
    """What the engine would draw each row's next token from, [slots, V]."""
    compute = jax.jit(lambda hidden: logits(engine.model, engine._params, hidden))
    return lambda: np.asarray(compute(engine._state.hidden))


def decode(engine: Engine, rows: dict[int, list[int]], budget: int | dict[int, int], temperature: float = 1.0) -> Drawn:
    """Decode behind the given lists; other rows are parked."""
    control = Control.parked(engine.config.slots)
    for row, ids in rows.items():
        control.length[row] = len(ids)
        control.budget[row] = budget[row] if isinstance(budget, dict) else budget
        control.request[row] = row
        control.temperature[row] = temperature
    return jax.device_get(engine.decode(control))


def random_ids(rng: np.random.Generator, model, longest: int) -> list[int]:
    return rng.integers(0, model.vocab_size, rng.integers(1, longest + 1)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_any_history_of_a_row_equals_a_fresh_forward(engine, model, next_logits, fresh_logits, seed):
    """A random schedule over four rows: new trajectories, appends, decodes, forks, rewinds, while others are live."""
    rng = np.random.default_rng(seed)
    rows: dict[int, list[int]] = {}  # what each row's cache holds
    done: dict[str, int] = dict.fromkeys(("prefill", "append", "decode", "fork", "rewind"), 0)
    worst = 0.0
    for _ in range(30):
        action = rng.choice(list(done)) if rows else "prefill"
        some = [row for row in rows if rng.random() < 0.6] or list(rows)[:1]
        if action == "prefill":
            some = rng.choice(4, rng.integers(1, 4), replace=False).tolist()
            added = [random_ids(rng, model, 20) for _ in some]
            engine.append(some, [0] * len(some), added)
            rows |= dict(zip(some, added, strict=True))
        elif action in ("append", "rewind"):
            keep = {r: len(rows[r]) if action == "append" else int(rng.integers(0, len(rows[r]))) for r in some}
            added = [random_ids(rng, model, min(30, 96 - keep[row])) for row in some if keep[row] < 96]
            some = [row for row in some if keep[row] < 96]
            engine.append(some, [keep[row] for row in some], added)
            rows |= {row: rows[row][: keep[row]] + ids for row, ids in zip(some, added, strict=True)}
        elif action == "decode":
            some = [row for row in some if len(rows[row]) < 96]
            budget = {row: int(rng.integers(1, 97 - len(rows[row]))) for row in some}
            drawn = decode(engine, {row: rows[row] for row in some}, budget)
            for row in some:
                ids = drawn.tokens[row, : drawn.counts[row]].tolist()
                assert 1 <= len(ids) <= min(budget[row], 8)
                ended = ids[-1] in engine.stop_ids or len(ids) == budget[row]
                rows[row] = rows[row] + (ids[:-1] if ended else ids)  # a turn's last token is not in the cache
        else:
            source, target = rng.choice(list(rows)), int(rng.integers(4))
            engine.fork([source], [target])
            rows[target] = rows[source]
        done[action] += 1
        ours = next_logits()
        for row, expected in zip(rows, fresh_logits(list(rows.values())), strict=True):
            worst = max(worst, np.abs(ours[row] - expected[-1]).max())
    assert all(done.values()), done
    assert worst <= 1e-4
    print(f"largest difference {worst:.1e} over {done}")


def test_appends_and_decodes_leave_other_rows_alone(engine, model):
    rng = np.random.default_rng(0)
    lists = [random_ids(rng, model, 20) for _ in range(4)]
    engine.append(range(4), [0] * 4, lists)
    before = jax.device_get(engine._state)
    engine.append([1], [len(lists[1])], [[1, 2, 3]])
    engine.fork([1], [3])
    decode(engine, {3: [*lists[1], 1, 2, 3]}, 8)
    after = jax.device_get(engine._state)
    for row in (0, 2):
        np.testing.assert_array_equal(after.hidden[row], before.hidden[row])
        np.testing.assert_array_equal(after.cache.k[:, row], before.cache.k[:, row])
        np.testing.assert_array_equal(after.cache.v[:, row], before.cache.v[:, row])
    assert (after.hidden[1] != before.hidden[1]).any()


def test_one_append_may_name_more_rows_than_a_chunk_holds(make_engine, model, fresh_logits):
    rng = np.random.default_rng(0)
    lists = [random_ids(rng, model, 20) for _ in range(4)]
    engine = make_engine(chunk_rows=3)
    engine.append([2, 0, 3, 1], [0] * 4, lists)
    ours = logits(model, engine._params, jax.device_get(engine._state.hidden))
    for row, expected in zip([2, 0, 3, 1], fresh_logits(lists), strict=True):
        np.testing.assert_allclose(ours[row], expected[-1], atol=1e-4)


def test_decode_ends_each_row_at_its_stop_or_its_budget(engine):
    engine.append(range(4), [0] * 4, [[row + 1, 17] for row in range(4)])
    rows = {row: [row + 1, 17] for row in range(4)}
    budgets = {0: 1, 1: 3, 2: 50, 3: 50}
    drawn = decode(engine, rows, budgets)
    for row, budget in budgets.items():
        count = int(drawn.counts[row])
        stops = [token in engine.stop_ids for token in drawn.tokens[row, :count].tolist()]
        assert not any(stops[:-1])
        assert count == min(budget, 8) or stops[-1]
        assert not drawn.tokens[row, count:].any() and not drawn.logprobs[row, count:].any()
    assert int(drawn.steps) == drawn.counts.max()
    parked = decode(engine, {}, 0)
    assert not parked.counts.any() and int(parked.steps) == 0


def test_a_row_holds_exactly_its_length(engine, model, next_logits, fresh_logits):
    ids = np.random.default_rng(0).integers(0, model.vocab_size, 96).tolist()
    engine.append([0, 1], [0, 0], [ids, ids[:90]])
    engine.append([1], [90], [ids[90:]])
    np.testing.assert_allclose(next_logits()[:2], np.stack([fresh_logits([ids])[0][-1]] * 2), atol=1e-4)
    with pytest.raises(ValueError, match="97 of 96"):
        engine.append([1], [90], [ids[:7]])
    with pytest.raises(ValueError, match="no tokens"):
        engine.append([1], [3], [[]])


def test_new_weights_are_taken_copied_and_cost_no_compilation(engine, params, next_logits, compiles):
    def work() -> np.ndarray:
        engine.append([0, 1], [0, 0], [[5, 6, 7], list(range(20))])
        engine.fork([0], [2])
        decode(engine, {0: [5, 6, 7], 1: list(range(20)), 2: [5, 6, 7]}, 8)
        engine.append([0], [3], [[9]])
        return next_logits()

    before = work()
    other = jax.tree.map(lambda x: x * 1.1, params)
    known = len(compiles)
    engine.update_params(other)
    jax.tree.map(lambda x: x.delete(), other)  # as the trainer's next update does
    changed = work()
    engine.update_params(params)
    np.testing.assert_array_equal(work(), before)
    assert np.abs(changed - before).max() > 0.01
    assert len(compiles) == known


def test_ids_without_a_token_are_never_drawn_and_the_trainer_agrees(model, params, mesh):
    """The vocabulary's padding is made the likeliest by far; log-probs of what is drawn are still the trainer's."""
    params = jax.tree.map(jnp.array, params)
    params["embedding"][...] = params["embedding"][...].at[60:].mul(20.0)
    config = dataclasses.replace(model, real_vocab=60)
    engine = Engine(config, EngineConfig(4, 96, decode_steps=40, chunk_rows=4), params, mesh, [], 0)
    prompts = {row: [row + 1, 17] for row in range(4)}
    plain = jax.nn.softmax(logits(model, params, engine._state.hidden + 1.0))
    assert plain[:, 60:].sum() > 0.5 * plain.sum()
    compute = jax.jit(partial(token_logprobs, config, params), static_argnames="temperature")
    for temperature in (1.0, 0.6, 0.0):
        engine.append(range(4), [0] * 4, list(prompts.values()))
        drawn = decode(engine, prompts, 40, temperature)
        assert drawn.tokens.max() < 60 and np.isfinite(drawn.logprobs).all()
        sampled = [False] * 2 + [True] * 40
        examples = [
            Example(prompts[row] + drawn.tokens[row].tolist(), sampled, np.r_[0.0, 0.0, drawn.logprobs[row]])
            for row in range(4)
        ]
        batch = pack(examples, 48, 4, 1)
        rows = batch._replace(**{name: x[0] for name, x in batch._asdict().items() if x.ndim})
        ours, entropy = compute(batch=rows, temperature=temperature or 1.0)
        assert rows.sampled.sum() == 160 and np.isfinite(entropy).all()
        assert np.abs(np.asarray(ours) - rows.logprobs)[rows.sampled].max() <= 1e-4
