"""What a run may set of its looks at held-out problems."""

from typing import Literal

from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED, Count, Positive


@dataclass(frozen=True, config=CHECKED)
class EvaluationConfig:
    """Accuracy on held-out problems, sampled at temperature 1 and greedily."""

    every: Count = 10  # RL steps between looks at the dev split; 0 never looks
    problems: Positive = 256
    answer_tokens: Count = 256  # as rollout.answer_tokens, which is training's
    purposes: str = "rules"  # who says what a program is for: rules, or my_package.my_module:my_classifier
    final_split: Literal["dev", "test"] = "test"  # for the table before and after RL; use dev while tuning
