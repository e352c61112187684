"""Settings of the evaluations during a run, and of how the evaluation command samples."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, Positive

MOST_PROBLEMS, MOST_SAMPLES = 1 << 18, 1 << 12  # each sample of each problem has its random stream, see `request_of`
# Samples of each problem, temperature and top-p with which others report their numbers.
PRESETS: dict[str, dict[str, float]] = {
    "recipe": {"samples": 30, "temperature": 1.0, "top_p": 0.6},  # verl-recipe, retool/run_qwen2-32b_dapo.sh
    "paper": {"samples": 32, "temperature": 1.0, "top_p": 0.7},  # ReTool, arXiv 2504.11536
    "open": {"samples": 16, "temperature": 1.0, "top_p": 1.0},  # slime and miles, their ReTool examples
    "greedy": {"samples": 1, "temperature": 0.0, "top_p": 1.0},
}
OWN = {"samples": 8, "temperature": 1.0, "top_p": 1.0}  # without a preset
SAMPLES, RESULT = "samples.jsonl", "result.json"  # in an evaluation's folder: each trajectory, and their numbers


@dataclass(frozen=True, config=CHECKED)
class EvaluationConfig:
    """Accuracy on held-out problems, sampled at temperature 1 and greedily."""

    every: Count = 10  # RL steps between evaluations of the dev split; 0: none
    problems: Annotated[int, Field(ge=1, le=MOST_PROBLEMS)] = 256
    answer_tokens: Count = 256  # as rollout.answer_tokens, which is for training
    purposes: str = "rules"  # names the purpose of programs: rules, or my_package.my_module:my_classifier
    final_split: Literal["dev", "test"] = "test"  # for the table before and after RL; use dev while tuning


@dataclass(frozen=True, config=CHECKED)
class SampledConfig:
    """How an evaluation samples. A value that is not set is filled in from the preset."""

    preset: Literal["", "recipe", "paper", "open", "greedy"] = ""
    """How others sample: recipe (30, top-p 0.6), paper (32, top-p 0.7), open (16), each at temperature 1, or greedy."""
    problems: Annotated[int, Field(ge=0, le=MOST_PROBLEMS)] = 0  # only the first N of the set; 0: all
    samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None  # of each problem; null: the preset's, or 8
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 is greedy; otherwise at least 0.01, as rl.temperature; null: the preset's, or 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None  # 1 is off; null: the preset's, or 1
    top_k: Count = 0  # only the k most likely tokens; 0 is off
    pass_k: tuple[Positive, ...] = ()  # the k of pass@k and maj@k; empty: 1, 2, 4, ... and all samples
    purposes: str = "rules"  # names the purpose of programs: rules, or my_package.my_module:my_classifier
    max_dropped: Annotated[float, Field(ge=0, le=0.99)] = 0.1
    """If the machinery loses a larger share of samples, each of them twice, the evaluation ends with an error."""

    def __post_init__(self) -> None:
        for key, value in (PRESETS[self.preset] if self.preset else OWN).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        if 0 < self.temperature < 0.01:
            raise UserError(
                f"evaluation.temperature={self.temperature} must be 0, which is greedy, or between 0.01 and 100: below"
                " 0.01 the rounding of logits decides"
            )
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"evaluation.samples={self.samples} at evaluation.temperature=0 would all be the same; set"
                " evaluation.samples=1, or a temperature above 0"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise UserError(
                f"evaluation.top_p={self.top_p} and evaluation.top_k={self.top_k} limit which tokens can be drawn, but"
                " at evaluation.temperature=0 nothing is drawn; leave them out, or set a temperature above 0"
            )
        if above := [k for k in self.pass_k if k > self.samples]:
            raise UserError(
                f"evaluation.pass_k={above[0]} is above evaluation.samples={self.samples}, the samples of a problem;"
                " lower it, or draw more"
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k and maj@k, ascending."""
        powers = {1 << i for i in range(self.samples.bit_length())}
        return tuple(sorted(set(self.pass_k) or powers | {self.samples}))
