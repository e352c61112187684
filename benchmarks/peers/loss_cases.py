"""What `losses.py` compares: for each case our config and a peer's settings that should give the same update.

Cases with `why` are known to differ; the text says where. A learning rate of 3e-3 moves the policy so far in an update
that bounds are active in the next ones.
"""

from dataclasses import dataclass, field

import numpy as np

VOCAB, LENGTH = 64, 32  # tokens of the vocabulary, and the most in a trajectory
PROMPTS, GROUP = 4, 4
MODEL = (
    *(f"model.vocab_size={VOCAB}", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64"),
    *("model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8", "model.tie_embeddings=false"),
)
STEADY = (  # an optimiser without a momentum, a schedule, a decay and a bound
    *("rl.optimizer.learning_rate=3e-3", "rl.optimizer.b1=0", "rl.optimizer.weight_decay=0"),
    *("rl.optimizer.max_grad_norm=1e9", "rl.optimizer.warmup_steps=0", "rl.optimizer.decay_steps=0"),
)
OURS = (
    *("config=grpo", *MODEL, *STEADY, f"engine.max_length={LENGTH}", "rollout.max_prompt_tokens=10"),
    *("rl.row_length=64", "rl.rows_per_micro=1", f"rl.prompts_per_step={PROMPTS}", f"rl.group_size={GROUP}"),
)
EOS = 1


@dataclass(frozen=True)
class Case:
    """One comparison: a few updates on the same trajectories."""

    name: str
    peer: str
    words: tuple[str, ...]  # of our config, beside `OURS`
    settings: dict
    work: str = "grpo"  # or sft, distillation
    why: str = ""  # they differ by design: where
    rows: list[dict] = field(default_factory=list)  # other trajectories than those of most cases
    noise: float = 0.0  # above 0: the engine's log-probabilities are the policy's with this deviation


def trajectories(seed: int = 0) -> list[dict]:
    """Groups of trajectories of different lengths with a tool's answer in most of them, and one of a single token.

    A completion is what follows the prompt; its log-probabilities are those of an engine, and 0 where nothing was
    sampled. Two completions of each group have no end token. The rewards of a group have mean 0 and deviation 1, so
    that an advantage is the same with and without a division by the deviation.
    """
    rng, rows = np.random.default_rng(seed), []
    for group in range(PROMPTS):
        rewards = rng.normal(size=GROUP)
        rewards = (rewards - rewards.mean()) / rewards.std()
        prompt = rng.integers(2, VOCAB, rng.integers(4, 10)).tolist()
        for sample in range(GROUP):
            parts = [rng.integers(2, VOCAB, n).tolist() for n in rng.integers((3, 2, 1), (9, 6, 7))]
            parts = [parts[0][:1]] if (group, sample) == (1, 2) else parts
            completion = [token for part in parts for token in part]
            completion[-1] = EOS if sample % 2 else completion[-1]
            sampled = [place != 1 for place, part in enumerate(parts) for _ in part]
            drawn = rng.normal(-np.log(VOCAB), 0.4, len(completion)).tolist()
            rows.append(
                {
                    "group": group,
                    "prompt": prompt,
                    "completion": completion,
                    "sampled": sampled,
                    "logprobs": [value if own else 0.0 for value, own in zip(drawn, sampled, strict=True)],
                    "reward": float(rewards[sample]),
                }
            )
    return rows


# --- TRL --------------------------------------------------------------------------------------------------------------

DEAL = [0, 2, 1, 3]  # the order of groups for TRL, which takes them in order; we deal them out to the updates
TWICE = ("rl.minibatches=2", "rl.epochs=2", "rl.old_logprobs=trainer")  # four updates, of two groups each
WHOLE = ("rl.minibatches=1", "rl.epochs=2", "rl.old_logprobs=trainer")  # two updates, of all groups
CENTRED = ("rl.algorithm=dr_grpo", "rl.clip.dual=1e6")  # the reward minus the group's mean, and no bound but two
TRL_TWICE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
TRL_WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
TRL_ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
TRL_ALL = {"num_generations": GROUP, "num_iterations": 2, "max_completion_length": LENGTH, "beta": 0.0}
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
PER_SEQUENCE, PER_TOKEN = ("rl.aggregation=sequence_token_mean",), ("rl.aggregation=token_mean",)


def trl(name: str, words: tuple[str, ...], parts: dict, why: str = "", rows: list[dict] | None = None, **more) -> Case:
    settings = TRL_ALL | CLIP | parts | {"scale_rewards": "none"} | more
    return Case(name, "TRL", words, settings, why=why, rows=rows or [])


def equal_rewards() -> list[dict]:
    return [row | ({"reward": 1.0} if row["group"] == 2 else {}) for row in trajectories()]


TRL_CASES = [
    trl("grpo", (*TWICE, *CENTRED, *PER_SEQUENCE), TRL_TWICE, loss_type="grpo"),
    trl("bnpo, one micro-batch", (*TWICE, *CENTRED, *PER_TOKEN), TRL_ONE, loss_type="bnpo"),
    trl(
        "bnpo, two micro-batches",
        (*TWICE, *CENTRED, *PER_TOKEN),
        TRL_TWICE,
        "TRL's mean of the means of micro-batches depends on how rows are cut",
        loss_type="bnpo",
    ),
    trl("dapo, one update an epoch", (*WHOLE, *CENTRED, *PER_TOKEN), TRL_WHOLE, loss_type="dapo"),
    trl(
        "dapo, two updates an epoch",
        (*TWICE, *CENTRED, *PER_TOKEN),
        TRL_TWICE,
        "TRL divides by the mean number of tokens of the rollout's updates, we by the update's own",
        loss_type="dapo",
    ),
    trl("dr_grpo", (*TWICE, *CENTRED), TRL_TWICE, loss_type="dr_grpo"),
    trl(
        "gspo",
        (*TWICE, "rl.algorithm=gspo", "rl.clip.dual=1e6"),
        TRL_TWICE,
        loss_type="grpo",
        importance_sampling_level="sequence",
    ),
    trl(
        "cispo",
        (*WHOLE, "rl.algorithm=cispo", "rl.clip.low=1", "rl.clip.high=0.28"),
        TRL_WHOLE,
        loss_type="cispo",
        epsilon_high=1.28,
    ),
    trl(
        "delta (dual)",
        (*TWICE, "rl.algorithm=dr_grpo", "rl.clip.dual=1.5", *PER_SEQUENCE),
        TRL_TWICE,
        delta=1.5,
        loss_type="grpo",
    ),
    trl(
        "KL in the loss",
        (*TWICE, *CENTRED, *PER_SEQUENCE, "rl.kl.coefficient=0.1"),
        TRL_TWICE,
        loss_type="grpo",
        beta=0.1,
        use_bias_correction_kl=False,
    ),
    trl(
        "use_bias_correction_kl",
        (*TWICE, *CENTRED, *PER_SEQUENCE, "rl.kl.coefficient=0.1"),
        TRL_TWICE,
        "TRL's default multiplies the KL by the ratio",
        loss_type="grpo",
        beta=0.1,
    ),
    trl(
        "entropy, one micro-batch",
        (*TWICE, *CENTRED, *PER_TOKEN, "rl.entropy_coefficient=0.05"),
        TRL_ONE,
        entropy_coef=0.05,
        loss_type="bnpo",
    ),
    trl(
        "entropy, grpo",
        (*TWICE, *CENTRED, *PER_SEQUENCE, "rl.entropy_coefficient=0.05"),
        TRL_TWICE,
        "TRL's entropy is a mean over the tokens of a micro-batch for every loss, ours is averaged as the loss",
        entropy_coef=0.05,
        loss_type="grpo",
    ),
    trl(
        "temperature 0.7",
        (*TWICE, *CENTRED, *PER_SEQUENCE, "rl.temperature=0.7"),
        TRL_TWICE,
        temperature=0.7,
        loss_type="grpo",
    ),
    *(
        trl(
            f"correction {ours}",
            (*TWICE, *CENTRED, *PER_SEQUENCE, f"rl.correction={ours}"),
            TRL_TWICE,
            loss_type="grpo",
            vllm_importance_sampling_mode=theirs,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        )
        for ours, theirs, low, high in (
            ("token_tis", "token_truncate", None, 2.0),
            ("sequence_mask", "sequence_mask", None, 3.0),
            ("band", "token_mask", 0.5, 5.0),
        )
    ),
    trl(
        "scale_rewards=group",
        (*TWICE, "rl.algorithm=grpo", "rl.clip.dual=1e6", *PER_SEQUENCE),
        TRL_TWICE,
        "TRL divides by the sample's deviation, we by the population's: ours is sqrt(n / (n - 1)) larger",
        loss_type="grpo",
        scale_rewards="group",
    ),
    trl(
        "a group of equal rewards",
        (*WHOLE, *CENTRED, *PER_TOKEN),
        TRL_WHOLE,
        "it stays in TRL's denominator, and we leave it out",
        equal_rewards(),
        loss_type="dapo",
    ),
    trl(
        "mask_truncated_completions",
        (*TWICE, *CENTRED, *PER_SEQUENCE),
        TRL_TWICE,
        "TRL can take them out of the loss; here they learn from their reward",
        loss_type="grpo",
        mask_truncated_completions=True,
    ),
    Case(
        "SFT",
        "TRL",
        (),
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        work="sft",
    ),
    Case(
        "reverse KL from a teacher",
        "TRL",
        (
            *("rl.algorithm=opd", "rl.minibatches=1", "rl.prompts_per_step=1", f"rl.group_size={VOCAB}"),
            *("rl.old_logprobs=trainer", "rl.correction=sequence_mask", "rl.teacher.init_from=teacher"),
        ),
        {"beta": 1.0},
        work="distillation",
        # Every token once, as if an engine had drawn them evenly: the correction weighs each by its probability, so the
        # mean over them is the expectation, and the estimate from single tokens becomes exact.
        rows=[
            {
                **{"group": 0, "prompt": [5, 9, 4, 33, 7], "completion": [token], "sampled": [True], "reward": 1.0},
                "logprobs": [-float(np.log(VOCAB))],
            }
            for token in range(VOCAB)
        ],
    ),
]

# --- verl -------------------------------------------------------------------------------------------------------------

VERL_CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}
ONCE = ("rl.minibatches=1", "rl.epochs=2")  # two updates, of all groups
PPO = ("rl.algorithm=ppo", "rl.discount=0.95", "rl.gae_lambda=0.9", "rl.critic.value_clip=0.05")
CRITIC = tuple(word.replace("rl.", "rl.critic.") for word in STEADY)


def verl(name: str, words: tuple[str, ...], why: str = "", noise: float = 0.0, **more) -> Case:
    standard = {"advantage": "dr_grpo", "loss": "vanilla", "aggregation": "token-mean", "clip": VERL_CLIP}
    return Case(name, "verl", (*ONCE, *words), standard | more, why=why, noise=noise)


def verl_kl(kind: str, place: str) -> dict:
    return {"kl": {"coefficient": 0.1, "type": kind, "place": place}}


DR = ("rl.algorithm=dr_grpo",)
GAE = {"advantage": "gae", "discount": 0.95, "gae_lambda": 0.9, "value_clip": 0.05}
VERL_CASES = [
    verl("token-mean", (*DR, *PER_TOKEN)),
    verl("seq-mean-token-mean", (*DR, *PER_SEQUENCE), aggregation="seq-mean-token-mean"),
    verl("seq-mean-token-sum", (*DR, "rl.aggregation=sequence_token_sum"), aggregation="seq-mean-token-sum"),
    verl("seq-mean-token-sum-norm", DR, aggregation="seq-mean-token-sum-norm", longest=LENGTH),
    verl("dual clip 1.5", (*DR, *PER_TOKEN, "rl.clip.dual=1.5"), clip=VERL_CLIP | {"clip_ratio_c": 1.5}),
    verl("rloo", ("rl.algorithm=rloo",), advantage="rloo"),
    verl(
        "grpo",
        ("rl.algorithm=grpo",),
        "verl divides by the sample's deviation, as TRL does",
        advantage="grpo",
    ),
    verl(
        "gspo",
        ("rl.algorithm=gspo", "rl.clip.dual=1e6"),
        loss="gspo",
        aggregation="seq-mean-token-mean",
    ),
    verl(
        "cispo",
        ("rl.algorithm=cispo", "rl.clip.low=0.2"),
        loss="cispo",
        clip={"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
    ),
    *(
        verl(
            f"KL {kind} in the loss",
            (*DR, *PER_TOKEN, "rl.kl.coefficient=0.1", f"rl.kl.estimator={kind}"),
            **verl_kl(kind, "loss"),
        )
        for kind in ("k2", "k3")
    ),
    verl(
        "entropy", (*DR, *PER_SEQUENCE, "rl.entropy_coefficient=0.05"), aggregation="seq-mean-token-mean", entropy=0.05
    ),
    *(
        verl(
            f"correction {ours}",
            (*DR, *PER_TOKEN, "rl.old_logprobs=trainer", f"rl.correction={ours}"),
            why,
            noise,
            old="trainer",
            correction=theirs,
        )
        for ours, theirs, noise, why in (
            ("token_tis", {"rollout_is": "token", "rollout_is_threshold": 2.0}, 0.0, ""),
            ("band", {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"}, 0.0, ""),
            (
                "geometric",
                {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.99_1.01"},
                0.03,
                "verl takes rejected tokens out of the denominator, too",
            ),
        )
    ),
    verl(
        "KL in the reward",
        (*DR, *PER_TOKEN, "rl.kl.coefficient=0.1", "rl.kl.place=reward", "rl.kl.estimator=k1"),
        "verl compares rewards minus the whole answer's KL, we subtract a token's own KL from its advantage",
        **verl_kl("k1", "reward"),
    ),
    verl("PPO, policy", (*PPO, *CRITIC), **GAE),
    verl("PPO, critic", (*PPO, *CRITIC), **GAE, learns="critic"),
    verl(
        "PPO, critic, KL in the reward",
        (*PPO, *CRITIC, "rl.kl.coefficient=0.1", "rl.kl.place=reward", "rl.kl.estimator=k1"),
        **GAE,
        **verl_kl("k1", "reward"),
        learns="critic",
    ),
    verl(
        "PPO, policy, KL in the reward",
        (*PPO, *CRITIC, "rl.kl.coefficient=0.1", "rl.kl.place=reward", "rl.kl.estimator=k1"),
        **GAE,
        **verl_kl("k1", "reward"),
    ),
]
CASES = TRL_CASES + VERL_CASES
