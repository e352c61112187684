"""One jitted training step for SFT, policies and critics: accumulate gradients over micro-batches, then update."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from retool_jax import hosts
from retool_jax import mesh as meshes
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState, learning_rate, make_optimizer, state_shardings
from retool_jax.learn.packing import Batch
from retool_jax.models import decoder
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.head import given_logprobs
from retool_jax.models.sharding import is_weight

OUTPUTS = ("logprobs", "entropy", "values")
Columns = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
WEIGHTS = "weights"  # the column that multiplies the loss of each token


class TokenTerms(NamedTuple):
    """What a loss returns for every token of a micro-batch; values of tokens that were not sampled are ignored."""

    loss: jax.Array  # [B,T], minimised
    metrics: dict[str, jax.Array]  # [B,T] each, logged as means over sampled tokens
    spread: dict[str, jax.Array] = {}  # noqa: RUF012 - nobody changes it, and a mapping proxy is not a pytree
    """[B,T] each, logged as NAME_mean, NAME_std, NAME_p99 and NAME_max over sampled tokens (`spread_of`)."""


# Takes the model's outputs for a micro-batch, [B,T] each and 0 where not sampled, and the micro-batch with its columns.
TokenLoss = Callable[[Columns, Batch], TokenTerms]


@dataclass(frozen=True)
class Outputs:
    """What a model computes for each token, by name.

    `logprobs` is the log-probability of a sampled token given the tokens before it in its segment. `entropy`, in nats,
    is the entropy of the distribution that the token was sampled from. Both belong to softmax(logits / temperature) and
    are 0 where nothing was sampled. Entropy carries a gradient only with `entropy_gradient`. `values` are a critic's:
    the value of the state before the token, which is its prefix in its segment. The first token of a segment has 0.
    """

    model: ModelConfig
    names: tuple[str, ...] = ("logprobs", "entropy")
    temperature: float = 1.0
    entropy_gradient: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.names) - set(OUTPUTS):
            raise ValueError(f"outputs {sorted(unknown)} are not known; there are: {', '.join(OUTPUTS)}")
        if self.value_head and len(self.names) > 1:
            raise ValueError(
                f"outputs {', '.join(self.names)} are of two models: values are a critic's; ask for them alone"
            )

    @property
    def value_head(self) -> bool:
        """Whether the weights are a critic's."""
        return "values" in self.names

    def of(self, params: Params, batch: Batch) -> Columns:
        """The outputs for one micro-batch, [B,T] fp32 each."""
        if self.value_head:
            return {"values": token_values(self.model, params, batch)}
        logprobs, entropy = token_logprobs(self.model, params, batch, self.temperature, self.entropy_gradient)
        values = {"logprobs": logprobs, "entropy": entropy}
        return {name: values[name] for name in self.names}


def token_logprobs(
    model: ModelConfig, params: Params, batch: Batch, temperature: float, entropy_gradient: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of every sampled token given its prefix in its segment, and the entropy of its distribution.

    Both [B,T] fp32, aligned with `batch.tokens`; 0 for tokens that were not sampled and for the first of a segment.
    """
    hidden = decoder.forward(model, params, batch.tokens, batch.positions, batch.segments)

    def next_one(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    wanted = next_one(batch.sampled & _follows(batch))
    results = given_logprobs(
        model, params, hidden, next_one(batch.tokens), temperature, entropy_gradient, wanted_BT=wanted
    )
    return _align(batch, results[0][:, :-1]), _align(batch, results[1][:, :-1])


def token_values(model: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """A critic's value of each token's prefix in its segment, [B,T] fp32; the first token of a segment gets 0."""
    hidden = decoder.forward(model, params, batch.tokens, batch.positions, batch.segments)
    return _align(batch, decoder.values(params, hidden[:, :-1]))


def _follows(batch: Batch) -> jax.Array:
    """Which tokens [B,T] have another token of their segment before them."""
    same = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    return jnp.pad(same, ((0, 0), (1, 0)))


def _align(batch: Batch, x: jax.Array) -> jax.Array:
    """Shift predictions [B,T-1] of each next token onto that token, [B,T]; the first token of a segment gets 0."""
    return jnp.where(_follows(batch), jnp.pad(x, ((0, 0), (1, 0))), 0.0)


def micro_batch(batch: Batch, index: jax.Array) -> Batch:
    """One of a batch's micro-batches, its rows split over the mesh."""

    def pick(x: jax.Array) -> jax.Array:
        return meshes.constrain(jax.lax.dynamic_index_in_dim(x, index, keepdims=False), "batch", "length")

    return jax.tree.map(lambda x: pick(x) if x.ndim else x, batch)


def spread_of(values_MBT: jax.Array, sampled_MBT: jax.Array) -> Metrics:
    """Mean, standard deviation, 99th percentile and maximum over a batch's sampled tokens; all 0 if there are none.

    The percentile is NumPy's `quantile(x, 0.99)`: linear between the two tokens beside it.
    """
    n = jnp.sum(sampled_MBT)
    last = jnp.maximum(n - 1, 0)

    def mean_of(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(sampled_MBT, x, 0.0)) / jnp.maximum(n, 1)

    mean = mean_of(values_MBT)
    # Replicated on every device: a sharded array cannot be sorted shard by shard.
    padded = meshes.constrain(jnp.where(sampled_MBT, values_MBT, jnp.inf), None, None, None)
    ordered = jnp.sort(padded.reshape(-1))
    hundreds, rest = jnp.divmod(last, 100)  # 0.99 * last in integers: fp32 would round it
    below = 99 * hundreds + 99 * rest // 100
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    p99 = low + (high - low) * (99 * rest % 100 / 100)
    result = {
        "mean": mean,
        "std": jnp.sqrt(mean_of(jnp.square(values_MBT - mean))),
        "p99": jnp.where(jnp.isnan(mean), jnp.nan, p99),  # NaN values are sorted after the padding
        "max": jnp.max(jnp.where(sampled_MBT, values_MBT, -jnp.inf)),
    }
    return {name: jnp.where(n > 0, x, 0.0) for name, x in result.items()}


def loss_and_gradient(
    outputs: Outputs, token_loss: TokenLoss, params: Params, batch: Batch, dtype: str = "float32"
) -> tuple[Params, Metrics]:
    """The gradient, accumulated in `dtype`, and the metrics of the mean loss over all sampled tokens of the batch.

    A column "weights" multiplies the loss of each token, but no metric. A loop of dynamic length runs over the
    micro-batches: it needs the memory of one micro-batch, and empty ones cost nothing. Values for `spread` are kept for
    the whole batch.
    """
    tokens = jnp.maximum(jnp.sum(batch.sampled), 1).astype(jnp.float32)

    def micro_loss(params: Params, micro: Batch) -> tuple[jax.Array, tuple[Metrics, Columns]]:
        def keep(x: jax.Array) -> jax.Array:
            return jnp.where(micro.sampled, x, 0.0)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(keep(x)) / tokens

        # Mask the loss's inputs, not only its value: otherwise 0 * NaN would reach the gradient.
        values = jax.tree.map(keep, outputs.of(params, micro))
        columns = jax.tree.map(keep, micro.columns)
        terms = token_loss(values, micro._replace(columns=columns))

        loss = mean(terms.loss * columns[WEIGHTS] if WEIGHTS in columns else terms.loss)
        watched = {name: x for name, x in values.items() if name == "entropy"} | terms.metrics
        return loss, ({"loss": loss} | {name: mean(x) for name, x in watched.items()}, terms.spread)

    def body(index: jax.Array, carry: tuple) -> tuple:
        (total, sums), seen = carry
        micro = micro_batch(batch, index)
        weights, split = params, meshes.split_with_weights(micro.tokens.shape[0])
        if split:
            # Without the barrier XLA would hoist the gather of the weights and keep all of them gathered in the loop.
            weights, _ = jax.lax.optimization_barrier((params, index))
        total, (metrics, spread) = add_gradient(total, partial(micro_loss, micro=micro), weights, split)
        return (total, jax.tree.map(jnp.add, sums, metrics)), write_columns(seen, spread, index)

    _, (metrics, spread) = jax.eval_shape(lambda: micro_loss(params, micro_batch(batch, 0)))
    total = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), params),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics),
    )
    carry = total, empty_columns(spread, batch)
    (gradient, metrics), seen = jax.lax.fori_loop(0, batch.micro_batches, body, carry)
    for name, values in seen.items():
        metrics |= {f"{name}_{what}": x for what, x in spread_of(values, batch.sampled).items()}
    return gradient, metrics


def add_gradient(total: Params, loss: Callable, params: Params, by_layer: bool) -> tuple[Params, tuple]:
    """Add the gradient of `loss(params)` to `total`; returns the new total and the loss's auxiliary output.

    With `by_layer` the backward pass adds each layer's gradient in place, so no second stack of all layers' gradients
    is held.
    """
    value, pull_back, auxiliary = jax.vjp(loss, params, has_aux=True)
    sums, structure = jax.tree.flatten(total)
    weights = jax.tree.leaves(params, is_leaf=is_weight)
    refs = [
        jax.new_ref(x) if by_layer and "layers" in w.logical and x.dtype == w.dtype else jax.ad.GradValue()
        for x, w in zip(sums, weights, strict=True)
    ]
    (gradient,) = pull_back.with_refs(structure.unflatten(refs))(jnp.ones_like(value))
    gradients = jax.tree.leaves(gradient, is_leaf=lambda x: isinstance(x, jax.ad.GradRef))
    added = [
        jax.freeze(ref) if isinstance(x, jax.ad.GradRef) else before + x.astype(before.dtype)
        for before, ref, x in zip(sums, refs, gradients, strict=True)
    ]
    return structure.unflatten(added), auxiliary


def empty_columns(names: Iterable[str], batch: Batch) -> Columns:
    """For each name an array of zeros for a value of every token of the batch, [M,B,T] fp32."""
    return {name: meshes.constrain(jnp.zeros(batch.tokens.shape), "micro", "batch", "length") for name in names}


def write_columns(seen: Columns, values: Columns, index: jax.Array) -> Columns:
    """Write the values [B,T] of micro-batch `index` into `seen`, arrays [M,B,T]."""

    def put(whole: jax.Array, x: jax.Array) -> jax.Array:
        whole = jax.lax.dynamic_update_index_in_dim(whole, x.astype(whole.dtype), index, 0)
        return meshes.constrain(whole, "micro", "batch", "length")

    return {name: put(seen[name], x) for name, x in values.items()}


def on_mesh(batch: Batch, mesh: Mesh) -> Batch:
    """Put a batch that is equal on all hosts onto the mesh, each host its own rows; unchanged with one process."""
    rows, everywhere = meshes.sharding(mesh, "micro", "batch", "length"), meshes.replicated(mesh)
    return hosts.global_arrays(batch, jax.tree.map(lambda x: rows if np.ndim(x) else everywhere, batch))


class Step:
    """A compiled step: `step(state, batch)` returns the new state and fp32 scalar metrics. It donates the old state.

    All batches of a run have the same shapes and columns, so it is compiled once.
    """

    def __init__(self, compiled: Callable, mesh: Mesh) -> None:
        self._compiled, self._mesh = compiled, mesh

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self._mesh):
            return self._compiled(state, on_mesh(batch, self._mesh))

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The program for arguments of these shapes, which may be abstract, to compile and measure without running."""
        with jax.set_mesh(self._mesh):
            return self._compiled.lower(state, batch)


def skipped(metrics: Mapping[str, object]) -> str:
    """A message if a gradient that was not finite made some optimiser steps change nothing; otherwise empty."""
    share = max(float(metrics.get(name, 0.0)) for name in ("update_skipped", "critic/update_skipped"))
    return f"{share:.0%} of its updates were left out, as their gradient was not finite" if share else ""


def make_step(
    outputs: Outputs,
    token_loss: TokenLoss,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    conclude: Callable[[Metrics], Metrics] | None = None,
) -> Step:
    """The step that minimises a token loss of these outputs; `conclude` turns its metrics into those that are logged.

    A gradient that is not finite changes nothing (as in verl): one such update would turn all weights into NaN.
    """
    schedule, transformation = learning_rate(optimizer), make_optimizer(optimizer)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient, metrics = loss_and_gradient(outputs, token_loss, state.params, batch, optimizer.gradient_dtype)
        gradient = jax.tree.map(lambda x: x.astype(jnp.float32), gradient)  # a norm summed in bf16 would be inexact
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, opt_state)
        new = jax.tree.map(partial(jnp.where, finite), new, state)
        metrics |= {"grad_norm": norm, "learning_rate": schedule(state.step), "update_skipped": 1.0 - finite}
        return new, conclude(metrics) if conclude else metrics

    rows = meshes.sharding(mesh, "micro", "batch", "length")
    everywhere = meshes.replicated(mesh)
    shardings = state_shardings(outputs.model, optimizer, mesh, outputs.value_head)
    compiled = jax.jit(
        update,
        in_shardings=(shardings, Batch(*[rows] * 5, everywhere)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=meshes.update_options(mesh),
    )
    return Step(compiled, mesh)
