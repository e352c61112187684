"""A run's learner: the compiled updates of its algorithm, and the other models that it needs (reference, teacher)."""

from collections.abc import Callable
from functools import lru_cache

from jax.sharding import Mesh

from retool_jax.learn import optimizer as optimizers
from retool_jax.learn.critic import begin_critic, make_critic_step
from retool_jax.learn.packing import Batch
from retool_jax.learn.scorer import Scorer
from retool_jax.learn.step import Columns, Outputs, Step, TokenTerms, make_step
from retool_jax.models.attention import resolve_kernel, shares_prefixes
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.rl.algorithms import algorithm_of
from retool_jax.rl.config import RLConfig
from retool_jax.rl.learner import ActorCritic, Frozen, Learner, State
from retool_jax.run.schema import RLRun
from retool_jax.run.weights import abstract_state, load_teacher


def make_learner(
    run: RLRun,
    mesh: Mesh,
    first_weights: Callable[[], Params],
    teacher: Callable[[RLRun, Mesh], tuple[ModelConfig, Params]] = load_teacher,
) -> Learner:
    """The updates of a run, compiled when they are first used.

    `first_weights` gives the weights that the run began from; they are the reference when `rl.kl.coefficient` is not 0.
    Weights may be abstract if nothing will be computed.
    """
    rl, algorithm = run.rl, algorithm_of(run.rl)

    def shares(model: ModelConfig) -> bool:
        return rl.share_prefixes and shares_prefixes(resolve_kernel(model, mesh.devices.flat[0].platform))

    def scorer(model: ModelConfig, *names: str, temperature: float = rl.temperature) -> Scorer:
        rows = -(-rl.prompts_per_step * rl.group_size // rl.rows_per_micro)
        outputs = Outputs(model, names, temperature)
        return _scorer(outputs, mesh, rl.row_length, rl.rows_per_micro, rows, shares(model))

    frozen = {}
    if "teacher" in algorithm.models:
        model, params = teacher(run, mesh)
        # The teacher's own distribution: the student's sampling temperature does not apply to it.
        frozen["teacher_logprobs"] = Frozen(scorer(model, "logprobs", temperature=1.0), params)
    if rl.kl.coefficient:
        frozen["reference_logprobs"] = Frozen(scorer(run.model, "logprobs"), first_weights())
    critic = values = None
    if has_critic(run):
        critic = _critic_step(run.model, rl.critic.value_clip, rl.critic.optimizer, mesh)
        values = scorer(run.model, "values")
    return Learner(
        rl=rl,
        algorithm=algorithm,
        longest=run.engine.max_length,
        update=_policy_step(run.model, rl, mesh),
        share_prefixes=shares(run.model),
        trainer=scorer(run.model, "logprobs") if rl.old_logprobs == "trainer" else None,
        critic=critic,
        values=values,
        frozen=frozen,
    )


# Cached, so that a process that trains several runs of the same sizes traces and compiles once.
_scorer, _critic_step = lru_cache(maxsize=8)(Scorer), lru_cache(maxsize=4)(make_critic_step)


@lru_cache(maxsize=4)
def _policy_step(model: ModelConfig, rl: RLConfig, mesh: Mesh) -> Step:
    algorithm = algorithm_of(rl)

    def loss(outputs: Columns, batch: Batch) -> TokenTerms:
        return algorithm.loss(outputs, batch, rl)

    outputs = Outputs(model, temperature=rl.temperature, entropy_gradient=rl.entropy_coefficient > 0)
    return make_step(outputs, loss, rl.optimizer, mesh)


def first_state(run: RLRun, params: Params, mesh: Mesh) -> State:
    """The state before the first step. It consumes `params`."""
    critic = None
    if has_critic(run):
        critic = begin_critic(params, run.model, run.rl.critic.optimizer, mesh)
    state = optimizers.begin_from(params, run.model, run.rl.optimizer, mesh)
    return state if critic is None else ActorCritic(*state, critic)


def abstract_train_state(run: RLRun, mesh: Mesh) -> State:
    """Shapes and shardings of a run's train state."""
    state = abstract_state(run, mesh)
    if not has_critic(run):
        return state
    critic = optimizers.abstract_state(run.model, run.rl.critic.optimizer, mesh, value_head=True)
    return ActorCritic(*state, critic)


def has_critic(run: RLRun) -> bool:
    return "critic" in algorithm_of(run.rl).models
