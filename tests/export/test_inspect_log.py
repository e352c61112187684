"""Inspect reads back what we write for it; without Inspect the command says what to install."""

import sys

import pytest

from retool_jax.errors import UserError
from retool_jax.export.command import main


def test_without_the_package_its_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(UserError, match=r"pip install 'retool_jax\[inspect\]'"):
        main([f"run={run}", f"out={tmp_path / 'x.eval'}", "format=inspect"])
    assert not list(tmp_path.iterdir())


def test_inspect_reads_its_log(run, hostile, tmp_path):
    log = pytest.importorskip("inspect_ai.log", reason="inspect-ai is not installed: pip install -e '.[inspect]'")
    for ending in ("eval", "json"):
        out = tmp_path / f"x.{ending}"
        main([f"run={run}", f"out={out}", "format=inspect", "step=5", "greedy=false"])
        read = log.read_eval_log(str(out))
        assert (read.status, read.eval.task, read.eval.model) == ("success", "dev-000005", "retool_jax/mine")
        assert read.results.scores[0].metrics["accuracy"].value == 1.0 and read.results.completed_samples == 1
        right, lost = read.samples
        assert (right.scores["retool_jax"].value, right.target, right.input[0].text) == ("C", "408", "12*34?")
        assert [message.role for message in right.messages][:3] == ["user", "assistant", "tool"]
        assert right.messages[1].tool_calls[0].arguments == {"code": "print(12 * 34)"}
        assert right.messages[2].text == "408" and right.messages[-1].text == "It is \\boxed{408}."
        assert not lost.scores and lost.error.message == "sandbox_lost: worker lost"
        main([f"run={hostile}", f"out={out}", "format=inspect"])
        (sample,) = log.read_eval_log(str(out)).samples
        assert sample.messages[2].text.startswith("a\x00b") and sample.target == "6"
        with pytest.raises(
            UserError, match="holds one evaluation, and there are more of them: dev-000000, dev-000000-g"
        ):
            main([f"run={run}", f"out={out}", "format=inspect", "step=0"])
        assert log.read_eval_log(str(out)).samples[0].target == "6", "the old file stays"
        out.unlink()
        assert list(tmp_path.iterdir()) == []
