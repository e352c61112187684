"""Scored trajectories to new weights:

old log-probs (the engine's, or the trainer's), values, teacher, reference -> advantage -> batches -> updates
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from retool_jax.learn.optimizer import TrainState
from retool_jax.learn.packing import Batch, Example
from retool_jax.learn.scorer import Scorer
from retool_jax.learn.step import Step
from retool_jax.models.decoder import Params
from retool_jax.rl.algorithms import Algorithm, aggregation_of
from retool_jax.rl.batches import batches_of, kept_and_groups, scored_of
from retool_jax.rl.config import RLConfig
from retool_jax.rl.correction import correction, correction_numbers
from retool_jax.rl.loss import acts_on_all_tokens
from retool_jax.rollout.trajectory import Trajectory

# Metrics that are taken from a step's first batch only. It is updated with the weights that sampled it, so there the
# engine's and the trainer's log-probabilities differ by numerics alone.
MISMATCH = ("logprob_diff_", "mismatch_")


class ActorCritic(NamedTuple):
    """The state of a run with a critic: the policy's fields, as in `TrainState`, and the critic's own state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    critic: TrainState


State = TrainState | ActorCritic


@dataclass(frozen=True)
class Frozen:
    """A model whose weights do not change: a teacher, or the run's own first weights as a reference."""

    scorer: Scorer
    params: Params


@dataclass(frozen=True)
class Learner:
    """The compiled parts of an update; the config says which of the optional ones exist."""

    rl: RLConfig
    algorithm: Algorithm
    longest: int  # tokens of the longest trajectory that a run allows
    update: Step
    share_prefixes: bool = False  # all samples of a prompt in a packed row share one copy of it
    trainer: Scorer | None = None  # the policy's log-probabilities, with rl.old_logprobs=trainer
    critic: Step | None = None
    values: Scorer | None = None
    frozen: Mapping[str, Frozen] = field(default_factory=dict)  # by the column name of their log-probabilities


class Learned(NamedTuple):
    """The result of a step's updates."""

    state: State
    metrics: dict[str, float]
    tokens: int  # tokens of the trajectories that were learned from, counted once for all epochs


def learn(p: Learner, state: State, trajectories: Sequence[Trajectory], step: int) -> Learned:
    """One step's updates from its scored trajectories, which come group by group; the first step is 1."""
    kept, groups = kept_and_groups(trajectories, p.rl.group_size)
    if not kept:
        return Learned(state, {"groups_used": 0}, 0)
    columns = model_columns(p, state, kept)
    scored = scored_of(kept, groups, columns)
    columns |= p.algorithm.advantage(scored, p.rl)
    metrics: dict[str, float] = {}
    if "engine_logprobs" in columns:
        pair = columns["old_logprobs"], columns["engine_logprobs"]
        columns["importance"] = [
            correction(p.rl.correction, old, engine, sampled)
            for old, engine, sampled in zip(*pair, scored.sampled, strict=True)
        ]
        metrics |= correction_numbers(p.rl.correction, *pair, scored.sampled)
    # Leave out trajectories whose advantages are all 0, as in a group of equal rewards. They add nothing to the term of
    # the policy, and with them the token mean would depend on how many of them a step happens to hold. They stay in if
    # the loss has a term that acts on them as well.
    compared = [bool(np.any(advantages)) for advantages in columns["advantages"]]
    chosen = [True] * len(kept) if acts_on_all_tokens(p.rl) else compared

    def batches(names: Sequence[str], chosen: Sequence[bool], aggregation: str) -> list[Batch]:
        wanted = {name: columns[name] for name in names}
        return batches_of(p.rl, kept, groups, wanted, chosen, aggregation, p.longest, p.share_prefixes)

    if p.critic:
        critic_batches = batches(("returns", "old_values"), [True] * len(kept), "token_mean")
        critic, numbers = run_updates(p.critic, state.critic, critic_batches * p.rl.epochs)
        state, metrics = state._replace(critic=critic), metrics | numbers
    if not p.critic or step > p.rl.critic.warmup_steps:
        optional = ("reference_logprobs", "engine_logprobs", "importance")
        names = [*p.algorithm.columns, *(name for name in optional if name in columns)]
        policy = TrainState(state.step, state.params, state.opt_state)
        policy_batches = batches(names, chosen, aggregation_of(p.rl, p.algorithm))
        policy, numbers = run_updates(p.update, policy, policy_batches * p.rl.epochs)
        state, metrics = state._replace(**policy._asdict()), metrics | with_sample_size(numbers)
    metrics["groups_used"] = len(set(groups[compared].tolist()))
    return Learned(state, metrics, sum(len(t.ids) for t, use in zip(kept, chosen, strict=True) if use))


def fingerprint(params: Params) -> str:
    """A hash of the weights, from the sum of each array's bits; it is the same on every mesh."""
    return hashlib.blake2b(np.array(jax.device_get(_added_bits(params))).tobytes(), digest_size=8).hexdigest()


@jax.jit
def _added_bits(params: Params) -> list[jax.Array]:
    bits = [jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(params)]
    return [jnp.sum(x.astype(jnp.uint32)) for x in bits]


def model_columns(p: Learner, state: State, kept: Sequence[Trajectory]) -> dict[str, list[np.ndarray]]:
    """Per-token values before the update, by column name: old log-probabilities and the outputs of other models."""
    recorded = [np.array(t.logprobs, np.float32) for t in kept]
    examples = [Example(t.ids, t.sampled) for t in kept]
    columns = {"old_logprobs": recorded}
    if p.trainer:
        columns |= {"old_logprobs": p.trainer(state.params, examples)["logprobs"], "engine_logprobs": recorded}
    if p.values:
        values = p.values(state.critic.params, examples)["values"]
        columns |= {"values": values, "old_values": values}
    for name, model in p.frozen.items():
        columns[name] = model.scorer(model.params, examples)["logprobs"]
    return columns


def run_updates(update: Step, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, dict[str, float]]:
    """One optimiser step per batch. Metrics are means over the batches, except `MISMATCH`: those of the first batch."""
    history: list[dict[str, float]] = []
    for batch in batches:
        state, metrics = update(state, batch)
        history.append({key: float(value) for key, value in jax.device_get(metrics).items()})
    if not history:
        return state, {}
    means = {key: float(np.mean([metrics[key] for metrics in history])) for key in history[0]}
    return state, means | {key: value for key, value in history[0].items() if key.startswith(MISMATCH)}


def with_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """Replace `mismatch_ratio` and its square by `mismatch_ess`, the effective sample size as a share of the tokens.

    (mean of w)^2 / mean of w^2 with w = trainer's / engine's probability (Kish, 1965).
    """
    mean, square = (metrics.pop(name, None) for name in ("mismatch_ratio", "mismatch_ratio_squared"))
    return metrics | {"mismatch_ess": mean * mean / square} if square else metrics
