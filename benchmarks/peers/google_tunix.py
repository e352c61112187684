"""Measure google-tunix, with its own sampler: `python google_tunix.py update`, `generate` or `grpo`."""

import importlib.metadata
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from shape import DRAWN, GROUP, LENGTH, MODEL, PROMPT, REPEATS, ROWS, report, show
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

NEVER = MODEL["vocab_size"]  # an end id that is never sampled, so that no row stops
VERSIONS = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax", "qwix")}


class Words:
    """A tokenizer whose texts are ids, separated by spaces."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return NEVER


def make_model() -> Qwen2:
    config = ModelConfig(
        num_layers=MODEL["num_layers"],
        vocab_size=MODEL["vocab_size"],
        embed_dim=MODEL["hidden_size"],
        hidden_dim=MODEL["intermediate_size"],
        num_heads=MODEL["num_heads"],
        head_dim=MODEL["head_dim"],
        num_kv_heads=MODEL["num_kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    return Qwen2(config, rngs=nnx.Rngs(0))


def texts(rng: np.random.Generator, count: int) -> list[str]:
    return [" ".join(map(str, ids)) for ids in rng.integers(1, MODEL["vocab_size"], (count, PROMPT))]


def update() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    trainer = PeftTrainer(make_model(), optimizer, TrainingConfig(eval_every_n_steps=1000))
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (ROWS, LENGTH))
    whole = np.ones((ROWS, LENGTH), bool)
    inputs = {
        "input_tokens": tokens,
        "input_mask": whole,
        "positions": np.broadcast_to(np.arange(LENGTH), whole.shape),
        "attention_mask": np.broadcast_to(np.tri(LENGTH, dtype=bool), (ROWS, LENGTH, LENGTH)),
    }
    batch = jax.tree.map(jax.numpy.asarray, inputs)
    report("update", lambda: jax.block_until_ready(train_step(batch)), **VERSIONS)


def generate() -> None:
    sizes = CacheConfig(PROMPT + DRAWN, MODEL["num_layers"], MODEL["num_kv_heads"], MODEL["head_dim"])
    sampler, prompts = Sampler(make_model(), Words(), sizes), texts(np.random.default_rng(0), ROWS)

    def step() -> None:
        how = {"temperature": 1.0, "top_p": 1.0, "eos_tokens": [NEVER], "seed": 0}
        found = sampler(prompts, max_generation_steps=DRAWN, max_prompt_length=PROMPT, **how)
        assert all(len(ids) == DRAWN for ids in found.tokens)

    report("generate", step, **VERSIONS)


def grpo() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    steps = REPEATS + 3  # the first ones compile
    cluster = RLCluster(
        actor=make_model(),
        tokenizer=Words(),
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=RLTrainingConfig(
                eval_every_n_steps=1000, max_steps=steps, actor_optimizer=optax.adamw(1e-4)
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=DRAWN,
                max_prompt_length=PROMPT,
                kv_cache_size=PROMPT + DRAWN,
                temperature=1.0,
                top_p=1.0,
                eos_tokens=[NEVER],
            ),
        ),
    )
    rewarded_at: list[float] = []

    def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        rewarded_at.append(time.process_time())
        return [(-1.0) ** row for row in range(len(completions))]

    rng = np.random.default_rng(0)
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=GROUP, beta=0.0), reward)
    learner.train([{"prompts": np.array(texts(rng, ROWS // GROUP))} for _ in range(steps)])
    # The time from one call of `reward` to the next is that of an update and a rollout.
    show("grpo", np.diff(rewarded_at)[2:].tolist(), **VERSIONS)


if __name__ == "__main__":
    {"update": update, "generate": generate, "grpo": grpo}[sys.argv[1]]()
