"""Names that tell runs apart."""

from retool_jax.report.runs import config_labels, with_defaults


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


def test_a_key_that_is_newer_than_a_run_has_its_default():
    old, new = {"task": "grpo", "rl": {"steps": 80}}, {"task": "grpo", "rl": {"steps": 80, "ahead": 0}}
    assert config_labels([with_defaults(old), with_defaults(new)], ["a", "b"]) == ["a", "b"]
    ahead = {"task": "grpo", "rl": {"steps": 80, "ahead": 1}}
    assert config_labels([with_defaults(old), with_defaults(ahead)], ["a", "b"]) == ["rl.ahead=0", "rl.ahead=1"]
