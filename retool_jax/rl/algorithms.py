"""Algorithms as data: each is a record of pure functions, which state their formulas and sources."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, TokenTerms
from retool_jax.rl.advantage import (
    Advantage,
    by_group,
    distilled,
    generalised,
    group_centred,
    group_relative,
    leave_one_out,
)
from retool_jax.rl.config import ClipConfig, KLConfig, RLConfig, TeacherConfig
from retool_jax.rl.loss import clipped_loss, sequence_loss, truncated_loss
from retool_jax.tools.toolbox import imported


@dataclass(frozen=True)
class Algorithm:
    """How a step learns from its scored trajectories.

    `advantage` returns columns by name, one array [T_i] for each trajectory: "advantages", and "returns" for a critic.
    A trajectory whose advantages are all 0 is left out of the policy's batch, unless the run adds a divergence or an
    entropy bonus to the loss, which act on all tokens. `loss` takes the policy's outputs for a micro-batch and the
    micro-batch with its columns, and returns the loss of each token. `models` are used beside the policy: "critic" is
    trained, "teacher" is frozen.
    """

    advantage: Advantage
    loss: Callable[[Columns, Batch, RLConfig], TokenTerms]
    aggregation: str = "token_mean"
    columns: tuple[str, ...] = ("old_logprobs", "advantages")  # those that the loss reads
    models: tuple[str, ...] = ()
    least_samples: int = 1  # the smallest rl.group_size


# DAPO is grpo with token_mean, clip.high above clip.low (both are defaults), groups.dynamic and reward.overlong_tokens.
ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(by_group(group_relative), clipped_loss, least_samples=2),
    "dr_grpo": Algorithm(by_group(group_centred), clipped_loss, aggregation="fixed", least_samples=2),
    "rloo": Algorithm(by_group(leave_one_out), clipped_loss, least_samples=2),
    "gspo": Algorithm(by_group(group_relative), sequence_loss, aggregation="sequence_token_mean", least_samples=2),
    "cispo": Algorithm(by_group(group_relative), truncated_loss, least_samples=2),
    "ppo": Algorithm(generalised, clipped_loss, models=("critic",)),
    "opd": Algorithm(
        distilled, clipped_loss, columns=("old_logprobs", "advantages", "teacher_logprobs"), models=("teacher",)
    ),
}


def algorithm_of(rl: RLConfig) -> Algorithm:
    """The algorithm that a config names: a name of `ALGORITHMS`, or my_package.my_module:MY_ALGORITHM.

    Raises:
        UserError: there is no such algorithm, or the config sets what it does not use.
    """
    name = rl.algorithm
    algorithm = _imported_algorithm(name) if ":" in name else ALGORITHMS.get(name)
    if algorithm is None:
        near = difflib.get_close_matches(name, ALGORITHMS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        if name == "dapo":
            hint = "it is grpo with rl.groups.dynamic=true; "
        raise UserError(
            f"rl.algorithm={name} is not known; {hint}there are: {', '.join(ALGORITHMS)}, and your own as"
            " my_package.my_module:MY_ALGORITHM"
        )
    if rl.group_size < algorithm.least_samples:
        raise UserError(
            f"rl.algorithm={name} compares the samples of a prompt, and rl.group_size={rl.group_size} are too few for"
            f" that; set rl.group_size={algorithm.least_samples} or more, or take rl.algorithm=ppo"
        )
    teacher = rl.teacher.init_from
    if teacher and "teacher" not in algorithm.models:
        raise UserError(
            f"rl.teacher.init_from={teacher} is a model that rl.algorithm={name} does not ask; set rl.algorithm=opd, or"
            " leave rl.teacher.init_from out"
        )
    if not teacher and "teacher" in algorithm.models:
        raise UserError(
            f"rl.algorithm={name} learns from a teacher, and rl.teacher.init_from is empty; set it to a run's folder, a"
            " Hugging Face folder or a hub id"
        )
    if "teacher" not in algorithm.models and rl.teacher != TeacherConfig() and ":" not in name:
        raise UserError(
            f"rl.algorithm={name} has no teacher, so nothing reads rl.teacher; set rl.algorithm=opd, or leave that out"
        )
    unused = [key for key in ("discount", "gae_lambda", "critic") if getattr(rl, key) != getattr(RLConfig(), key)]
    if unused and "critic" not in algorithm.models and ":" not in name:  # the user's own algorithm may read them
        raise UserError(
            f"rl.algorithm={name} has no critic, so nothing reads {' and '.join(f'rl.{key}' for key in unused)}; set"
            " rl.algorithm=ppo, or leave that out"
        )
    if not rl.kl.coefficient and rl.kl != KLConfig():
        raise UserError(
            f"rl.kl.place={rl.kl.place} and rl.kl.estimator={rl.kl.estimator} say how the divergence from the first"
            " weights counts, and with rl.kl.coefficient=0 it does not; set that above 0, or leave rl.kl out"
        )
    if rl.kl.coefficient and (rl.kl.estimator == "k1") != (rl.kl.place == "reward") and ":" not in name:
        fits = "rl.kl.estimator=k1" if rl.kl.place == "reward" else "rl.kl.estimator=k3, or k2"
        raise UserError(
            f"rl.kl.place={rl.kl.place} with rl.kl.estimator={rl.kl.estimator} does not keep the policy near the first"
            f" weights: the mean of its gradient is about 0 (docs/algorithms.md); set {fits}"
        )
    if algorithm.loss is truncated_loss and rl.clip.dual != ClipConfig.dual and ":" not in name:
        raise UserError(
            f"rl.clip.dual={rl.clip.dual} is not read with rl.algorithm={name}, whose bounds limit how much a token"
            " counts and not what it costs; leave it out"
        )
    return algorithm


def aggregation_of(rl: RLConfig, algorithm: Algorithm) -> str:
    """How token losses are averaged (`loss.aggregation_weights`): the run's setting, or else the algorithm's."""
    return rl.aggregation or algorithm.aggregation


def _imported_algorithm(name: str) -> Algorithm:
    """The user's own algorithm, from a name such as `my_package.my_module:MY_ALGORITHM`."""
    found = imported(name, "rl.algorithm")
    if not isinstance(found, Algorithm):
        raise UserError(
            f"rl.algorithm={name} is of the type {type(found).__name__}; make it a retool_jax.rl.algorithms.Algorithm"
        )
    return found
