"""Rollouts are read back unchanged, and files that cannot be learned from are refused with a message."""

import asyncio
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.rl.config import RLConfig
from retool_jax.rl.replay import NEEDED, Replay, read_rollouts, rollouts_path, write_rollouts
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory

RL = RLConfig(steps=2, prompts_per_step=2, group_size=2, row_length=64)
VOCABULARY = 100


def float32_logprobs(count: int, seed: int) -> list[float]:
    """Log-probabilities of all magnitudes of float32, including the ends of its range, as the engine returns them."""
    bits = np.random.default_rng(seed).integers(0x80000000, 0xFF800000, count - 5, dtype=np.uint32).view(np.float32)
    ends = np.array([-0.0, -1.0e-45, -3.4028235e38, -np.inf, np.nextafter(np.float32(-1), np.float32(0))], np.float32)
    return np.concatenate([bits, ends]).tolist()


def trajectory(number: int, reward: float | None = 1.0, length: int = 20, end: End = End.ANSWERED) -> Trajectory:
    """A prompt, a call with its answer, and a last turn of `length` tokens; dropped if it has no reward."""
    made = Trajectory(
        f"p/{number}", Problem("p", ({"role": "user", "content": "2 + 2?\ud800\u2028"},), "4\udfff", ("a",))
    )
    made.add("prompt", [1, 2, 3])
    made.add("policy", [4, 5, 6], [-0.5, -0.25, -0.1])
    made.add("tool", [7, 8])
    made.add("policy", list(range(length)), float32_logprobs(length, number))
    made.tool_uses = [ToolUse(0, "print(2 +\r\n2) # \ud800", "success", "4", 0.1, 0.2, "python", "", {"cells": 1})]
    made.end, made.reward, made.forced, made.started_s, made.finished_s = end, reward, number == 1, 0.123456789, 1 / 3
    if reward is not None:
        made.verdict = Verdict(reward > 0, "4\ud800", "integer")
    return made


def write_steps(folder: Path, steps: int, *, group_size: int = 2, **kind) -> None:
    for step in range(1, steps + 1):
        made = [trajectory(10 * step + i, (-1.0) ** i, **kind) for i in range(4)]
        write_rollouts(rollouts_path(folder, step), made, group_size)


def test_what_was_written_comes_back_to_the_bit(tmp_path):
    path = rollouts_path(tmp_path, 3)
    assert path == tmp_path / "rollouts" / "step-000003.jsonl"
    dropped = trajectory(2, None, end=End.SANDBOX_LOST)
    dropped.fault = "worker died\n\ud800"
    made = [trajectory(0, length=5000), trajectory(1, -0.123456789012345), dropped, trajectory(3, end=End.TOKEN_LIMIT)]
    others = {str: "other\ud800", int: 7, bool: True, dict: {"guard": -0.5}}  # values of the remaining fields
    for field in fields(Trajectory):
        if not (value := getattr(made[0], field.name)) and type(value) in others:
            setattr(made[0], field.name, others[type(value)])
    write_rollouts(path, made, 2)
    found = read_rollouts(path)
    for one, other in zip(made, found, strict=True):
        bits = [np.array(t.logprobs, np.float32).view(np.uint32).tolist() for t in (one, other)]
        assert bits[0] == bits[1]
        logprobs = np.array(one.logprobs, np.float32).tolist()  # Python's -0.1 is not a float32
        assert vars(other) == vars(one) | {"logprobs": logprobs}
    assert isinstance(found[0].ids[0], int) and isinstance(found[0].sampled[0], bool)
    lines = [json.loads(line) for line in path.read_bytes().decode().strip("\n").split("\n")]
    assert [line["group"] for line in lines] == [0, 0, 1, 1] and "text" not in lines[0]["segments"][0]


def test_a_reader_can_have_the_text_of_each_segment(tmp_path, tokenizer):
    made = Trajectory("p/0", Problem("p", ({"role": "user", "content": "?"},), "4"), end=End.NO_ANSWER, reward=-1.0)
    made.add("prompt", tokenizer.encode("How many?"))
    made.add("policy", tokenizer.encode("Four."), [-1.0] * len(tokenizer.encode("Four.")))
    made.verdict = Verdict(False, None, "no_box")
    write_rollouts(tmp_path / "file.jsonl", [made], 1, tokenizer)
    segments = json.loads((tmp_path / "file.jsonl").read_text())["segments"]
    assert [segment["text"] for segment in segments] == ["How many?", "Four."]
    assert read_rollouts(tmp_path / "file.jsonl") == [made]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_steps(tmp_path, 1)
    path = rollouts_path(tmp_path, 1)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rollouts(path, [trajectory(0), replace(trajectory(1), fault={1, 2})], 2)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_session_of_another_program_needs_five_fields(tmp_path):
    path = tmp_path / "file.jsonl"
    made = [trajectory(0), trajectory(1, -1.0)]
    write_rollouts(path, made, 2)
    lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    path.write_text("".join(json.dumps({name: line[name] for name in NEEDED}) + "\n" for line in lines))
    for one, other in zip(made, read_rollouts(path), strict=True):
        assert (other.ids, other.sampled, other.segments) == (one.ids, one.sampled, one.segments)
        assert (other.reward, other.verdict.correct, other.end) == (one.reward, one.verdict.correct, End.ANSWERED)
        assert other.turns == 2 and other.problem.question == ""


def test_a_replay_returns_the_steps_in_order_and_resumes_after_the_last_one(tmp_path):
    write_steps(tmp_path, 3)

    async def taken(step: int) -> list[list[str]]:
        async with Replay(tmp_path, RL, VOCABULARY, step) as replay:
            drawn = []
            for _ in range(step, RL.steps):
                rollouts = await replay.take()
                drawn.append([t.id for t in rollouts.trajectories])
                assert rollouts.statistics.total_s > 0 and rollouts.statistics.decoded_tokens == 0
                replay.update_weights({})
                await replay.drain()
            assert replay.state() == {}
            return drawn

    first, second = asyncio.run(taken(0))
    assert (first, second) == ([f"p/{i}" for i in (10, 11, 12, 13)], [f"p/{i}" for i in (20, 21, 22, 23)])
    assert asyncio.run(taken(1)) == [second]


def changed(folder: Path, **fields: object) -> None:
    """Step 1 with other fields in its second line."""
    write_steps(folder, 2)
    path = rollouts_path(folder, 1)
    lines = path.read_text().split("\n")
    record = json.loads(lines[1]) | fields
    lines[1] = json.dumps({key: value for key, value in record.items() if value is not ...})
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": ...}, "line 2 is no trajectory (it has no 'ids'); docs/data.md says what one needs"),
        ({"logprobs": [0.0]}, "(28 ids, 28 sampled and 1 logprobs: give as many of each)"),
        ({"ids": [-1] * 28}, "(ids -1: it must be a whole number of at least 0)"),
        ({"ids": [1.5] * 28}, "(ids 1.5: it must be a whole number"),
        ({"ids": ["a"] * 28}, "(ids 'a': it must be a whole number"),
        ({"sampled": [2] * 28}, "(sampled 2: it must be 0 or 1)"),
        ({"sampled": [1] * 28}, "(its first id was sampled: give the prompt that it was drawn behind, too)"),
        ({"logprobs": [float("nan")] * 28}, "(logprobs has NaN, which no token is drawn with)"),
        ({"reward": float("nan")}, "(its reward is nan, which is not finite)"),
        ({"reward": float("-inf")}, "(its reward is -inf, which is not finite)"),
        ({"logprobs": ["a"] * 28}, "line 2 is no trajectory (could not convert string"),
        ({"reward": None}, "(its reward is null, and its end is answered)"),
        ({"end": "tired"}, "('tired' is not a valid End)"),
        ({"tool_uses": [{"turns": 1}]}, "line 2 is no trajectory ("),
        ({"temperature": 0.7}, "was drawn at temperature 0.7 (p/11), and rl.temperature=1; set rl.temperature=0.7"),
        ({"top_p": 0.9}, "was drawn with top_p=0.9 top_k=0 (p/11), and an update knows the whole distribution"),
        ({"top_k": 5}, "was drawn with top_p=1 top_k=5 (p/11)"),
        (
            {"reward_terms": {"shaped": 0.1}},
            "has the reward shaped (p/11), and rl.reward.name=default; a replay learns",
        ),
        ({"group": 7}, "has 1 trajectories side by side of group 0, and rl.group_size=2; set it to what they were"),
    ],
)
def test_a_line_that_says_something_else_is_named(tmp_path, fields, message):
    changed(tmp_path, **fields)
    with pytest.raises(UserError) as caught:
        asyncio.run(Replay(tmp_path, RL, VOCABULARY).take())
    assert str(rollouts_path(tmp_path, 1)) in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"group": 0', "[]", "\x00", "\udcff"])
def test_a_file_that_is_damaged_is_named(tmp_path, text):
    path = tmp_path / "file.jsonl"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=f"{re.escape(str(path))} (line 1 is no trajectory|is empty)"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("rl", "vocabulary", "message"),
    [
        (replace(RL, group_size=1), 100, "has 2 trajectories side by side of group 0, and rl.group_size=1"),
        (
            replace(RL, prompts_per_step=1, minibatches=1),
            100,
            "has 2 groups, and a step learns from rl.prompts_per_step=1; raise it to what they were drawn with",
        ),
        (replace(RL, row_length=27), 100, "of 28 tokens (p/10); the limit is rl.row_length=27: raise it to 28 or more"),
        (RL, 19, "has the id 19, and model.vocab_size=19; replay it with the vocabulary of the model that drew it"),
        (
            replace(RL, steps=4),
            100,
            "has no rollouts of step 4, only of 3 steps, 1 to 3, and rl.steps=4; lower rl.steps",
        ),
    ],
)
def test_rollouts_that_a_run_cannot_learn_from_are_refused_with_the_reason(tmp_path, rl, vocabulary, message):
    write_steps(tmp_path, 3)
    with pytest.raises(UserError) as caught:
        asyncio.run(Replay(tmp_path, rl, vocabulary).take())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_rollouts(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"has no rollouts/step-000001.jsonl; give the folder of a run that had"):
            Replay(folder, RL, VOCABULARY)
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read_rollouts(tmp_path / "nowhere.jsonl")
