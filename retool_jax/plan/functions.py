"""The functions that a run will compile, with abstract arguments in the shapes that it will use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.engine.ahead import Shapes, engine_weights
from retool_jax.engine.compiled import Layouts, Programs, decode_mesh
from retool_jax.engine.weights import make_spread
from retool_jax.learn.optimizer import TrainState
from retool_jax.learn.packing import Batch
from retool_jax.learn.step import WEIGHTS, Outputs, make_step
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.rl.algorithms import aggregation_of
from retool_jax.rl.learner import Learner
from retool_jax.rl.loss import aggregation_weights
from retool_jax.run.learner import abstract_train_state, make_learner
from retool_jax.run.schema import EngineRun, RLRun, SFTRun
from retool_jax.run.weights import abstract_state, abstract_weights
from retool_jax.sft.loop import imitation_loss, optimizer_of

STOPS = (0, 1)  # stands for the tokenizer's stop ids; only their number matters


@dataclass(frozen=True)
class Function:
    """One of a run's jitted functions with its arguments, which are shapes with shardings.

    Attributes:
        kind: update, score, decode, extend or reshard.
        lower: lowers the function with its arguments.
        arguments: by class of memory.
        mesh: the mesh that it runs on; functions of the engine have the engine's own.
        rows, length: of a micro-batch, or of one call of the engine.
        unknown: trip counts of the loops whose length the compiler does not know, outermost first.
    """

    name: str
    kind: Literal["update", "score", "decode", "extend", "reshard"]
    lower: Callable[[], jax.stages.Lowered]
    arguments: dict[str, object]
    model: ModelConfig
    mesh: Mesh
    rows: int = 0
    length: int = 0
    unknown: tuple[int, ...] = ()

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def held(self) -> dict[str, float]:
        """Bytes of its arguments on a device, by class of memory."""
        return {kind: held(tree) for kind, tree in self.arguments.items()}


def held(tree: object) -> float:
    """Bytes of a tree of abstract arrays on the device that holds most of them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def abstract_batch(mesh: Mesh, micro_batches: int, rows: int, length: int, columns: tuple[str, ...]) -> Batch:
    """A packed batch of this shape."""
    where = meshes.sharding(mesh, "micro", "batch", "length")

    def array(dtype: type) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((micro_batches, rows, length), dtype, sharding=where)

    ids, floats = array(jnp.int32), array(jnp.float32)
    used = jax.ShapeDtypeStruct((), jnp.int32, sharding=meshes.replicated(mesh))
    return Batch(ids, ids, ids, array(jnp.bool_), dict.fromkeys(columns, floats), used)


def head_chunks(model: ModelConfig, mesh: Mesh, rows: int, length: int) -> int:
    """Number of chunks in which a device computes a micro-batch's logits: the trip count of the loop over them."""
    return max(-(-rows * length // (mesh.shape["data"] * mesh.shape["fsdp"]) // model.head_chunk), 1)


def sft_functions(run: SFTRun, mesh: Mesh) -> list[Function]:
    """The only function of a cold start. Its number of steps does not matter here."""
    sft = run.sft
    update = make_step(Outputs(run.model), imitation_loss, optimizer_of(sft, sft.steps or 1000), mesh)
    tokens = sft.batch_size * sft.row_length or sft.batch_tokens
    batch = abstract_batch(
        mesh, -(-tokens // (sft.row_length * sft.rows_per_micro)), sft.rows_per_micro, sft.row_length, ()
    )
    return [_update("policy update", run.model, update, abstract_state(run, mesh), batch, mesh)]


def rl_functions(run: RLRun, mesh: Mesh, teacher: ModelConfig, of_host: int) -> list[Function]:
    """The functions of an RL run in the order of a step.

    `teacher` is the model of a teacher, if the run has one; the engine has the first `of_host` devices of the mesh. A
    run that learns from rollouts in files has no engine.
    """
    learner = make_learner(
        run,
        mesh,
        lambda: abstract_weights(run.model, mesh),
        lambda run, mesh: (teacher, abstract_weights(teacher, mesh)),
    )
    learning = _learning(run, mesh, learner)
    if run.replay:
        return learning
    first = Mesh(mesh.devices.reshape(-1)[:of_host].reshape(1, -1, 1), mesh.axis_names)
    own = decode_mesh(run.model, mesh if of_host == mesh.size else first, run.engine.tp)
    return [*engine_functions(run, own), *learning, _reshard(run, mesh, own)]


def _update(name: str, model: ModelConfig, step, state: TrainState, batch: Batch, mesh: Mesh) -> Function:
    M, rows, length = batch.tokens.shape
    arguments = {"parameters": state.params, "optimiser": (state.step, state.opt_state), "batch": batch}
    unknown = M, head_chunks(model, mesh, rows, length)
    return Function(name, "update", partial(step.lower, state, batch), arguments, model, mesh, rows, length, unknown)


def _learning(run: RLRun, mesh: Mesh, learner: Learner) -> list[Function]:
    rl, state = run.rl, abstract_train_state(run, mesh)
    policy = TrainState(state.step, state.params, state.opt_state)
    whole = -(-rl.prompts_per_step * rl.group_size // rl.rows_per_micro)

    def batch(micro_batches: int, *columns: str) -> Batch:
        return abstract_batch(mesh, micro_batches, rl.rows_per_micro, rl.row_length, columns)

    def scorer(name: str, scorer, params: Params) -> Function:
        bare, model = batch(whole), scorer.outputs.model
        unknown = whole, head_chunks(model, mesh, rl.rows_per_micro, rl.row_length)
        arguments = {"parameters": params, "batch": bare}
        lower = partial(scorer.lower, params, bare)
        return Function(name, "score", lower, arguments, model, mesh, *bare.tokens.shape[1:], unknown)

    found = []
    if learner.trainer:
        found.append(scorer("log-probs", learner.trainer, policy.params))
    for name, frozen in learner.frozen.items():
        found.append(scorer(name.removesuffix("_logprobs"), frozen.scorer, frozen.params))
    part = -(-(rl.prompts_per_step // rl.minibatches * rl.group_size) // rl.rows_per_micro)
    if learner.critic:
        found.append(scorer("values", learner.values, state.critic.params))
        mine = batch(part, "returns", "old_values")
        found.append(_update("critic update", run.model, learner.critic, state.critic, mine, mesh))
    columns = list(learner.algorithm.columns)
    columns += ["reference_logprobs"] if "reference_logprobs" in learner.frozen else []
    columns += ["engine_logprobs", "importance"] if learner.trainer else []
    weighted = aggregation_weights(aggregation_of(rl, learner.algorithm), np.ones(1), learner.longest) is not None
    columns += [WEIGHTS] if weighted else []
    return [*found, _update("policy update", run.model, learner.update, policy, batch(part, *columns), mesh)]


def engine_functions(run: EngineRun, own: Mesh) -> list[Function]:
    """Decoding at the longest length, and writing prompts and answers, as many blocks as one call takes."""
    model, config = run.model, run.engine
    layouts = Layouts.of(model, config, own)
    sizes, programs, shapes = layouts.sizes, Programs.of(model, config, layouts, STOPS), Shapes(model, config, layouts)
    P = sizes.reads[-1]
    decode, extend = shapes.decode(P), shapes.extend(-1, P)
    memory = {"engine weights": shapes.weights, "cache": decode[:2]}
    lower = partial(programs.decode.lower, *decode)
    found = [Function("decode", "decode", lower, memory, model, own, config.slots, 1, (1,))]
    at_once, tokens = sizes.at_once[-1], sizes.tokens[-1]
    memory = {"engine weights": shapes.weights, "cache": shapes.state}
    lower = partial(programs.extend[-1].lower, *extend)
    found.append(Function("write", "extend", lower, memory, model, own, at_once, tokens, (1,)))
    return found


def _reshard(run: RLRun, mesh: Mesh, own: Mesh) -> Function:
    layouts = Layouts.of(run.model, run.engine, own)
    params = abstract_weights(run.model, mesh)
    old = engine_weights(run.model, layouts) if own.size == mesh.size else None

    def lower() -> jax.stages.Lowered:
        with jax.set_mesh(own if old is not None else mesh):
            return make_spread(run.model, layouts, mesh).lower(old, params)

    memory = {"parameters": params} | ({"engine weights": old} if old is not None else {})
    return Function("weights to engines", "reshard", lower, memory, run.model, mesh)
