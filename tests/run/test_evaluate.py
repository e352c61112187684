"""Checks of an evaluation's samples against its run's settings."""

import json

import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.evaluation.store import Store
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory
from retool_jax.run.build import problems_to_evaluate
from retool_jax.run.evaluate import check_asked, check_samples, complete_result, result_of, sample_keys
from retool_jax.run.load import load
from retool_jax.tools.toolbox import load_tools

PROBLEM = Problem("p", ({"role": "user", "content": "What is 2 + 4?"},), "6")
ASKED = {"set": "own", "weights": {}, "problems": "0"}


def test_a_classifier_of_ones_own_says_what_programs_are_for(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "own_purposes.py").write_text("def guess(code, context): return 'sums' if '+' in code else 'other'")
    monkeypatch.syspath_prepend(tmp_path)
    trajectory = Trajectory("p/0", PROBLEM, end=End.ANSWERED)
    trajectory.add("prompt", tokenizer.encode("What is 2 + 4?"))
    trajectory.add("policy", tokenizer.encode("6"), [-0.5])
    trajectory.tool_uses.append(ToolUse(0, "print(2 + 4)", "success", "6", 0.5, 0.25, "code_interpreter"))
    trajectory.verdict, trajectory.reward = Verdict(True, "6", "integer"), 1.0
    found = {}
    with Store(tmp_path) as store:
        store.add([trajectory.record(tokenizer, group=0, sample=0)])
        for name in ("rules", "own_purposes:guess"):
            run = load(["config=eval", "evaluation.samples=1", f"evaluation.purposes={name}"])
            found[name] = result_of(run, [PROBLEM], store, ASKED, tokenizer)["trajectories"]
    assert found["rules"]["behaviour/purpose/calculation"] == 1.0
    assert found["own_purposes:guess"]["behaviour/purpose/sums"] == 1.0


def test_what_is_damaged_in_a_folder_is_made_again_or_named(tmp_path):
    whole = {"set": "s", "samples": 1, "problems": [], "numbers": {}, "dropped": 0}
    numbers = dict.fromkeys(("turns_mean", "calls_per_sample", "response_tokens", "checker_timeouts"), 1)
    numbers |= {"tool_rate": 0.5, "tool_success": None} | {f"end/{end}": 0 for end in End}
    whole |= {"strict_differs": {"count": 0, "share": 0.0}, "trajectories": numbers}
    for text, there in (
        (json.dumps(whole), whole),
        (json.dumps(whole | {"dropped": 1}), None),
        ('{"set":', None),
        ("[]", None),
        ("[" * 100_000, None),
        (json.dumps(whole | {"numbers": {"accuracy": {"value": "high", "stderr": None}}}), None),
        (json.dumps(whole | {"strict_differs": [0]}), None),
        (json.dumps(whole | {"trajectories": numbers | {"turns_mean": None}}), None),
        (json.dumps({key: value for key, value in whole.items() if key != "trajectories"}), None),
    ):
        (tmp_path / "result.json").write_text(text)
        assert complete_result(tmp_path) == there
    for text in ("", "[]", "null", '{"weights": {}}'):
        (tmp_path / "asked.json").write_text(text)
        with pytest.raises(UserError, match=r"asked.json cannot be read .*; restore it, or choose another run=FOLDER"):
            check_asked(tmp_path, ASKED)


def test_a_sample_that_nobody_asked_for_is_named_before_anything_is_drawn(tmp_path):
    for group, sample in ((1, 2), (7, 0)):
        (folder := tmp_path / str(group)).mkdir()
        said = (
            f"samples.jsonl has sample {sample} of group {group}, and groups count from 0 up to 1, their samples up to"
        )
        with Store(folder) as store:
            there = ((0, 0), (group, sample))
            store.add([{"group": g, "sample": s, "end": "answered", "correct": True} for g, s in there])
            with pytest.raises(UserError, match=said):
                check_samples(tmp_path, store, sample_keys(2, 2))


def test_prompts_that_do_not_ask_for_a_box_are_counted(tokenizer, tmp_path, capsys):
    """DAPO-Math-17k's own prompts name a box only to say that none is needed."""
    asked = {
        "dapo": 'What is 2 + 4? Put your answer on its own line after "Answer:", and you do not need to use a'
        " \\boxed command.",
        "box": "What is 2 + 5? Answer in \\boxed{}.",
        "plain": "What is 2 + 6?",
    }
    told = {}
    for names in (("dapo", "box", "plain"), ("box",)):
        rows = [
            {"prompt": [{"role": "user", "content": asked[name]}], "reward_model": {"ground_truth": "6"}}
            for name in names
        ]
        (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for grammar in ("hermes", "retool"):
            words = [f"rollout.grammar={grammar}", "rollout.max_prompt_tokens=4000", "engine.max_length=4096"]
            run = load(["config=eval", f"data.source={tmp_path / 'set.jsonl'}", "evaluation.problems=0", *words])
            problems_to_evaluate(run, tokenizer, load_tools(run.tools))
            told[names, grammar] = capsys.readouterr().out
    assert "data: 2 of the 3 prompts of data.source=" in told[("dapo", "box", "plain"), "hermes"]
    assert {text for key, text in told.items() if key != (("dapo", "box", "plain"), "hermes")} == {""}
