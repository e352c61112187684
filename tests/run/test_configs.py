"""Configs of real scale agree with their sources, line by line, and describe possible models and meshes."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from retool_jax.engine.config import sizes
from retool_jax.fields import flatten
from retool_jax.learn.optimizer import learning_rate
from retool_jax.mesh_config import MeshConfig
from retool_jax.models.config import SIZES
from retool_jax.models.decoder import abstract_params
from retool_jax.run.build import mesh_of
from retool_jax.run.load import CONFIGS, load
from retool_jax.run.weights import abstract_state

PUBLISHED = json.loads((Path(__file__).parents[1] / "models" / "published_configs.json").read_text())

ADAM = {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "max_grad_norm": 1.0, "warmup_steps": 0, "decay_steps": 0}
# The numbers of verl-recipe's run_qwen2-32b_dapo.sh, and of what it leaves at verl v0.6.1's default.
RECIPE = {
    "tools": "python",
    "rollout.grammar": "hermes",
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_turns": 8,
    "engine.max_length": 2048 + 16384,
    "sandbox.limits.wall_s": 30.0,
    "sandbox.limits.memory_mb": 1024,
    "rl.algorithm": "grpo",
    "rl.steps": 150,
    "rl.prompts_per_step": 512,
    "rl.group_size": 16,
    "rl.minibatches": 512 // 64,
    "rl.epochs": 1,
    "rl.temperature": 1.0,
    "rl.aggregation": "token_mean",
    "rl.clip.low": 0.2,
    "rl.clip.high": 0.28,
    "rl.clip.dual": 10.0,
    "rl.entropy_coefficient": 0.0,
    "rl.kl.coefficient": 0.0,
    "rl.old_logprobs": "trainer",
    "rl.correction": "none",
    "rl.reward.name": "recipe",
    "rl.groups.dynamic": False,
    "rl.ahead": 0,
    "rl.optimizer.learning_rate": 1e-6,
    **{f"rl.optimizer.{key}": value for key, value in ADAM.items()},
    "evaluation.every": 5,
    "evaluation.problems": 30,
    "checkpoint.every": 30,
}
PAPER = RECIPE | {
    "rollout.grammar": "retool",
    "rollout.tool_prompt": "paper",
    "rl.steps": 400,
    "rl.minibatches": 1,
    "rl.clip.high": 0.2,
    "rl.clip.dual": 3.0,
    "rl.reward.name": "default",
}
# run_qwen2-32b_ppo.sh
PPO = RECIPE | {
    "rl.algorithm": "ppo",
    "rl.steps": 250,
    "rl.prompts_per_step": 1024,
    "rl.group_size": 1,
    "rl.minibatches": 1024 // 256,
    "rl.discount": 1.0,
    "rl.gae_lambda": 1.0,
    "rl.critic.warmup_steps": 20,
    "rl.critic.value_clip": 0.5,
    "rl.critic.optimizer.learning_rate": 2e-6,
    **{f"rl.critic.optimizer.{key}": value for key, value in ADAM.items()},
}
# run_qwen2_7b_dapo.sh
SMALLER = RECIPE | {
    "rollout.max_turns": 16,
    "rl.steps": 200,
    "rl.prompts_per_step": 64,
    "rl.minibatches": 64 // 16,
    "evaluation.every": 10,
    "checkpoint.every": 20,
}
# miles' run_retool_multi_turn.py
MILES = RECIPE | {
    "init_from": "font-info/qwen3-4b-sft-SGLang-RL",
    "rollout.max_turns": 16,
    "rollout.turn_tokens": 8192,
    "sandbox.limits.wall_s": 120.0,
    "sandbox.limits.memory_mb": 4096,
    "rl.steps": 3000,
    "rl.prompts_per_step": 32,
    "rl.group_size": 8,
    "rl.minibatches": 1,
    "rl.aggregation": "sequence_token_mean",
    "rl.clip.dual": 1e6,
    "rl.reward.name": "dapo_strict",
    "rl.optimizer.b2": 0.98,
    "rl.optimizer.weight_decay": 0.1,
    "evaluation.every": 20,
    "checkpoint.every": 20,
}
# run_qwen3_4b_opd.sh of wencanning/test-opd
DISTILLED = RECIPE | {
    "init_from": "JiangHoucheng/multiturn-sft-qwen-3-4b",
    "rollout.max_turns": 16,
    "rollout.turn_tokens": 0,
    "rl.algorithm": "opd",
    "rl.steps": round(17398 / 64),
    "rl.prompts_per_step": 64,
    "rl.minibatches": 64 // 16,
    "rl.clip.high": 0.2,
    "rl.clip.dual": 3.0,
    "rl.teacher.form": "gated",
    "rl.teacher.gate_low": 0.0,
    "rl.teacher.gate_high": 0.05,
    "rl.teacher.gate_slope": 1.0,
    "evaluation.every": 10,
}
SAID = {
    "grpo_qwen2.5_32b": ("Qwen2.5-32B-Instruct", RECIPE),
    "grpo_qwen2.5_32b_paper": ("Qwen2.5-32B-Instruct", PAPER),
    "ppo_qwen2.5_32b": ("Qwen2.5-32B-Instruct", PPO),
    "grpo_qwen2.5_7b": ("Qwen2.5-7B-Instruct", SMALLER),
    "grpo_qwen3_4b": ("Qwen3-4B-Instruct-2507", MILES),
    "opd_qwen3_4b": ("Qwen3-4B-Instruct-2507", DISTILLED),
}
# What an evaluation has of the recipe's validation, whatever its set.
EVALUATED = [f"eval_{name}" for name in ("aime24", "aime25", "aime26", "math500", "gsm8k")]
OURS = [*SAID, "sft_smollm2", "grpo_smollm2", "grpo_smollm2_text"]


@pytest.mark.parametrize("name", SAID)
def test_a_config_has_the_numbers_of_its_source(name):
    run = load([f"config={name}"])
    flat = flatten(run)
    assert {key: flat[key] for key in SAID[name][1]} == SAID[name][1]
    assert [float(learning_rate(run.rl.optimizer)(step)) for step in (0, run.rl.steps)] == pytest.approx([1e-6] * 2)
    assert run.init_from and run.data.train == "dapo_math_17k.jsonl" and run.tokenizer in ("", run.init_from)
    assert {run.data.dev, run.data.test} == {"yentinglin/aime_2025", "Maxwell-Jia/AIME_2024"}
    assert "process" not in run.sandbox.backend  # which isolates nothing


@pytest.mark.parametrize("name", SAID)
def test_a_config_describes_the_published_model_on_a_mesh_that_it_divides_over(name):
    published = dict(zip(PUBLISHED["columns"], PUBLISHED["models"][SAID[name][0]], strict=True))
    run = load([f"config={name}"])
    names = {ours: theirs for ours, theirs in SIZES.items() if theirs in published}
    names |= {"rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}
    names |= {"qkv_bias": "attention_qkv_bias", "qk_norm": "qk_norm"}
    assert {ours: getattr(run.model, ours) for ours in names} == {ours: published[names[ours]] for ours in names}
    weights = jax.tree.leaves(abstract_params(run.model)[1])
    assert sum(math.prod(weight.shape) for weight in weights) == published["n_params"]
    mesh = mesh_of(replace(run, mesh=MeshConfig(data=1, fsdp=4, tp=2)))
    for weight in jax.tree.leaves(abstract_state(run, mesh).params):
        assert len(weight.sharding.shard_shape(weight.shape)) == weight.ndim
    cache = sizes(run.engine, "ragged")
    assert cache.page_size == 128 and cache.pages * 128 >= 4 * run.engine.max_length
    assert run.rl.row_length == run.engine.max_length and run.model.remat == "full"


@pytest.mark.parametrize("name", ["grpo_qwen2.5_32b", "ppo_qwen2.5_32b", "grpo_qwen2.5_7b", "grpo_qwen3_4b"])
def test_the_state_of_a_config_is_split_over_all_devices_and_no_micro_batch_is_padded(name):
    """Programs of all configs are lowered in tests/plan/test_functions.py."""
    run = load([f"config={name}"])
    rl, devices = run.rl, 8
    state = abstract_state(run, mesh_of(replace(run, mesh=MeshConfig(data=1, fsdp=4, tp=2))))
    parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state)]
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert sum(map(math.prod, parts)) == pytest.approx(whole / devices, rel=0.01)
    trajectories = rl.prompts_per_step // rl.minibatches * rl.group_size
    assert trajectories % rl.rows_per_micro == 0, "even where each fills a row"


def test_a_small_model_takes_its_shape_from_its_cold_start():
    run = load(["config=grpo_smollm2"])
    cold = load(["config=sft_smollm2"])
    assert (run.tokenizer, run.rollout.grammar, run.init_from) == ("", "retool", cold.run)
    assert (run.rollout.grammar, run.rollout.tool_prompt) == (cold.sft.grammar, cold.sft.tool_prompt)
    assert run.engine.max_length == 256 and run.rl.row_length == cold.sft.row_length == 512


def test_the_control_without_tools_differs_in_nothing_else():
    run, control = flatten(load(["config=grpo_smollm2"])), flatten(load(["config=grpo_smollm2_text"]))
    assert {key for key in run if run[key] != control[key]} == {"run", "tools", "init_from"}


@pytest.mark.parametrize("name", OURS)
def test_every_value_has_its_source_on_its_line(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    bare = [line for line in lines if line and not line.startswith("#") and not re.search(r"\S\s+# \w", line)]
    assert all(re.fullmatch(r"\s*\w+:|task: \w+", line) for line in bare), bare


@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_has_the_budget_of_the_recipe_and_the_samples_of_its_source(name):
    run = load([f"config={name}", "init_from=runs/mine"])
    flat = flatten(run)
    shared = RECIPE.keys() & flat.keys() - {"evaluation.problems"}
    assert "engine.max_length" in shared and "rollout.max_turns" in shared
    assert {key: flat[key] for key in shared} == {key: RECIPE[key] for key in shared}
    samples, top_p = {"eval_math500": (4, 0.7), "eval_gsm8k": (2, 0.7)}.get(name, (30, 0.6))
    assert (run.evaluation.samples, run.evaluation.top_p, run.evaluation.problems) == (samples, top_p, 0)
    assert run.data.source != "arithmetic" and "process" not in run.sandbox.backend
    paper = ["evaluation.preset=paper", "rollout.grammar=retool", "rollout.tool_prompt=paper"]
    published = load([f"config={name}", "init_from=JoeYing/ReTool-Qwen-32B", *paper])
    assert published.evaluation.top_p == 0.7 and published.evaluation.temperature == 1.0
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    bare = [line for line in lines if line and not line.startswith("#") and not re.search(r"\S\s+# \w", line)]
    assert all(re.fullmatch(r"\s*\w+:|task: evaluate|base: eval_aime24", line) for line in bare), bare
