"""What a verdict is worth."""

from retool_jax.answers import Verdict
from retool_jax.rl.reward import reward_of


def test_reward_is_plus_or_minus_one():
    assert reward_of(Verdict(True, "42", "integer")) == 1.0
    assert reward_of(Verdict(False, None, "no_box")) == -1.0
    assert reward_of(Verdict(False, "x", "undecided")) == -1.0
