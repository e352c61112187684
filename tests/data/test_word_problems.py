"""Word problems: right answers, splits and kinds kept apart, and demonstrations that say what their programs print."""

import contextlib
import hashlib
import io
import json
import re
import string
import subprocess
import sys
from collections import Counter

import pytest

from retool_jax.answers import check
from retool_jax.data.arithmetic import SPLITS, split_of
from retool_jax.data.instructions import question_of
from retool_jax.data.problems import Problems, to_problem
from retool_jax.data.traces import boxed_answer
from retool_jax.data.word_problems import (
    FLAWED,
    HELD_OUT,
    TRAINED,
    Exercise,
    demonstration,
    exercise,
    problem_row,
    program_of,
)
from retool_jax.errors import UserError
from retool_jax.run.load import load
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.grammar import CODE_TOOL, retool_calls
from retool_jax.tools.python import Python

COUNT = 200
SOURCES = ("word_problems", "word_problems:held_out")
# What each kind asks, worked out by hand from its words and not from its steps.
ANSWERS = {
    "seats": lambda rows, seats: rows * seats,
    "stock": lambda stock, sold: stock - sold,
    "boxes": lambda amount, size: amount / size,
    "crates": lambda crates, each, sold: crates * each - sold,
    "wages": lambda rate, days, bonus: rate * days + bonus,
    "orders": lambda desks, desk_price, lamps, lamp_price: desks * desk_price + lamps * lamp_price,
    "discount": lambda price, percent: price * (100 - percent) / 100,
    "average": lambda monday, tuesday, wednesday: (monday + tuesday + wednesday) / 3,
    "rest": lambda amount, broken, people: (amount - broken) / people,
    "more": lambda first, more: 2 * first + more,
    "times": lambda first, times: first * (times + 1),
    "tank": lambda full, rate, minutes: full - rate * minutes,
    "packs": lambda guests, each, pack: guests * each / pack,
    "pond": lambda length, width, side: length * width - side**2,
    "dearer": lambda dear, cheap, count: (dear - cheap) * count,
    "fence": lambda length, width, price: 2 * (length + width) * price,
    "orchards": lambda rows, trees, other_rows, other_trees: rows * trees - other_rows * other_trees,
    "part": lambda amount, part: amount - amount / part,
    "bags": lambda first, second, size: (first + second) / size,
    "hotel": lambda floors, rooms, lamps: floors * rooms * lamps,
}


def printed(program: str) -> str:
    """What a program of ours prints, run right here."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


def code_of(messages: list[dict]) -> str:
    return messages[1]["tool_calls"][0]["function"]["arguments"]["code"]


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, bool], list[Exercise]]:
    return {
        (split, held_out): [exercise(split, index, held_out=held_out) for index in range(COUNT)]
        for split in SPLITS
        for held_out in (False, True)
    }


def test_every_kind_asks_what_its_program_computes(drawn):
    seen = Counter()
    for item in (item for items in drawn.values() for item in items):
        seen[item.kind.name] += 1
        assert item.answer == ANSWERS[item.kind.name](**item.numbers) > 0
        assert isinstance(item.answer, int)
        assert str(item.answer) == printed(program_of(item.kind.steps, item.numbers)), item
        assert item.answer not in item.numbers.values(), "or a number of the question would be the answer"
    assert set(seen) == set(ANSWERS) == {kind.name for kind in (*TRAINED, *HELD_OUT)}
    assert min(seen.values()) > 10


def test_every_phrasing_says_each_number_of_its_kind_once():
    for kind in (*TRAINED, *HELD_OUT):
        assert 1 <= len(kind.steps) <= 3 and len(kind.asks) > 1
        for ask in kind.asks:
            fields = Counter(field for _, field, _, _ in string.Formatter().parse(ask) if field)
            people = {"name", "other", "thing"}
            assert fields.keys() - people == kind.numbers.keys(), ask
            assert all(fields[number] == 1 for number in kind.numbers), ask
            assert ask.endswith("?")
        computed = {step.split()[0] for step in kind.steps}
        assert len(computed) == len(kind.steps) and not computed & kind.numbers.keys(), "names stand for one value"


def test_numbers_are_out_of_reach_of_a_small_model_and_stand_in_the_question(drawn):
    for item in (item for items in drawn.values() for item in items):
        digits = [len(str(number)) for number in item.numbers.values()]
        assert sum(digits) >= 5, item
        stated = sorted(map(int, re.findall(r"\d+", item.question)))
        assert stated == sorted(item.numbers.values())
        assert all(low <= item.numbers[name] <= high for name, (low, high) in item.kind.numbers.items())


def test_splits_share_no_numbers_and_kinds_are_held_out(drawn):
    kinds = {held_out: {item.kind.name for split in SPLITS for item in drawn[split, held_out]} for held_out in (0, 1)}
    assert (len(kinds[False]), len(kinds[True])) == (15, 5) and not kinds[False] & kinds[True]
    numbers = {
        split: {frozenset(item.numbers.values()) for held_out in (False, True) for item in drawn[split, held_out]}
        for split in SPLITS
    }
    assert not numbers["train"] & numbers["dev"]
    assert not numbers["train"] & numbers["test"]
    assert not numbers["dev"] & numbers["test"]
    for (split, _), items in drawn.items():
        assert {split_of(tuple(reversed(item.numbers.values()))) for item in items} == {split}
    demonstrated = {
        question_of(demonstration(index, tools)[0]["content"]) for index in range(COUNT) for tools in (0, 1)
    }
    assert demonstrated == {item.question for item in drawn["train", False]}


def test_rows_have_the_columns_of_dapo_and_their_kind(drawn):
    for held_out, prefix in ((False, ""), (True, "held-out-")):
        for index in range(50):
            row, item = problem_row("dev", index, held_out=held_out), drawn["dev", held_out][index]
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert row["extra_info"]["kind"] == item.kind.name
            problem = to_problem(row, "here")
            assert problem.id == f"{prefix}dev-{index:06d}"
            assert question_of(problem.question) == item.question != problem.question
            assert check(f"It is \\boxed{{{item.answer}}}.", problem.ground_truth).correct


@pytest.mark.parametrize("source", SOURCES)
def test_they_are_streams_whose_seed_chooses_among_the_train_split(source):
    for split, same in (("train", False), ("dev", True), ("test", True)):
        heads = [Problems(source, split, seed).head(20) for seed in (0, 1, 7)]
        assert [head == heads[0] for head in heads] == [True, same, same], split
        stream = Problems(source, split, seed=5)
        assert stream.finite is None and stream[10**7] == Problems(source, split, seed=5)[10**7]
        assert len({problem.question for problem in stream.head(100)}) == 100


def test_a_source_that_is_none_is_told_which_there_are(tmp_path):
    with pytest.raises(UserError, match=r"one of arithmetic, word_problems, word_problems:held_out"):
        Problems(str(tmp_path / "none.jsonl"), "train", 0)


def test_another_process_draws_the_same_and_so_does_another_year():
    script = """
import json
from retool_jax.data.word_problems import demonstration, problem_row
rows = [problem_row(s, i, 3, held) for held in (0, 1) for s in ("train", "dev", "test") for i in (0, 7, 1 << 20)]
print(json.dumps(rows + [demonstration(i, tools, 3) for i in range(20) for tools in (True, False)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows = [problem_row(s, i, 3, held) for held in (0, 1) for s in SPLITS for i in (0, 7, 1 << 20)]
    here = json.dumps(rows + [demonstration(i, tools, 3) for i in range(20) for tools in (True, False)])
    assert done.stdout.strip() == here
    assert hashlib.blake2b(here.encode(), digest_size=8).hexdigest() == "f4fd4ab6df20a0b3"


def test_demonstrations_state_what_their_program_prints_and_are_flawed_in_the_documented_share(drawn):
    wrong = Counter()
    for index in range(COUNT):
        item, messages = drawn["train", False][index], demonstration(index, tools=True)
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
        assert question_of(messages[0]["content"]) == item.question
        program = code_of(messages)
        assert printed(program) == messages[2]["content"] == boxed_answer(messages)
        right = program_of(item.kind.steps, item.numbers)
        if program == right:
            continue
        wrong[boxed_answer(messages) != str(item.answer)] += 1
        differences = [pair for pair in zip(program.split(), right.split(), strict=True) if pair[0] != pair[1]]
        assert len(differences) == 1 and set(differences[0]) < {"+", "-", "*", "//"}
    assert abs(wrong.total() / COUNT - FLAWED) < 0.08
    assert wrong[True] == wrong.total(), "another program answers another question"


def test_demonstrations_without_tools_say_the_right_steps_in_words(drawn):
    for index in range(COUNT):
        item, messages = drawn["train", False][index], demonstration(index, tools=False)
        assert [message["role"] for message in messages] == ["user", "assistant"] and "tool_calls" not in messages[1]
        assert boxed_answer(messages) == str(item.answer)
        *steps, last = messages[1]["content"].splitlines()
        assert last == f"The answer is \\boxed{{{item.answer}}}." and len(steps) == len(item.kind.steps)
        for step in steps:
            left, sign, right, _, value = step.partition(": ")[2].split()
            assert eval(f"{left} {sign} {right}") == int(value)
        assert value == str(item.answer)


def test_demonstrations_are_read_back_as_they_were_meant_in_the_papers_grammar(tokenizer):
    for index in range(60):
        messages = demonstration(index, tools=True)
        tokens = demonstration_ids(tokenizer, messages, [Python().schema], "retool", "Use <code>.")
        text = tokenizer.decode(tokens.ids)
        assert tokens.ids == tokenizer.encode(text), "in the tokens that a rollout would have"
        said = tokenizer.decode([i for i, sampled in zip(tokens.ids, tokens.sampled, strict=True) if sampled])
        (call,) = retool_calls(said)
        assert (call.name, call.code, call.repaired) == (CODE_TOOL, code_of(messages), "")
        assert f"<interpreter>\n{messages[2]['content']}\n</interpreter>" in text and "<interpreter>" not in said
        assert check(messages[-1]["content"], boxed_answer(messages)).correct


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["config=sft", "sft.data=word_problems", "sft.steps=0", "sft.epochs=2"],
            "sft.data=word_problems has no end; use sft.steps, or other data",
        ),
        (
            ["config=sft", "sft.data=arithmetic:dev"],
            "sft.data=arithmetic:dev is not made here; choose from: arithmetic",
        ),
        (["config=grpo", "data.test=word_problems:held-out"], "data.test=word_problems:held-out is not made here"),
        (["config=eval", "data.source=arithmetic:test"], "data.source=arithmetic:test is not made here; choose from"),
        (["config=sft", "sft.data=word_problems:held_out"], "are kept out of training; use sft.data=word_problems"),
        (
            ["config=grpo", "data.train=word_problems:held_out"],
            "kept out of training; use data.train=word_problems",
        ),
        (
            ["config=grpo", "data.train=x.jsonl", "data.test=x.jsonl"],
            "data.train=x.jsonl is data.test, too, which",
        ),
    ],
)
def test_a_cold_start_that_cannot_be_is_refused(words, message):
    with pytest.raises(UserError) as caught:
        load(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
