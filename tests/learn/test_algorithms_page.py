"""The worked example of docs/algorithms.md runs, and does what the page says."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"


@pytest.fixture(scope="module")
def page() -> dict:
    """Names of the page's code after all of it has run."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict = {"__name__": "algorithms_page"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    return names


def test_its_advantage_is_the_reward_minus_the_mean_of_the_others(page):
    rewards = np.array([0.5, -1.0, 2.0])
    expected = [0.5 - (-1.0 + 2.0) / 2, -1.0 - (0.5 + 2.0) / 2, 2.0 - (0.5 - 1.0) / 2]
    np.testing.assert_allclose(page["leave_one_out"](rewards), expected)


def test_its_loss_makes_the_right_answer_likelier(page):
    history = page["history"]
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    assert {"loss", "entropy", "truncated", "grad_norm", "learning_rate"} == history[0].keys()
    assert history[0]["truncated"] == 0.0 and history[-1]["truncated"] == 0.25, "one of the four tokens"
    assert int(page["state"].step) == len(history)
