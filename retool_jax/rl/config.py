"""The config of reinforcement learning."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, LARGEST, MOST, Count, NotNegative, Positive, Share
from retool_jax.learn.config import OptimizerConfig, check_schedule
from retool_jax.rollout.config import RewardConfig

Steps = Annotated[int, Field(ge=0, le=1024)]


@dataclass(frozen=True, config=CHECKED)
class ClipConfig:
    """Bounds of the probability ratio new / old."""

    low: Share = 0.2  # the ratio may fall to 1 - low
    high: NotNegative = 0.28  # and rise to 1 + high: more room for unlikely tokens (DAPO, arXiv 2503.14476 section 3.1)
    dual: Annotated[float, Field(ge=1, le=LARGEST)] = 10.0
    """A token with negative advantage A costs at most dual * |A| (arXiv 1912.09729)."""


@dataclass(frozen=True, config=CHECKED)
class KLConfig:
    """Keeps the policy near the run's first weights, the reference; with coefficient 0 there is no such model."""

    coefficient: NotNegative = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k3"  # of a token's divergence: k1 in the reward, k2 or k3 in the loss
    place: Literal["loss", "reward"] = "loss"  # a term of the loss, or subtracted from each token's own advantage


@dataclass(frozen=True, config=CHECKED)
class CriticConfig:
    """PPO's critic: the policy's first weights with one output for the value of each token's prefix."""

    warmup_steps: Count = 0  # RL steps at the start in which only the critic learns
    value_clip: NotNegative = 0.5  # how far a value may move from the old one before its loss is clipped; 0: no clip
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclass(frozen=True, config=CHECKED)
class TeacherConfig:
    """On-policy distillation: a frozen model whose log-probabilities of the drawn tokens enter the advantage.

    A_t + c (log p_teacher - log p_old), where c is `coefficient`, or, gated by the advantage A of the answer,
    low + (high - low) sigmoid(-slope A).
    """

    init_from: str = ""  # a run or Hugging Face folder, or a hub id, with the policy's vocabulary and chat template
    form: Literal["plain", "gated"] = "plain"
    coefficient: NotNegative = 1.0  # c of the plain form
    gate_low: NotNegative = 0.0
    gate_high: NotNegative = 0.05
    gate_slope: NotNegative = 1.0

    def __post_init__(self) -> None:
        gate = ("gate_low", "gate_high", "gate_slope")
        others = gate if self.form == "plain" else ("coefficient",)
        standard = {field.name: field.default for field in dataclasses.fields(self)}
        unused = [name for name in others if getattr(self, name) != standard[name]]
        if unused:
            raise UserError(
                f"rl.teacher.{unused[0]}={getattr(self, unused[0])} is not read with rl.teacher.form={self.form}; leave"
                f" it out, or set rl.teacher.form={'gated' if self.form == 'plain' else 'plain'}"
            )


@dataclass(frozen=True, config=CHECKED)
class GroupsConfig:
    """Which prompts a step learns from."""

    dynamic: bool = False  # replace groups that are all right or all wrong by newly sampled ones (DAPO)
    refills: Positive = 10  # rounds of such sampling before a step continues with the groups that it has
    skip_solved: Count = 0  # skip a prompt after so many groups in a row in which all samples solved it; 0: never

    def __post_init__(self) -> None:
        if self.refills != GroupsConfig.refills and not self.dynamic:
            raise UserError(
                f"rl.groups.refills={self.refills} says how often groups are drawn in the place of others, and with"
                " rl.groups.dynamic=false none are; set that to true, or leave rl.groups.refills out"
            )


@dataclass(frozen=True, config=CHECKED)
class RLConfig:
    """RL with a reward on the final answer and clipped policy updates."""

    algorithm: str = "grpo"  # or dr_grpo, rloo, gspo, cispo, ppo, opd, my_package.my_module:MY_ALGORITHM
    steps: Positive = 80
    prompts_per_step: Positive = 24
    group_size: Positive = 8  # samples per prompt
    minibatches: Positive = 2  # optimiser steps per rollout and epoch; divides prompts_per_step
    epochs: Positive = 1  # passes over each step's trajectories
    max_dropped: Annotated[float, Field(ge=0, le=0.99)] = 0.5
    """Share of a step's trajectories that may be dropped (infrastructure failures) before the run stops."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Above 0, since groups need different samples. Below 0.01 the rounding of a logit changes a log-probability by
    nats, and above 100 all tokens are almost equally likely."""
    row_length: Positive = 256  # T of a packed row; at least engine.max_length
    rows_per_micro: Positive = 4  # B of a micro-batch
    share_prefixes: bool = True
    """Compute a prompt once for all its samples in a packed row, if attention_kernel is xla and that saves rows."""
    aggregation: Literal["", "token_mean", "sequence_token_sum", "sequence_token_mean", "fixed"] = ""
    """How token losses are averaged (rl/loss.py); empty: the algorithm's own way."""
    clip: ClipConfig = ClipConfig()
    entropy_coefficient: NotNegative = 0.0  # of an entropy bonus
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """Source of the old log-probabilities: recorded by the engine while sampling, or recomputed by the trainer."""
    correction: Literal["none", "token_tis", "sequence_mask", "band", "geometric"] = "none"
    """Importance weights for the difference of the two (rl/correction.py); needs old_logprobs=trainer."""
    kl: KLConfig = KLConfig()
    discount: Share = 1.0  # gamma, for PPO
    gae_lambda: Share = 1.0  # for PPO
    critic: CriticConfig = CriticConfig()
    teacher: TeacherConfig = TeacherConfig()
    reward: RewardConfig = RewardConfig()
    groups: GroupsConfig = GroupsConfig()
    ahead: Steps = 0  # steps that rollouts may run ahead of the weights that learn from them; 0 is exactly on-policy
    max_staleness: Count | None = None  # drop trajectories with tokens of weights more steps old; null: drop none
    save_rollouts: bool = False  # save each step's trajectories with all that the update needs, for replay=FOLDER
    rollout_only: bool = False  # sample and save trajectories, and train nothing
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        if self.prompts_per_step % self.minibatches:
            raise UserError(
                f"rl.prompts_per_step={self.prompts_per_step} does not divide into rl.minibatches={self.minibatches};"
                f" choose prompts_per_step as a multiple of {self.minibatches}"
            )
        if (drawn := self.steps * self.prompts_per_step * self.group_size) > MOST:
            raise UserError(
                f"rl.steps={self.steps} x rl.prompts_per_step={self.prompts_per_step} x"
                f" rl.group_size={self.group_size} are {drawn} draws, and a run has random numbers for {MOST}; lower"
                " one of them"
            )
        check_schedule(self.optimizer, "rl.optimizer")
        check_schedule(self.critic.optimizer, "rl.critic.optimizer")
        if self.groups.dynamic and self.group_size < 2:
            raise UserError(
                f"rl.groups.dynamic=true looks for prompts with right and wrong answers, and"
                f" rl.group_size={self.group_size} gives each one answer; set rl.group_size=2 or more, or"
                " rl.groups.dynamic=false"
            )
        if self.max_staleness is not None and not self.ahead:
            raise UserError(
                f"rl.max_staleness={self.max_staleness} drops what older weights drew, and with rl.ahead=0 they draw"
                " nothing; leave it out, or set rl.ahead=1 or more"
            )
        if self.correction != "none" and self.old_logprobs != "trainer":
            raise UserError(
                f"rl.correction={self.correction} compares the engine's log-probabilities with the trainer's, which"
                " rl.old_logprobs=engine does not compute; set rl.old_logprobs=trainer, or rl.correction=none"
            )
