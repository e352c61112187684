"""The numbers of a finished evaluation, in JSON and in a table, and the comparison of two."""

import json

import pytest

from retool_jax.errors import UserError
from retool_jax.evaluation.estimators import maj_at, mean_at_n, paired_difference, pass_at, recipe_best_worst_maj
from retool_jax.evaluation.results import ProblemResult, compare, numbers_of, table

PROBLEMS = [
    ProblemResult("a", (True, True, False, True, True), ("7", "7", "3", "7", "07")),
    ProblemResult("b", (False, False, False, False, True), ("1", "1", None, "", "2")),
    ProblemResult("c", (True, False, False), ("5", "4", "4")),
    ProblemResult("lost", (), ()),
]
CORRECT, ANSWERS = [p.correct for p in PROBLEMS], [p.answers for p in PROBLEMS]


def result(problems: dict[str, list[bool]], name: str = "aime25") -> dict:
    """A result as it stands in a file."""
    rows = [
        {"id": problem, "correct": correct, "answers": [None] * len(correct)} for problem, correct in problems.items()
    ]
    return json.loads(json.dumps({"set": name, "problems": rows, "config": {}}))


def shown(numbers: dict, title: str | None = None) -> list[list[str]]:
    """The cells of a table, row by row, below its header."""
    made = table(numbers, title)
    columns = [[str(column.header), *map(str, column.cells)] for column in made.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def test_the_numbers_are_those_of_the_estimators():
    numbers = numbers_of(PROBLEMS)
    assert list(numbers) == ["accuracy", *(f"{name}@{k}" for name in ("pass", "maj") for k in (1, 2, 4, 5)), "recipe"]
    for name, estimate, problems in [
        ("accuracy", mean_at_n(CORRECT), 3),
        ("pass@2", pass_at(CORRECT, 2), 3),
        ("pass@5", pass_at(CORRECT, 5), 2),
        ("maj@4", maj_at(CORRECT, ANSWERS, 4), 2),
    ]:
        assert numbers[name] == {
            "value": estimate.value,
            "stderr": estimate.stderr,
            "low": estimate.low,
            "high": estimate.high,
            "problems": problems,
        }
    assert numbers["recipe"] == recipe_best_worst_maj(CORRECT, ANSWERS)
    assert numbers["pass@1"] == numbers["accuracy"]
    many = [ProblemResult(str(i), tuple(j < i % 6 for j in range(5)), ("7",) * 5) for i in range(50)]
    assert numbers_of(many, seed=3)["accuracy"]["low"] != numbers_of(many)["accuracy"]["low"]


def test_the_numbers_fit_into_strict_json():
    numbers = numbers_of(PROBLEMS[:1])
    assert numbers["accuracy"]["stderr"] is None, "one problem has no standard error"
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers


def test_ks_can_be_chosen_and_one_that_nobody_has_costs_no_other_number():
    assert {"pass@3", "maj@3"} < set(numbers_of(PROBLEMS, [3])) and "pass@2" not in numbers_of(PROBLEMS, [3])
    assert "pass@1" in numbers_of([ProblemResult("a", (True,), ("7",))])
    beyond = numbers_of(PROBLEMS, [2, 6])
    assert (beyond["pass@6"], beyond["maj@6"]) == (None, None) and beyond["pass@2"] == numbers_of(PROBLEMS)["pass@2"]
    assert [row[0] for row in shown(beyond)[1:]] == ["accuracy", "pass@2", "maj@2"]
    with pytest.raises(UserError, match="k=0 samples"):
        numbers_of(PROBLEMS, [0])
    with pytest.raises(UserError, match="the most that one has is 0"):
        numbers_of([ProblemResult("lost", (), ())])


def test_the_table_shows_each_estimate_with_its_interval_and_verls_beside_it():
    numbers = numbers_of(PROBLEMS, [1, 2, 5])
    header, *rows = shown(numbers)
    assert header == ["", "mean ± standard error", "95 % interval", "problems", "verl's bootstrap"]
    assert [row[0] for row in rows] == ["accuracy", "pass@1", "pass@2", "pass@5", "maj@1", "maj@2", "maj@5"]
    accuracy = numbers["accuracy"]
    percent = [f"{100 * accuracy[name]:.1f}" for name in ("value", "stderr", "low", "high")]
    assert rows[0][1:] == [f"{percent[0]} ± {percent[1]} %", f"{percent[2]} to {percent[3]} %", "3", "-"]
    recipe = numbers["recipe"]
    assert [rows[i][4] for i in (1, 2, 6)] == ["-", f"{100 * recipe['best@2']:.1f} %", f"{100 * recipe['maj@5']:.1f} %"]
    assert table(numbers, "aime25").title == "aime25"


def test_a_table_leaves_out_what_is_no_estimate():
    numbers = {"set": "aime25", "accuracy": numbers_of(PROBLEMS[:1])["accuracy"], "turns_mean": 2.5, "recipe": {}}
    header, row = shown(numbers)
    assert "verl's bootstrap" not in header and row[:2] == ["accuracy", "80.0 %"]


def test_two_results_are_compared_problem_by_problem():
    ours = {"a": [True, True], "b": [True, False], "c": [False, False], "x": [True], "lost": []}
    theirs = {"c": [False, False], "b": [False, False], "a": [True, False], "y": [True], "z": [False], "lost": [True]}
    found = compare(result(ours), result(theirs))
    assert (found["set"], found["problems"], found["only_ours"], found["only_theirs"]) == ("aime25", 3, 1, 3)
    difference = paired_difference([ours[i] for i in "abc"], [theirs[i] for i in "abc"])
    assert found["difference"]["value"] == difference.value == pytest.approx(1 / 3)
    assert (found["difference"]["low"], found["difference"]["high"]) == (difference.low, difference.high)
    assert (found["ours"]["value"], found["theirs"]["value"]) == (pytest.approx(0.5), pytest.approx(1 / 6))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [row[0] for row in shown(found)[1:]] == ["ours", "theirs", "difference"]
    assert compare(result(theirs), result(ours))["difference"]["value"] == pytest.approx(-1 / 3)


def test_samples_that_were_drawn_in_another_way_are_told():
    """Top-p alone shifts accuracy; seeds and places of a run's files do not count."""
    ours, theirs = (
        result({"a": [True]}) | {"config": {"evaluation.top_p": p, "tools": "python", "seed": p, "init_from": str(p)}}
        for p in (1.0, 0.6)
    )
    theirs["config"]["rollout.max_turns"] = 8  # a key that the other version does not have
    assert compare(ours, theirs)["drawn_differently"] == {"evaluation.top_p": [1.0, 0.6]}
    assert compare(ours, ours)["drawn_differently"] == compare(ours, theirs | {"config": []})["drawn_differently"] == {}


def test_a_sets_name_may_be_written_in_two_ways_but_not_be_another():
    problems = {"a": [True]}
    assert compare(result(problems, "AIME-2025"), result(problems, "aime_2025"))["problems"] == 1
    with pytest.raises(UserError, match="on 'aime25' cannot be compared with one on 'aime24'; choose two of one set"):
        compare(result(problems), result(problems, "aime24"))


def test_a_set_at_two_paths_is_one(tmp_path, monkeypatch):
    """By the file that both lead to, or by the digest of what its problems say."""
    problems, path = {"a": [True]}, tmp_path / "own.jsonl"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    for other in ("own.jsonl", "./own.jsonl", str(tmp_path / "link.jsonl")):
        assert compare(result(problems, str(path)), result(problems, other))["problems"] == 1
    copied = result(problems, "/elsewhere/copied.jsonl") | {"problems_sha256": "12ab"}
    assert compare(result(problems, str(path)) | {"problems_sha256": "12ab"}, copied)["problems"] == 1
    edited = result(problems, str(path)) | {"problems_sha256": "34cd"}  # of the same path, at another time
    before = edited | {"problems_sha256": "12ab"}
    assert compare(edited, before)["changed"] and not compare(edited, edited)["changed"]
    assert not compare(edited, before | result(problems | {"b": [True]}, str(path)))["changed"], "asked for more"
    for digest in ({"problems_sha256": "34cd"}, {}):
        with pytest.raises(UserError, match="choose two of one set"):
            compare(result(problems, str(path)) | digest, copied)


def test_results_without_a_common_problem_are_refused():
    with pytest.raises(UserError, match=r"of the 1 problems of this result and the 2 of the other none .*'a' and 'b'"):
        compare(result({"a": [True]}), result({"b": [True], "c": [False]}))
    with pytest.raises(UserError, match="none is in both"):
        compare(result({"a": [True]}), result({"a": []}))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        [],
        {"set": "aime25"},
        {"set": "aime25", "problems": None},
        {"set": "aime25", "problems": ["a"]},
        {"set": "aime25", "problems": [{"id": "a"}]},
        {"set": "aime25", "problems": [{"id": "a", "correct": None}]},
        {"set": "aime25", "problems": [{"id": "a", "correct": ["yes"]}]},
        {"problems": [{"id": "a", "correct": [True]}]},
    ],
)
def test_what_is_no_result_is_refused(broken):
    with pytest.raises(
        UserError, match=r"the result to compare with cannot be read .*name a file that an evaluation wrote"
    ):
        compare(result({"a": [True]}), broken)


def test_a_result_with_a_problem_twice_is_refused():
    twice = result({"a": [True]})
    twice["problems"] *= 2
    with pytest.raises(UserError, match="this result has two problems with one id"):
        compare(twice, result({"a": [True]}))
