"""One jitted step for every kind of training: accumulate gradients over micro-batches, then step the optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import TrainState, learning_rate, make_optimizer, state_shardings
from retool_jax.learn.packing import Batch
from retool_jax.models import decoder
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.head import given_logprobs

OUTPUTS = ("logprobs", "entropy")
Columns = dict[str, jax.Array]


class TokenTerms(NamedTuple):
    """What a loss says about every token of a micro-batch; values outside the sampled tokens are ignored."""

    loss: jax.Array  # [B,T], minimised
    metrics: dict[str, jax.Array]  # [B,T] each, logged as means over sampled tokens
    spread: dict[str, jax.Array] = {}  # noqa: RUF012 - nobody changes it, and a proxy would be no pytree
    """[B,T] each, logged as NAME_mean, NAME_std, NAME_p99 and NAME_max over sampled tokens (`spread_of`)."""


# From the outputs of a micro-batch, [B,T] each and 0 where nothing was sampled, and the micro-batch with its columns.
TokenLoss = Callable[[Columns, Batch], TokenTerms]


@dataclass(frozen=True)
class Outputs:
    """What a step computes of each token for its loss, by name; both of softmax(logits / temperature).

    `logprobs` is the log-probability of the token given those before it in its segment. `entropy`, in nats, is that of
    the distribution which the token was drawn from; it carries no gradient.
    """

    model: ModelConfig
    names: tuple[str, ...] = OUTPUTS
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if unknown := set(self.names) - set(OUTPUTS):
            raise ValueError(f"outputs {sorted(unknown)} are not known; there are: {', '.join(OUTPUTS)}")

    def of(self, params: Params, batch: Batch) -> Columns:
        """The outputs for one micro-batch, [B,T] fp32 each."""
        values = dict(zip(OUTPUTS, token_logprobs(self.model, params, batch, self.temperature), strict=True))
        return {name: values[name] for name in self.names}


def token_logprobs(model: ModelConfig, params: Params, batch: Batch, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token given those before it in its segment, and the entropy it was drawn from.

    Both [B,T] fp32, aligned with `batch.tokens`; the first token of a segment has none and gets 0.
    """
    hidden = decoder.forward(model, params, batch.tokens, batch.positions, batch.segments)
    chosen, entropy = given_logprobs(model, params, hidden[:, :-1], batch.tokens[:, 1:], temperature)

    def align(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.where(batch.positions[:, 1:] > 0, x, 0.0), ((0, 0), (1, 0)))

    return align(chosen), align(entropy)


def loss_and_gradient(
    outputs: Outputs, token_loss: TokenLoss, params: Params, batch: Batch, dtype: str = "float32"
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradient, added up in `dtype`, and metrics of the global token mean: sum over sampled tokens / their number.

    Micro-batches are visited by a loop of dynamic length, so memory is one micro-batch's and empty ones cost nothing.
    """
    tokens = jnp.maximum(jnp.sum(batch.sampled), 1).astype(jnp.float32)

    def micro_loss(params: Params, micro: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        def keep(x: jax.Array) -> jax.Array:
            return jnp.where(micro.sampled, x, 0.0)

        def mean(x: jax.Array) -> jax.Array:
            return jnp.sum(keep(x)) / tokens

        # The loss's inputs are masked too: behind a mask on its value alone, 0 * NaN still reaches the gradient.
        values = jax.tree.map(keep, outputs.of(params, micro))
        terms = token_loss(values, micro._replace(columns=jax.tree.map(keep, micro.columns)))

        loss = mean(terms.loss)
        watched = {name: x for name, x in values.items() if name == "entropy"} | terms.metrics
        return loss, {"loss": loss} | {name: mean(x) for name, x in watched.items()}

    def at(index: jax.Array) -> Batch:
        def micro(x: jax.Array) -> jax.Array:
            return meshes.constrain(jax.lax.dynamic_index_in_dim(x, index, keepdims=False), "batch", "length")

        return jax.tree.map(lambda x: micro(x) if x.ndim else x, batch)

    def body(index: jax.Array, total: tuple) -> tuple:
        (_, metrics), gradient = jax.value_and_grad(micro_loss, has_aux=True)(params, at(index))
        gradient = jax.tree.map(lambda x: x.astype(dtype), gradient)
        return jax.tree.map(jnp.add, total, (gradient, metrics))

    shapes = jax.eval_shape(lambda: jax.value_and_grad(micro_loss, has_aux=True)(params, at(0)))
    metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0][1])
    gradient = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes[1])
    return jax.lax.fori_loop(0, batch.micro_batches, body, (gradient, metrics))


class Step:
    """A compiled step: `step(state, batch)` gives the new state and metrics as fp32 scalars. It consumes the old state.

    All batches of a run have the same shapes and the same columns, so that it is compiled once.
    """

    def __init__(self, compiled: Callable, mesh: Mesh) -> None:
        self._compiled, self._mesh = compiled, mesh

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with jax.set_mesh(self._mesh):
            return self._compiled(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The program for arguments of these shapes, which may be abstract: compiled and measured, not run."""
        with jax.set_mesh(self._mesh):
            return self._compiled.lower(state, batch)


def make_step(outputs: Outputs, token_loss: TokenLoss, optimizer: OptimizerConfig, mesh: Mesh) -> Step:
    """The step that minimises a token loss of these outputs."""
    schedule, transformation = learning_rate(optimizer), make_optimizer(optimizer)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, metrics = loss_and_gradient(outputs, token_loss, state.params, batch, optimizer.gradient_dtype)
        gradient = jax.tree.map(lambda x: x.astype(jnp.float32), gradient)  # a norm is no sum for bf16
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradient), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, opt_state), metrics

    rows = meshes.sharding(mesh, "micro", "batch", "length")
    everywhere = meshes.replicated(mesh)
    shardings = state_shardings(outputs.model, optimizer, mesh)
    compiled = jax.jit(
        update,
        in_shardings=(shardings, Batch(*[rows] * 5, everywhere)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
    return Step(compiled, mesh)
