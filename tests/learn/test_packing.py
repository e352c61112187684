"""Packing moves tokens and changes nothing about them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool_jax.errors import UserError
from retool_jax.learn.packing import Batch, Example, first_fit, pack


def example(length: int, first: int) -> Example:
    """An example with distinct ids; every third token is not sampled; each token has its own columns."""
    ids = list(range(first, first + length))
    sampled = [index % 3 != 0 for index in ids]
    logprobs = [-index / 1000 if s else 0.0 for index, s in zip(ids, sampled, strict=True)]
    return Example(ids, sampled, {"old_logprobs": logprobs, "advantages": float(first % 7 - 3)})


def examples_of(lengths: list[int]) -> list[Example]:
    starts = np.cumsum([1, *lengths])
    return [example(length, int(start)) for length, start in zip(lengths, starts, strict=False)]


@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_token_is_packed_once_with_its_mask_and_columns(lengths, rows_per_micro):
    examples = examples_of(lengths)
    batch = pack(examples, 16, rows_per_micro)
    assert batch.tokens.shape[1:] == (rows_per_micro, 16) and batch.micro_batches == len(batch.tokens)
    assert batch.columns.keys() == {"old_logprobs", "advantages"}
    rows = [x.reshape(-1, 16) for x in (*batch[:4], batch.columns["old_logprobs"], batch.columns["advantages"])]
    tokens, positions, segments, sampled, logprobs, advantages = rows
    found = []
    for row in range(len(tokens)):
        used = segments[row] > 0
        assert np.all(np.diff(used.astype(int)) <= 0), "padding is behind the tokens"
        assert sorted(set(segments[row][used])) == list(range(1, segments[row].max() + 1))
        for segment in range(1, segments[row].max() + 1):
            place = np.flatnonzero(segments[row] == segment)
            assert np.all(np.diff(place) == 1), "a sequence is in one piece"
            original = next(e for e in examples if e.ids[0] == tokens[row][place[0]])
            np.testing.assert_array_equal(tokens[row][place], original.ids)
            np.testing.assert_array_equal(positions[row][place], np.arange(len(original.ids)))
            np.testing.assert_array_equal(sampled[row][place], original.sampled)
            np.testing.assert_allclose(logprobs[row][place], original.columns["old_logprobs"])
            expected = np.where(original.sampled, original.columns["advantages"], 0.0)
            np.testing.assert_allclose(advantages[row][place], expected)
            found += original.ids
        for x in rows:
            assert not x[row][~used].any(), "padding is zero everywhere"
    assert sorted(found) == list(range(1, sum(lengths) + 1))


def samples_of(groups: list[tuple[int, list[int]]]) -> list[Example]:
    """Samples of a prompt, from the lengths of the prompt and each answer; every third token was not sampled."""
    examples = []
    for prompt, answers in groups:
        for length in answers:
            ids = [prompt] * prompt + [100 + len(examples)] * length  # so prompts of the same length are equal
            sampled = [False] * prompt + [index % 3 != 2 for index in range(length)]
            examples.append(Example(ids, sampled, {"old_logprobs": [-float(index) for index in range(len(ids))]}))
    return examples


def sequences_of(batch: Batch) -> list[tuple]:
    """Ids, mask and column of each sequence in a batch, with the prefix that it sees."""
    found = []
    for tokens, positions, segments, sampled, column in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (*batch[:4], batch.columns["old_logprobs"])), strict=True
    ):
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            first = positions[at[0]]
            if first == 0:
                begun = at  # the prefix of later segments
            whole = np.concatenate([begun[:first], at])
            np.testing.assert_array_equal(positions[whole], np.arange(len(whole)))
            if sampled[at].any():
                found.append(tuple(tuple(x[whole].tolist()) for x in (tokens, sampled, column)))
    return sorted(found)


GROUPS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=5)), max_size=6)


@given(GROUPS, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_shared_prompt_precedes_each_of_its_samples(groups, rows_per_micro):
    examples = samples_of(groups)
    if not examples:
        return
    apart = pack(examples, 16, rows_per_micro)
    shared = pack(examples, 16, rows_per_micro, share_prefixes=True)
    assert sequences_of(shared) == sequences_of(apart)
    assert np.sum(shared.sampled) == sum(sum(example.sampled) for example in examples), "each token is learned once"
    rows, others = ((x.segments > 0).any(-1).sum() for x in (shared, apart))
    assert rows < others or all(np.array_equal(x, y) for x, y in zip(shared[:4], apart[:4], strict=True))


def test_a_prompt_that_is_shared_on_a_known_case():
    """All but its last token once, and that one in each sample; nothing is shared if that saves no row."""
    ids = [1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8]
    examples = [Example(x, [token > 3 for token in x]) for x in ids]
    batch = pack(examples, 9, 1, share_prefixes=True)
    np.testing.assert_array_equal(batch.tokens, [[[1, 2, 3, 5, 6, 3, 4, 7, 8]]])
    np.testing.assert_array_equal(batch.positions, [[[0, 1, 2, 3, 4, 2, 3, 0, 1]]])
    np.testing.assert_array_equal(batch.segments, [[[1, 1, 2, 2, 2, 3, 3, 4, 4]]])
    np.testing.assert_array_equal(batch.sampled, batch.tokens > 3)
    roomy = pack(examples, 11, 1, share_prefixes=True)
    np.testing.assert_array_equal(roomy.tokens, [[[1, 2, 3, 5, 6, 1, 2, 3, 4, 7, 8]]])
    assert pack([Example([1, 2, 3], [False] * 3)] * 2, 4, 1, share_prefixes=True).micro_batches == 2


@given(st.lists(st.integers(1, 50), max_size=60))
@settings(max_examples=60, deadline=None)
def test_first_fit_keeps_the_limit_and_wastes_little(lengths):
    rows = first_fit(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= 50 for total in filled)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 50) + 1 or sum(sorted(filled)[:2]) > 50


def test_first_fit_decreasing_on_a_known_case():
    assert first_fit([4, 6, 3, 7, 5, 5], 10) == [[3, 2], [1, 0], [4, 5]]
    assert first_fit([], 10) == []
    assert first_fit([10, 10], 10) == [[0], [1]]


def test_a_fixed_number_of_micro_batches():
    batch = pack(examples_of([16, 16, 16]), 16, rows_per_micro=2, max_micro_batches=5)
    assert batch.tokens.shape == (5, 2, 16) and batch.micro_batches == 2
    assert not batch.segments[2:].any()
    assert pack(examples_of([16, 16, 16]), 16, 2, 2).tokens.shape == (2, 2, 16)


def test_nothing_to_pack():
    assert pack([], 16, rows_per_micro=2).tokens.shape == (0, 2, 16)
    assert pack([], 16, 2, max_micro_batches=3).micro_batches == 0


def test_a_column_is_one_value_or_one_a_token_and_zero_where_nothing_was_sampled():
    assert pack([Example([5, 6], [False, True])], 4, 1).columns == {}
    batch = pack([Example([5, 6], [False, True], {"advantages": 1.0, "old_logprobs": [-2.0, -3.0]})], 4, 1)
    np.testing.assert_array_equal(batch.columns["advantages"][0, 0], [0, 1, 0, 0])
    np.testing.assert_array_equal(batch.columns["old_logprobs"][0, 0], [0, -3, 0, 0])
    assert all(x.dtype == np.float32 and x.shape == (1, 1, 4) for x in batch.columns.values())


def test_examples_of_one_batch_have_the_same_columns():
    with pytest.raises(ValueError, match=r"columns \['advantages'\] and \[\]; give all the same ones"):
        pack([Example([5], [True], {"advantages": 1.0}), Example([5], [True])], 4, 1)


def test_limits_are_reported():
    with pytest.raises(
        UserError, match=r"a sequence of 17 tokens does not fit a packed row of 16; raise sft.row_length"
    ):
        pack(examples_of([3, 17]), 16, 2)
    with pytest.raises(UserError, match="3 packed rows need 2 micro-batches of 2; the limit is 1; use longer rows"):
        pack(examples_of([16, 16, 16]), 16, 2, max_micro_batches=1)
