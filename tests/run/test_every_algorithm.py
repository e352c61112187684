"""Every algorithm from its words to its last step: it learns, it resumes, it can be trained from files."""

import json
import shutil
from pathlib import Path

import pytest

from retool_jax.convert import convert
from retool_jax.metrics import read_metrics

SHORT = ("rl.steps=4", "evaluation.every=0")
# PPO is the run of the fixture `alone`.
KINDS = {
    # With all that a run may add to its loss and its data.
    "opd": [
        *("rl.algorithm=opd", "rl.old_logprobs=trainer", "rl.correction=token_tis", "rl.epochs=2"),
        *("rl.groups.dynamic=true", "rl.kl.coefficient=0.01", "rl.entropy_coefficient=0.001"),
    ],
    "ahead": ["rl.ahead=1"],
}
# What each writes beside the numbers of grpo.
OWN = {
    "ppo": {"critic/value_loss", "critic/explained_variance"},
    "opd": {"teacher_kl", "mismatch_ess", "correction_share", "kl", "groups/refills"},
    "ahead": {"staleness/max"},
}


@pytest.mark.parametrize("kind", OWN)
def test_an_algorithm_learns_and_resumes(train, comparable, undefined, runs, drawn, alone, with_critic, kind):
    if kind == "ppo":
        whole, words = alone, with_critic
    else:
        teacher = [f"rl.teacher.init_from={shutil.copytree(drawn, runs / 'teacher')}"] if kind == "opd" else []
        whole, words = runs / kind, [*SHORT, *KINDS[kind], *teacher]
        output = train(whole, *words)
        assert "error:" not in output, output
    lines = [line for line in read_metrics(whole) if line["kind"] == "rl"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert undefined({name for line in lines for name in line}) == set()
    assert OWN[kind] <= set.intersection(*(set(line) for line in lines))
    assert sum(line.get("grad_norm", 0) > 0 for line in lines) >= 2, "it must have learned something"
    if kind == "ppo":
        assert "loss" not in lines[0] and "loss" in lines[1], "in the warm-up the critic alone learns"
    if kind == "ahead":
        assert max(line["staleness/max"] for line in lines) == 1
    # As a kill in the last step but one leaves it.
    broken = Path(shutil.copytree(whole, runs / f"{kind}-broken"))
    for path in (broken / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > 2:
            shutil.rmtree(path)
    (broken / "summary.json").unlink()
    assert "from step 2 of 4" in train(broken, *words)
    if kind == "opd":
        (broken / "summary.json").unlink()
        for folder in (broken, runs / "teacher"):
            shutil.rmtree(max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)))
        said = f"error: rl.teacher.init_from={runs / 'teacher'} holds other weights than when {broken} began to learn"
        assert said in train(broken, *words)
    if kind != "ahead":  # there the weights that a token is drawn with depend on the clock
        kept = [line for line in comparable(broken) if line["kind"] == "rl"]
        assert kept == [line for line in comparable(whole) if line["kind"] == "rl"]


def test_a_run_is_trained_again_from_its_rollouts_without_engine_and_sandbox(train, comparable, runs, drawn):
    output = train(runs / "again", "rl.steps=2", "evaluation.every=0", f"replay={drawn}")
    assert "no engine, no sandbox" in output
    lines = [line for line in comparable(drawn) if line["kind"] == "rl"]  # which also say how they were drawn
    there = [{k: v for k, v in line.items() if not k.startswith("groups/")} for line in lines]
    assert comparable(runs / "again") == there and there[-1]["grad_norm"] > 0
    # A step that went wrong is taken again from the checkpoint before it.
    folder = Path(shutil.copytree(drawn, runs / "taken-again"))
    shutil.rmtree(folder / "checkpoints" / "2")
    (folder / "summary.json").unlink()
    output = train(folder, "rl.steps=2", "evaluation.every=0", "rl.save_rollouts=true", f"replay={folder}")
    assert "from step 0 of 2" in output and [x for x in comparable(folder) if x["kind"] == "rl"] == there
    output = train(runs / "further", "rl.steps=3", "evaluation.every=0", f"replay={drawn}")
    assert "error:" in output and "3" in output


def test_rollouts_can_be_made_alone_and_trained_from_later(train, comparable, runs, drawn):
    made = runs / "made"
    train(made, "rl.steps=1", "evaluation.every=0", "rl.rollout_only=true")
    (line,) = [line for line in comparable(made) if line["kind"] == "rl"]
    assert "loss" not in line and line["accuracy"] > 0
    first = [json.loads(text)["ids"] for text in (made / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    same = [json.loads(text)["ids"] for text in (drawn / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert first == same


def test_the_policy_of_a_run_with_a_critic_is_converted_like_any_other(alone, tmp_path):
    convert(str(alone), tmp_path / "model", None, None)
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "model").iterdir()}
    shutil.rmtree(tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rl.algorithm=grop"], "grpo"),
        (["rl.algorithm=opd"], "rl.teacher.init_from"),
        (["rl.algorithm=grpo", "rl.group_size=1"], "rl.group_size"),
        (["rl.reward.name=recipee"], "recipe"),
        (["replay=there", "rl.rollout_only=true"], "leave one of them out"),
        (["replay=/nowhere"], "/nowhere has no rollouts"),
        (["rl.correction=band"], "rl.old_logprobs=trainer"),
        (["rl.algorithm=opd", "rl.teacher.init_from=/nowhere"], "no checkpoint at /nowhere"),
    ],
)
def test_what_cannot_mean_anything_is_refused_before_anything_is_written(train, runs, words, said):
    output = train(runs / "refused", *words)
    assert "error:" in output and said in output
    assert not (runs / "refused").exists()
