"""The folder of an evaluation, which has a result and samples instead of metrics, and saved rollouts."""

import json

import pytest

from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.report.page import main
from retool_jax.rl.replay import rollouts_path, write_rollouts
from retool_jax.rollout.rollout import score
from retool_jax.rollout.trajectory import End, Trajectory


def test_an_evaluation_has_its_numbers_and_the_same_reader(make_run, opened, tmp_path):
    lines = (
        (make_run(tmp_path / "run", "python", 0, curves=False) / "trajectories" / "dev-000020.jsonl")
        .read_text()
        .splitlines()
    )
    folder = tmp_path / "evaluation"
    folder.mkdir()
    samples = [json.loads(line) | {"sample": 0, "split": "aime25", "step": None} for line in lines]
    lost = samples[3] | {"end": "sandbox_lost", "correct": False, "reward": None}  # and drawn again
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in [lost, *samples]))
    accuracy = {"value": 0.5, "stderr": 0.1, "low": 0.3, "high": 0.7, "problems": 20}
    result = {"set": "aime25", "samples": 1, "dropped": 0, "numbers": {"accuracy": accuracy, "recipe": {"best@1": 0.4}}}
    result |= {"problems": [{"id": "a"}], "trajectories": {"tool_rate": 0.25}, "config": {"seed": 777}}
    (folder / "result.json").write_text(json.dumps(result))
    main([f"run={folder}"])
    page = opened(folder / "report.html")
    assert "50.0 ± 10.0 %" in page.html and "30.0 to 70.0 %" in page.html
    assert "trajectories.tool_rate" in page.html and "0.250" in page.html and "777" not in page.html
    assert page.column("split") == ["aime25"] * 20 and page.column("step") == [None] * 20
    assert page.column("end").count("sandbox lost") == 0
    assert [shown["problem"] for shown in page.details] == [sample["problem"] for sample in samples]
    assert not list(folder.glob("*.png"))
    (folder / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json is not JSON"):
        main([f"run={folder}"])


def test_saved_rollouts_are_read_too(make_run, opened, tmp_path, tokenizer):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    (folder / "config.yaml").write_text("tokenizer: miniature\n")
    problem = Problem("train 7", ({"role": "user", "content": "12 * 34?"},), "408")
    trajectory = Trajectory("train 7/0", problem, end=End.ANSWERED)
    trajectory.add("prompt", tokenizer.encode("12 * 34?"))
    said = tokenizer.encode("It is \\boxed{408}")
    trajectory.add("policy", said, [-0.5] * len(said))
    score(tokenizer, [trajectory])
    write_rollouts(rollouts_path(folder, 7), [trajectory], 1)
    main([f"run={folder}"])
    page = opened(folder / "report.html")
    place = page.column("split").index("training")
    assert (page.column("step")[place], page.column("id")[place]) == (7, "train 7/0")
    assert page.details[place]["parts"] == [["reasoning", "It is \\boxed{408}", "", False]]
    assert len(page.details) == 101
