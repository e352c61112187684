"""Every file in configs/ on virtual devices: its programs in its own sizes, and steps of a model made small."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from retool_jax.data.problems import Problem
from retool_jax.engine.compiled import decode_mesh
from retool_jax.learn.optimizer import begin_from
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import Outputs, make_step
from retool_jax.mesh import make_mesh
from retool_jax.models.config import SIZES, ModelConfig
from retool_jax.models.decoder import Params, abstract_params
from retool_jax.models.sharding import param_shardings
from retool_jax.plan.functions import Function, engine_functions, held, rl_functions, sft_functions
from retool_jax.rl.algorithms import algorithm_of
from retool_jax.rl.learner import learn
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.run.build import mesh_of
from retool_jax.run.learner import first_state, make_learner
from retool_jax.run.load import CONFIGS, load
from retool_jax.run.schema import RLRun, Run, SFTRun, micro_batches
from retool_jax.sft.loop import imitation_loss, optimizer_of

DEVICES = 8  # as h100-8 has
PUBLISHED = json.loads((Path(__file__).parents[1] / "models" / "published_configs.json").read_text())
# The checkpoint of a config that leaves the shape to it.
OF = {"sft_retool": "Qwen2.5-32B-Instruct", "eval": "Qwen2.5-32B-Instruct", "smollm2": "SmolLM2-135M-Instruct"}
ENGINE = ["decode", "write"]
LEARNING = {
    "grpo": ["policy update"],
    "ppo": ["values", "critic update", "policy update"],
    "opd": ["teacher", "policy update"],
}


def shape_words(name: str) -> list[str]:
    """The words that set a published model's shape."""
    published = dict(zip(PUBLISHED["columns"], PUBLISHED["models"][name], strict=True))
    names = {ours: theirs for ours, theirs in SIZES.items() if theirs in published}
    names |= {"rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
    names |= {"qkv_bias": "attention_qkv_bias", "qk_norm": "qk_norm"}
    return [f"model.{ours}={json.dumps(published[theirs])}" for ours, theirs in names.items()]


def run_of(name: str) -> Run:
    """A config's run with the shape of its model, but two layers, which stand for all of them."""
    left = next((OF[part] for part in OF if name.startswith(part) or part in name), None)
    words = shape_words(left) if left and name != "eval" else []
    weights = ["init_from=weights"] if name.startswith("eval_") else []
    return load([f"config={name}", *weights, *words, "model.num_layers=2"])


def functions_of(run: Run, mesh: Mesh) -> list[Function]:
    if isinstance(run, SFTRun):
        return sft_functions(run, mesh)
    if isinstance(run, RLRun):
        return rl_functions(run, mesh, run.model, mesh.size)
    return engine_functions(run, decode_mesh(run.model, mesh, run.engine.tp))


PROGRAMS: dict[tuple, jax.stages.Lowered] = {}


def lowered(one: Function, run: Run) -> jax.stages.Lowered:
    """A lowered function, shared by all configs whose programs differ only in constants: rates, bounds, numbers of
    micro-batches, over which a step has a loop."""
    if one.kind in ("decode", "extend", "reshard"):
        decides = run.engine
    else:
        loss = imitation_loss if isinstance(run, SFTRun) else algorithm_of(run.rl).loss
        decides = loss, one.rows, one.length, tuple(one.arguments["batch"].columns)
    key = one.name, one.model, one.mesh, decides
    if key not in PROGRAMS:
        PROGRAMS[key] = one.lower()
    return PROGRAMS[key]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_a_config_is_lowered_on_the_devices_that_its_rows_divide_over(name):
    """On all eight devices, if its micro-batches have rows for them; weights, moments and cache are split over all."""
    run = run_of(name)
    devices = math.gcd(DEVICES, *micro_batches(run).values())
    mesh = make_mesh(run.mesh, jax.devices()[:devices])
    found = {one.name: (one, lowered(one, run)) for one in functions_of(run, mesh)}
    if isinstance(run, SFTRun):
        assert list(found) == ["policy update"]
    elif isinstance(run, RLRun):
        old = ["log-probs"] if run.rl.old_logprobs == "trainer" else []
        assert list(found) == [*ENGINE, *old, *LEARNING[run.rl.algorithm], "weights to engines"]
    else:
        assert list(found) == ENGINE
    for one, program in found.values():
        assert one.mesh.size == devices
        if one.kind == "update":
            before, (after, metrics) = program.in_avals[0][0], program.out_info
            assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, before)
            assert metrics
            state = one.arguments["parameters"], one.arguments["optimiser"]
            whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
            near = 0.01 if run.model.hidden_size > 1000 else 0.15  # norms and biases are whole on each
            assert held(state) == pytest.approx(whole / devices, rel=near)


# --- steps ------------------------------------------------------------------------------------------------------------

# Two layers of a few units; of each model the ratio of its heads and what makes its family stay.
SMALL = (
    *("model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64", "model.head_dim=8"),
    *("model.vocab_size=128", "mesh=cpu-8"),
)
# Two micro-batches of a row for each device.
SHORT = (
    *("rl.prompts_per_step=16", "rl.group_size=1", "rl.minibatches=1", "rl.rows_per_micro=8", "rl.row_length=32"),
    *("engine.max_length=32", "rollout.max_prompt_tokens=8"),
)
GROUPS = "rl.prompts_per_step=4", "rl.group_size=4"


def small(name: str, *words: str) -> Run:
    run = load([f"config={name}", *SMALL, *words])
    K, G = 2, run.model.num_heads // run.model.num_kv_heads
    return replace(run, model=replace(run.model, num_kv_heads=K, num_heads=K * G))


@cache
def weights_of(model: ModelConfig, seed: int = 0) -> Params:
    """Random weights, on the host."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0.0, 0.1, x.shape).astype(x.dtype), abstract_params(model)[1])


def placed(run: Run, mesh: Mesh, seed: int = 0) -> Params:
    """The same weights in their shards, for a step to consume."""
    return jax.device_put(weights_of(run.model, seed), param_shardings(run.model, mesh))


def trajectories(run: RLRun) -> list[Trajectory]:
    """Rollouts of a step: two turns around a tool's answer, half of each group right."""
    rng, made = np.random.default_rng(0), []
    for number in range(run.rl.prompts_per_step * run.rl.group_size):
        one = Trajectory(str(number), Problem("p", (), "6"), end=End.ANSWERED, reward=1.0 - 2.0 * (number % 2))
        for role, count in (("prompt", 6), ("policy", 9), ("tool", 5), ("policy", 4 + number % 8)):
            ids = rng.integers(0, run.model.vocab_size, count).tolist()
            one.add(role, ids, [-4.85] * count if role == "policy" else None)
        made.append(one)
    return made


def assert_split(params: Params, model: ModelConfig, mesh: Mesh) -> None:
    """Weights are split over the mesh as their axes say, and all but the smallest over all of it."""
    shardings = param_shardings(model, mesh, value_head="value" in params)
    for ours, where in zip(*map(jax.tree.leaves, (params, shardings)), strict=True):
        assert ours.sharding.is_equivalent_to(where, ours.ndim)
    parts = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params))
    assert parts < 1.2 / mesh.size * sum(x.size for x in jax.tree.leaves(params))


def moved(after: Params, before: Params) -> list[bool]:
    """For each weight, whether a step has changed it."""
    return [bool((np.asarray(x) != y).any()) for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True)]


def test_a_small_model_takes_a_step_of_imitation():
    run = small("sft_qwen2.5_32b", "sft.rows_per_micro=8", "sft.row_length=32")
    mesh, optimizer = mesh_of(run), optimizer_of(run.sft, 1000)
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(0, 128, 24).tolist(), [False] * 8 + [True] * 16) for _ in range(16)]
    update = make_step(Outputs(run.model), imitation_loss, optimizer, mesh)
    state = begin_from(placed(run, mesh), run.model, optimizer, mesh)
    state, numbers = update(state, pack(examples, 32, 8))
    assert float(numbers["loss"]) == pytest.approx(math.log(128), rel=0.1) and float(numbers["grad_norm"]) > 0
    assert_split(state.params, run.model, mesh)
    assert all(moved(state.params, weights_of(run.model)))


@pytest.mark.parametrize("name", ["grpo_qwen2.5_32b", "ppo_qwen2.5_32b", "opd_qwen3_4b"])
def test_a_small_model_takes_a_step_of_reinforcement_learning(name):
    run = small(name, *SHORT, *(() if name.startswith("ppo") else GROUPS))
    mesh = mesh_of(run)
    learner = make_learner(
        run, mesh, lambda: placed(run, mesh), lambda run, mesh: (run.model, placed(run, mesh, seed=1))
    )
    state = first_state(run, placed(run, mesh), mesh)
    step = run.rl.critic.warmup_steps + 1
    state, numbers, tokens = learn(learner, state, trajectories(run), step)
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    assert numbers["grad_norm"] > 0 and numbers["groups_used"] == run.rl.prompts_per_step
    assert numbers["logprob_diff_mean"] < 0.5 and tokens == sum(len(one.ids) for one in trajectories(run))
    assert_split(state.params, run.model, mesh)
    assert all(moved(state.params, weights_of(run.model)))
    if name.startswith("ppo"):
        assert numbers["critic/grad_norm"] > 0
        assert_split(state.critic.params, run.model, mesh)
        # Its head was 0, so that the first step reaches nothing below it.
        assert state.critic.params["value"][...].any() and state.critic.params["value_bias"][...] != 0
