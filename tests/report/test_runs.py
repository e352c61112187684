"""Labels that distinguish runs, and the errors for damaged folders."""

import json
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.report.runs import Run, config_labels, load_runs, setting_labels, with_defaults
from retool_jax.report.trajectories import Source, read_records, sources_of


def test_labels_are_what_differs():
    def labels(*configs):
        return config_labels(configs, [f"run{index}" for index in range(len(configs))])

    base = {"tools": "python", "seed": 0, "out": "runs/a", "rl": {"clip": 0.2, "turns": 2}}
    assert labels(base) == ["run0"]
    assert labels(base, base) == ["run0", "run1"]
    assert labels(base, base | {"seed": 1, "out": "runs/b"}) == ["seed 0", "seed 1"]
    text_only = base | {"tools": "none", "rl": {"clip": 0.2, "turns": 1}}
    assert labels(base, text_only) == ["with tool (tools=python)", "text only (tools=none)"]
    assert labels(base, base | {"rl": {"clip": 0.3, "turns": 2}})[1] == "rl.clip=0.3"
    cold = [{"sft": {"optimizer": {"decay_steps": steps}, "steps": steps}} for steps in (1, 9)]
    assert labels(*cold) == ["sft.steps=1", "sft.steps=9"], "of keys that tell the same, the one with fewer parts"


def test_a_key_that_tells_fewer_runs_apart_than_another_is_left_out():
    configs = [{"head": False, "rl": {"algorithm": "ppo"}}, {"head": False, "rl": {"algorithm": "grpo"}}, {"rl": {}}]
    labels = ["rl.algorithm=ppo", "rl.algorithm=grpo", "no rl.algorithm"]
    assert config_labels(configs, ["a", "b", "c"]) == labels
    seeds = [config | {"seed": seed} for config in configs for seed in (0, 1)]
    assert config_labels(seeds, list("abcdef"))[:3] == [
        f"{labels[0]}, seed 0",
        f"{labels[0]}, seed 1",
        f"{labels[1]}, seed 0",
    ]


def test_runs_of_one_setting_differ_by_their_seed_alone():
    base = {"run": "runs/a", "seed": 0, "tools": "python", "init_from": "", "data.train": "sets/a.jsonl", "rl.lr": 1}
    more = {"run": "runs/b", "seed": 1}
    assert setting_labels([base, base | more]) == ["", ""]
    own = [base | {"init_from": "runs/sft0"}, base | more | {"init_from": "runs/sft1"}]
    assert setting_labels(own) == ["", ""], "a cold start for each seed"
    assert setting_labels([*own, base | {"init_from": "runs/other"}]) == [
        "init_from=runs/sft0",
        "init_from=runs/sft1",
        "init_from=runs/other",
    ]
    text = [{**config, "tools": "none", "init_from": f"{config['init_from']}_text"} for config in own]
    assert len(set(setting_labels([*own, *text]))) == 2
    labels = ["data.train=sets/a.jsonl", "data.train=sets/b.jsonl"]
    assert setting_labels([base, base | more | {"data.train": "sets/b.jsonl"}]) == labels
    ablations = [base, *(base | {key: 9} for key in ("rl.a", "rl.b", "rl.c", "rl.lr", "tools"))]
    labels = ["as most runs", "rl.a=9", "rl.b=9", "rl.c=9", "rl.lr=9", "tools=9"]
    assert setting_labels(ablations) == labels, "each changes another key"


def test_a_key_that_is_newer_than_a_run_has_its_default():
    old, new = {"task": "grpo", "rl": {"steps": 80}}, {"task": "grpo", "rl": {"steps": 80, "ahead": 0}}
    assert config_labels([with_defaults(old), with_defaults(new)], ["a", "b"]) == ["a", "b"]
    ahead = {"task": "grpo", "rl": {"steps": 80, "ahead": 1}}
    assert config_labels([with_defaults(old), with_defaults(ahead)], ["a", "b"]) == ["rl.ahead=0", "rl.ahead=1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "task: grpo\nrl: {steps", "cannot read .*config.yaml: "),
        ("config.yaml", "- a\n", "cannot read .*config.yaml: expected keys and values"),
        ("config.yaml", "\0", "cannot read .*config.yaml: "),
        ("metrics.jsonl", '[1]\n{"kind": "rl", "step": 1}\n', r"line 1 is no record \(it is a list and must be an obj"),
        ("metrics.jsonl", '{"kind": "rl"}\n', r"line 1 is no record \(it has no step\); mend or remove that"),
        ("metrics.jsonl", '{"kind": "rl", "step": 1.5}\n', r"line 1 is no record \(step is 1.5 and must be a whole"),
        (
            "metrics.jsonl",
            '{"kind": "eval", "step": 0, "accuracy": "high"}\n',
            r"y is \"high\" and must be null or",
        ),
        ("metrics.jsonl", '{"kind": "rl", "step": 1, "end/answered": Infinity}\n', "end/answered is Infinity and must"),
        (
            "summary.json",
            '{"before": {"accuracy": [1]}}',
            r"summary.json is not .* \(before.accuracy is a list",
        ),
        ("summary.json", "[]", r"summary.json is not as a run writes it \(it is a list and must be an object\); mend"),
        ("summary.json", '{"seconds": {"rollout": null}}', r"seconds.rollout is null and must be a finite number"),
        ("metrics.jsonl", '{"kind"\n{"kind": "rl", "step": 1}\n', "line 1 is not JSON .*; remove that line"),
        ("metrics.jsonl", "\n\n", "metrics.jsonl is empty; start or resume the run"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, name, text, message):
    (tmp_path / "metrics.jsonl").write_text('\n{"kind": "rl", "step": 1, "accuracy": 0.5}\n{"kind": "r')
    (run,) = load_runs([tmp_path])
    assert run.records == [{"kind": "rl", "step": 1, "accuracy": 0.5}]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_runs([tmp_path])


def test_an_evaluation_that_is_not_complete_is_told_as_one(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match=r"the evaluation in .* is not complete; start its command again"):
        load_runs([tmp_path])


def test_a_line_that_is_no_trajectory_is_named(tmp_path):
    path = tmp_path / "dev-000000.jsonl"
    for line in ("[1]", json.dumps({"id": "a"})):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=r"dev-000000.jsonl line 1 is no trajectory \(.*; mend or remove that"):
            list(read_records(Source(0, path, 1), "none"))


def test_files_beside_saved_rollouts_are_passed_over(tmp_path):
    (tmp_path / "rollouts").mkdir()
    for name in ("step-000002.jsonl", "step-000002 (copy).jsonl", "step-.jsonl", "step-x.jsonl"):
        (tmp_path / "rollouts" / name).write_text("")
    assert [source.step for source in sources_of([Run(Path(tmp_path), [], {}, False, "", "")])] == [2]
