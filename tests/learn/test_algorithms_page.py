"""The example of docs/algorithms.md runs, and does what the page says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from retool_jax.learn.step import Outputs
from retool_jax.rl.algorithms import ALGORITHMS, Algorithm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"


@pytest.fixture(scope="module")
def page() -> dict:
    """The names that the page's code defines."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict = {"__name__": "algorithms_page"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    return names


def test_its_record_is_an_algorithm_whose_advantage_is_the_reward_minus_the_mean(page):
    assert isinstance(page["REINFORCE"], Algorithm)
    advantages = page["REINFORCE"].advantage(page["scored"], page["rl"])["advantages"]
    np.testing.assert_allclose(advantages, [[0, 0, 0, 1.5], *[[0, 0, 0, -0.5]] * 3])


def test_its_loss_makes_the_right_answer_likelier(page):
    history = page["history"]
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert {"loss", "entropy", "clip_fraction", "mismatch_k3", "grad_norm", "learning_rate"} <= history[0].keys()
    assert history[-1]["loss"] < history[0]["loss"]
    assert int(page["state"].step) == len(history)
    micro = jax.tree.map(lambda x: x[0] if x.ndim else x, page["batch"])
    logprobs = np.asarray(Outputs(page["model"]).of(page["state"].params, micro)["logprobs"])
    right, wrong = (logprobs[micro.sampled & np.isin(micro.tokens, answers)] for answers in ((5,), (6, 7, 8)))
    assert np.exp(right).min() > 2 / 16 > 0.5 / 16 > np.exp(wrong).max()


def test_it_tells_of_every_algorithm_and_of_what_each_has(page):
    text = PAGE.read_text()
    for name, algorithm in ALGORITHMS.items():
        assert f"\n## {name}\n" in text
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert f"`{algorithm.aggregation}`" in row
        assert ("2 samples" in row) == (algorithm.least_samples == 2)
        assert ("critic" in row, "teacher" in row.split("|")[-2]) == tuple(
            model in algorithm.models for model in ("critic", "teacher")
        )
