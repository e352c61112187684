"""Contract 9 for evaluations: what is in the file counts, whatever a kill left behind it."""

import json
import random

import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.evaluation.config import SAMPLES
from retool_jax.evaluation.numbers import summarise
from retool_jax.evaluation.store import Store
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory

PROBLEMS = [Problem(f"p{i}", ({"role": "user", "content": "Was ist 2 + 4 ?\u2028\udc80"},), "6") for i in range(3)]


def trajectory(problem: int, sample: int, end: End = End.ANSWERED) -> Trajectory:
    """One with a call and, by its numbers, a right or a wrong answer."""
    t = Trajectory(f"p{problem}/{sample}", PROBLEMS[problem], end=end, forced=sample == 1)
    t.add("prompt", [1, 2 + problem])
    t.add("policy", [3, 4], [-0.5, -0.25])
    t.add("tool", [5])
    t.tool_uses.append(ToolUse(0, "print(1)", "success", "1", 0.5, 0.25, "code_interpreter", metrics={"cpu_s": 0.1}))
    t.add("policy", [6] * (1 + sample), [-1.0] * (1 + sample))
    if not t.dropped:
        t.verdict, t.exact = Verdict((problem + sample) % 2 == 0, str(sample), "integer"), sample == 2
        t.reward, t.reward_terms = 1.0, {"default": 1.0}
    return t


@pytest.fixture
def record(tokenizer):
    """`record(problem, sample)`: what is kept of that sample."""

    def of(problem: int, sample: int, end: End = End.ANSWERED) -> dict:
        return trajectory(problem, sample, end).record(tokenizer, group=problem, sample=sample)

    return of


KEYS = [(problem, sample) for problem in range(3) for sample in range(3)]


def test_what_comes_back_has_the_numbers_of_what_was_written(tmp_path, record):
    with Store(tmp_path) as store:
        store.add([record(*key) for key in KEYS[:4]])
        store.add([record(*key) for key in reversed(KEYS[4:])])
    lines = (tmp_path / SAMPLES).read_bytes().split(b"\n")
    assert len(lines) == 10 and json.loads(lines[0])["logprobs"] == [0, 0, -0.5, -0.25, 0, -1.0]
    with Store(tmp_path) as store:
        assert sorted(store.done) == KEYS and all(store.finished(*key) for key in KEYS)
        found = list(store.trajectories(PROBLEMS))
    assert [key for key, _ in found] == KEYS
    originals = [trajectory(*key) for key in KEYS]
    assert summarise([t for _, t in found], 0.0) == summarise(originals, 0.0)
    for (_, ours), theirs in zip(found, originals, strict=True):
        assert (ours.ids, ours.segments, ours.tool_uses) == (theirs.ids, theirs.segments, theirs.tool_uses)
        assert (ours.problem, ours.verdict, ours.exact, ours.end) == (
            theirs.problem,
            theirs.verdict,
            theirs.exact,
            theirs.end,
        )


def test_a_file_that_is_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path, record):
    with Store(tmp_path) as store:
        store.add([record(*key) for key in KEYS])
    whole = (tmp_path / SAMPLES).read_bytes()
    draw = random.Random(0)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in [0, 1, *ends, *(end - 1 for end in ends), *(draw.randrange(len(whole)) for _ in range(40))]:
        for tail in (b"", b"\0\0\0\0", b"\xff{"):
            (tmp_path / SAMPLES).write_bytes(whole[:cut] + tail)
            with Store(tmp_path) as store:
                there = sum(end <= cut for end in ends)
                assert list(store.done) == KEYS[:there]
                store.add([record(*key) for key in KEYS[there:]])
            assert (tmp_path / SAMPLES).read_bytes() == whole


def test_a_sample_that_the_machinery_lost_is_not_finished_until_it_is_drawn_again(tmp_path, record):
    with Store(tmp_path) as store:
        store.add([record(0, 0, End.SANDBOX_LOST), record(0, 1)])
        assert not store.finished(0, 0) and store.finished(0, 1) and not store.finished(0, 2)
        ((_, lost), _) = store.trajectories(PROBLEMS)
        assert lost.dropped and lost.verdict is None
    with Store(tmp_path) as store:
        assert not store.finished(0, 0)
        store.add([record(0, 0)])
        assert store.finished(0, 0) and [t.end for _, t in store.trajectories(PROBLEMS)] == [End.ANSWERED] * 2


def test_a_line_that_no_kill_can_have_torn_is_named(tmp_path, record):
    with Store(tmp_path) as store:
        store.add([record(*key) for key in KEYS[:3]])
    lines = (tmp_path / SAMPLES).read_bytes().splitlines(keepends=True)
    (tmp_path / SAMPLES).write_bytes(lines[0] + b"{half\n" + lines[2])
    with pytest.raises(UserError, match=r"samples\.jsonl line 2 is not JSON; remove that line"):
        Store(tmp_path)
    assert len((tmp_path / SAMPLES).read_bytes()) > len(lines[0]), "nothing is taken away"
    for other in (b"[1]\n", b'{"group": 0, "sample": 1}\n'):
        (tmp_path / SAMPLES).write_bytes(lines[0] + other + lines[2])
        with pytest.raises(
            UserError, match=r"samples\.jsonl line 2 is no sample of an eval.* \(it .*\); remove that line"
        ):
            Store(tmp_path)


def test_what_other_hosts_left_is_taken_over_once(tmp_path, record):
    with Store(tmp_path) as store:
        store.add([record(0, 0), record(0, 1, End.SANDBOX_LOST)])
    other = tmp_path / "other"
    other.mkdir()
    with Store(other) as store:
        store.add([record(*key) for key in KEYS[:4]])
    text = (other / SAMPLES).read_bytes()
    (tmp_path / "samples.1.jsonl").write_bytes(text + b'{"group": 1, "sam')
    (tmp_path / "samples.12.jsonl").write_bytes(text[: text.index(b"\n") + 1])
    with Store(tmp_path) as store:
        assert sorted(store.done) == KEYS[:4] and all(store.finished(*key) for key in KEYS[:4])
        store.collect()
        assert [t.end for _, t in store.trajectories(PROBLEMS)] == [End.ANSWERED] * 4
    assert [path.name for path in tmp_path.glob("samples*")] == [SAMPLES]
    lines = (tmp_path / SAMPLES).read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 + 3, "what was finished is not added again"
    assert b"".join(lines[2:]) == text[text.index(b"\n") + 1 :]
