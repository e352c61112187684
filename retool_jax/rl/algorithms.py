"""Algorithms as data: each is a record of its parts, and each part a pure function with its formula and its source."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Columns, TokenTerms
from retool_jax.rl.advantage import Scored
from retool_jax.rl.config import RLConfig


@dataclass(frozen=True)
class Algorithm:
    """How a step learns from its scored trajectories.

    `advantage` gives columns by name, one array [T_i] for each trajectory: "advantages", and for a critic "returns". A
    trajectory whose advantages are all 0 is left out of the policy's batch. `loss` is of the tokens of a micro-batch,
    from the policy's outputs and the batch's columns. `models` are trained or frozen beside the policy: "critic",
    "teacher".
    """

    advantage: Callable[[Scored, RLConfig], dict[str, list[np.ndarray]]]
    loss: Callable[[Columns, Batch, RLConfig], TokenTerms]
    aggregation: str = "token_mean"
    columns: tuple[str, ...] = ("old_logprobs", "advantages")  # that the loss reads
    models: tuple[str, ...] = ()
    least_samples: int = 1  # of a prompt
