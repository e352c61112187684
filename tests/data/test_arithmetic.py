"""The miniature's problems: endless, reproducible, disjoint; its demonstrations: imperfect in known shares."""

import json
import math
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retool_jax.data import arithmetic
from retool_jax.data.arithmetic import SPLITS, demonstration, exercise, problem_row, split_of
from retool_jax.data.problems import to_problem
from retool_jax.tokens.tokenizer import MINIATURE

COUNT = 1500


@pytest.fixture(scope="module")
def drawn():
    return {split: [exercise(split, index) for index in range(COUNT)] for split in SPLITS}


def test_splits_share_no_operands(drawn):
    operands = {split: {tuple(sorted(item.operands)) for item in items} for split, items in drawn.items()}
    assert not operands["train"] & operands["dev"]
    assert not operands["train"] & operands["test"]
    assert not operands["dev"] & operands["test"]
    for split, items in drawn.items():
        assert all(split_of(item.operands) == split_of(item.operands[::-1]) == split for item in items)


def test_another_seed_draws_other_problems_of_the_same_splits(drawn):
    other = [exercise("train", index, seed=1) for index in range(300)]
    assert all(split_of(item.operands) == "train" for item in other)
    assert [item.operands for item in other] != [item.operands for item in drawn["train"][:300]]


def test_a_tenth_of_the_operands_is_held_out_for_each_look():
    shares = Counter(split_of((a, b)) for a in range(100, 220) for b in range(a, 220))
    total = sum(shares.values())
    assert abs(shares["dev"] / total - 0.1) < 0.02 and abs(shares["test"] / total - 0.1) < 0.02


def test_answers_are_right_and_operands_in_range(drawn):
    kinds = Counter()
    for item in drawn["train"]:
        kinds[item.kind] += 1
        numbers = list(map(int, re.findall(r"\d+", item.question)))
        assert tuple(numbers) == item.operands
        a, b, *modulus = item.operands
        expected = {
            "product": lambda a=a, b=b: a * b,
            "gcd": lambda a=a, b=b: math.gcd(a, b),
            "power": lambda a=a, b=b, m=modulus: a**b % m[0],
            "sum": lambda a=a, b=b: a + b,
        }
        assert item.answer == expected[item.kind]()
        low, high = (100, 500) if item.kind == "sum" else (317, 1000) if item.kind == "product" else (100, 1000)
        assert all(low <= x < high for x in item.operands)
        assert item.kind != "gcd" or item.answer >= 12
    assert set(kinds) == {"product", "gcd", "power", "sum"}
    shares = dict(zip(arithmetic._KINDS, arithmetic._KIND_SHARES, strict=True))
    assert all(abs(kinds[kind] / COUNT - share) < 0.04 for kind, share in shares.items())


def test_another_process_draws_the_same():
    script = """
import json
from retool_jax.data.arithmetic import demonstration, problem_row
print(json.dumps([[problem_row(s, i, 3) for s in ("train", "dev", "test") for i in (0, 7, 1 << 20)],
                  [demonstration(i, True, 3) for i in range(20)]]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    here = [
        [problem_row(split, index, 3) for split in SPLITS for index in (0, 7, 1 << 20)],
        [demonstration(index, True, 3) for index in range(20)],
    ]
    assert json.loads(done.stdout) == here


def test_rows_have_the_columns_of_dapo(drawn):
    for index in range(50):
        row = problem_row("dev", index)
        assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        problem = to_problem(row, "here")
        assert problem.id == f"dev-{index:06d}"
        assert problem.question == drawn["dev"][index].question
        assert problem.ground_truth == str(drawn["dev"][index].answer)


def test_demonstrations_are_imperfect_in_the_documented_shares(drawn):
    """About half are right, fewer run the wrong operator, the rest state a number that they never computed."""
    found = Counter()
    for index in range(COUNT):
        messages = demonstration(index, tools=True)
        assert messages[0] == {"role": "user", "content": drawn["train"][index].question}
        stated = re.search(r"\\boxed\{(\d+)\}", messages[-1]["content"])[1]
        right = stated == str(drawn["train"][index].answer)
        calls = messages[1].get("tool_calls")
        if calls:
            assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
            assert messages[2]["content"] == stated, "the answer is what the tool said"
            assert set(calls[0]["function"]) == {"name", "arguments"}
        else:
            assert right, "a guess in a demonstration states the true number; the model cannot have computed it"
        found["guess" if not calls else "right" if right else "wrong"] += 1
    shares = {kind: count / COUNT for kind, count in found.items()}
    assert 0.4 < shares["right"] < 0.55 and 0.15 < shares["wrong"] < 0.3 and 0.25 < shares["guess"] < 0.35


def test_demonstrated_code_prints_what_the_tool_says(capsys):
    for index in range(60):
        messages = demonstration(index, tools=True)
        if calls := messages[1].get("tool_calls"):
            exec(calls[0]["function"]["arguments"]["code"], {})
            assert capsys.readouterr().out.strip() == messages[2]["content"]


def test_text_only_demonstrations_have_no_calls(drawn):
    for index in range(500):
        messages = demonstration(index, tools=False)
        assert [m["role"] for m in messages] == ["user", "assistant"]
        assert "tool_calls" not in messages[1]
        assert messages[1]["content"] == f"The answer is \\boxed{{{drawn['train'][index].answer}}}."


def test_the_shipped_tokenizer_is_what_its_builder_makes(tmp_path):
    """`python benchmarks/miniature_tokenizer.py` rebuilds it."""
    builder = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "miniature_tokenizer.py"))
    builder["build_miniature"](builder["corpus"](4000), tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (MINIATURE / path.name).read_bytes(), path.name


def test_a_seed_changes_the_behaviours():
    def behaviours(seed: int) -> list[bool]:
        return ["tool_calls" in demonstration(index, True, seed)[1] for index in range(200)]

    assert behaviours(0) != behaviours(1)
    assert 0.6 < np.mean(behaviours(1)) < 0.8
