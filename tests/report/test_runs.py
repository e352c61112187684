"""Names that tell runs apart."""

from retool_jax.report.runs import config_labels


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
