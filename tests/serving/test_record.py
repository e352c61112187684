"""A server's answers become training data: recorded, judged, grouped, trained on."""

import asyncio
import contextlib
import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from retool_jax.engine.engine import Engine
from retool_jax.errors import UserError
from retool_jax.metrics import read_metrics
from retool_jax.models.huggingface import save_params
from retool_jax.rl.replay import read_rollouts, rollouts_path
from retool_jax.serving import sessions
from retool_jax.tokens.tokenizer import MINIATURE

QUESTION = {"role": "user", "content": "What is gcd(12, 18)?"}


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    """The tiny model, in the shape of test_load.py's."""
    return make_engine(tool_lag=-1, token_buckets=(64,))


def body(seed: int, **fields: Any) -> dict:
    return {"messages": [QUESTION], "seed": seed, "max_tokens": 12, "n": 2} | fields


def record(serve: Any, engine: Any, folder: Path, *bodies: dict) -> tuple[list[str], list[dict]]:
    """Ask for answers while they are recorded: their ids, and the conversations as the server returns them."""

    async def main() -> tuple[list[str], list[dict]]:
        async with serve(engine, record=str(folder)) as client:
            names = [(await client.ask(each))["id"] for each in bodies]
            kept = [name for name, each in zip(names, bodies, strict=True) if each.get("store", True)]
            return names, [one for name in kept for one in (await client.get(f"/v1/trajectories/{name}"))["data"]]

    return asyncio.run(main())


def judge(folder: Path, *lines: dict) -> Path:
    path = folder / "rewards.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(folder: Path, *words: str) -> Path:
    out = folder / "made"
    files = [f"record={folder}", f"rewards={folder / 'rewards.jsonl'}", f"out={out}"]
    sessions.main([*files, "group_size=2", "prompts_per_step=2", *words])
    return out


# Trains at another temperature, which is refused, and then as it is right.
TRAIN = """
import json, pathlib, sys
from retool_jax import train
from retool_jax.errors import UserError
words = json.loads(sys.argv[1])
try:
    train.main([*words, "rl.temperature=0.5"])
except UserError as error:
    print(error)
folder = next(word.removeprefix("run=") for word in words if word.startswith("run="))
print("something" if pathlib.Path(folder).exists() else "nothing", "was written", flush=True)
train.main(words)
"""


def test_recorded_conversations_make_a_training_step(serve, engine, model, params, one_device, tmp_path):
    engine.take_over()
    bodies = body(7), body(8), body(9, temperature=0), body(10, top_p=0.5), body(11), body(12, store=False)
    names, told = record(serve, engine, tmp_path, *bodies)
    lines = (tmp_path / "sessions.jsonl").read_text().splitlines()
    assert [json.loads(line)["session"] for line in lines] == [name for name in names[:5] for _ in range(2)]
    with (tmp_path / "sessions.jsonl").open("a") as file:
        file.write(lines[0][:50])  # as a kill leaves it
    rewards = [{"session": names[0], "choice": 0, "reward": 1}, {"session": names[0], "choice": 1, "reward": -0.5}]
    rewards += [{"session": names[1], "answer": "6"}, *({"session": name, "reward": 1} for name in names[2:4])]
    rewards += [{"session": names[0], "choice": 2, "reward": 1}, {"session": names[5], "reward": 1}]  # not recorded
    judge(tmp_path, *rewards)
    # Not capsys, under which uvicorn, when it sets up its log, has absl close pytest's stderr.
    with contextlib.redirect_stdout(io.StringIO()) as output:
        out = make(tmp_path)
    said = output.getvalue()
    assert "4 sessions in 2 groups and 1 steps" in said and "2 left out: nobody judged them" in said
    assert "4 left out: drawn greedily, with top_p or with top_k" in said and "1 left out: no whole line" in said
    assert "2 left out: judgements of what is not in the record, as " in said
    assert f"replay={out} rl.group_size=2 rl.steps=1 rl.temperature=1.0" in said
    made = read_rollouts(rollouts_path(out, 1))
    assert [t.ids for t in made] == [one["ids"] for one in told[:4]]
    assert [t.versions for t in made] == [one["versions"] for one in told[:4]]
    assert [t.reward for t in made] == [1.0, -0.5, -1.0, -1.0], "of the last two nothing stands in a box"
    assert [t.temperature for t in made] == [1.0] * 4

    save_params(model, params, tmp_path / "tiny", MINIATURE)
    words = [f"init_from={tmp_path / 'tiny'}", f"replay={out}", f"run={tmp_path / 'run'}", "logger=none"]
    words += ["rl.rows_per_micro=2", "rl.group_size=2", "rl.prompts_per_step=2"]
    words += ["rl.minibatches=1", "rl.steps=1", "evaluation.every=0"]
    program = [sys.executable, "-c", TRAIN, json.dumps(["config=grpo", *words])]
    done = subprocess.run(program, env=one_device, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    refused, nothing = next(pair for pair in pairwise(done.stdout.splitlines()) if "was drawn at" in pair[0])
    assert "at temperature 1 " in refused and "rl.temperature=0.5; set rl.temperature=1" in refused
    assert nothing == "nothing was written"
    (line,) = [each for each in read_metrics(tmp_path / "run") if each["kind"] == "rl"]
    drawn = [sum(t.sampled) for t in made]
    assert line["step"] == 1 and line["logprob_diff_mean"] < 1e-3 and min(drawn) > 0


def test_responses_whose_turns_were_drawn_in_different_ways_are_left_out(serve, scripted, tmp_path):
    scripted_turns = scripted({7: ["Six.<|im_end|>"] * 5})

    async def main() -> list[str]:
        async with serve(scripted_turns, record=str(tmp_path)) as client:

            async def name_of(temperature: float, previous: str | None = None) -> str:
                asked = {"input": "And now?", "seed": 7, "temperature": temperature, "previous_response_id": previous}
                return (await client.ask(asked, "/v1/responses"))["id"]

            greedy, warm = await name_of(0), await name_of(1)
            mixed = await name_of(1, greedy)
            return [greedy, warm, mixed, await name_of(1, mixed), await name_of(1, warm)]

    judge(tmp_path, *({"session": name, "reward": 1} for name in asyncio.run(main())))
    with contextlib.redirect_stdout(io.StringIO()) as output:  # not capsys, as above
        out = make(tmp_path, "group_size=1")
    made, said = read_rollouts(rollouts_path(out, 1)), output.getvalue()
    assert [(t.temperature, t.turns) for t in made] == [(1, 1), (1, 2)]
    assert "2 left out: whose turns were drawn in different ways" in said and "1 left out: drawn greedily" in said


def test_a_torn_line_does_not_spoil_the_next_one(serve, scripted, tmp_path):
    (tmp_path / "sessions.jsonl").write_text('{"session": "half')
    turns = {7: ["Six.<|im_end|>"]}
    names, _ = record(serve, scripted(turns), tmp_path, body(7, n=1, max_tokens=50))
    lines = (tmp_path / "sessions.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["session"] == names[0]


def test_sessions_of_another_tokenizer_are_told(serve, scripted, tmp_path):
    (name,), _ = record(serve, scripted({7: ["Six.<|im_end|>"]}), tmp_path, body(7, n=1, max_tokens=50))
    path = tmp_path / "sessions.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"ids": [40_000, *line["ids"][1:]]}) + "\n")
    judge(tmp_path, {"session": name, "answer": "6"})
    with pytest.raises(UserError, match=r"has the id 40000, and the tokenizer has ids up to \d+; set tokenizer=FOLDER"):
        make(tmp_path, "group_size=1")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 1 is no reward (Expecting"),
        ('{"session": "a"}', 'it needs a "session", and either a "reward" or an "answer"'),
        ('{"session": "a", "reward": 1, "answer": "6"}', "either"),
        ('{"session": "a", "reward": NaN}', "the reward is nan, and must be finite"),
        ('{"session": "a", "reward": "much"}', "could not convert"),
        (
            '{"session": "b", "reward": 1}',
            "no 2 judged sessions of one prompt (1 left out: judgements of what is not in the record, as b); lower",
        ),
        (
            '{"session": "b", "answer": "6\u2028"}',
            "has no 2 judged sessions of one prompt (1 left out: judgements of what",
        ),
    ],
)
def test_rewards_that_say_something_else_are_named(tmp_path, line, told):
    (tmp_path / "sessions.jsonl").write_text("")
    (tmp_path / "rewards.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        make(tmp_path)
    assert told in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_wrong_words_and_folders_are_told(tmp_path):
    for words, told in (
        (["record=x"], "rewards is empty; set rewards=..."),
        (["recrd=x"], "did you mean record=...?"),
        (["record=x", "rewards=y", "out=z", "group_size=0"], "group_size is 0; it must be at least 1"),
    ):
        with pytest.raises(UserError) as caught:
            sessions.main(words)
        assert told in str(caught.value)
    judge(tmp_path, {"session": "a", "reward": 1})
    with pytest.raises(UserError, match=r"cannot read .*sessions.jsonl .*; give the folder of serve.record"):
        make(tmp_path)
    (tmp_path / "made" / "rollouts").mkdir(parents=True)
    with pytest.raises(UserError, match="has rollouts/ already; choose another folder"):
        make(tmp_path)


def test_a_folder_that_cannot_be_written_is_told_at_the_start(serve, scripted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write serve.record=.*; choose a folder that can be written"):
        record(serve, scripted({}), tmp_path / "file")
