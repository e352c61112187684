"""verl's part of `losses.py`: `python losses_verl.py FOLDER` runs FOLDER/cases.json and writes what each update did.

The advantages, losses and corrections are verl's functions, called with the numbers of a Qwen2 of transformers in the
order of verl's trainer: old log-probabilities and values, reward and penalty, advantage, then two updates, each of
which adds the gradients of two micro-batches.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig

UPDATES, MICRO_BATCHES = 2, 2
ADAMW = {"lr": 3e-3, "betas": (0.0, 0.98), "weight_decay": 0.0}
POLICY_LOSSES = {
    "vanilla": core_algos.compute_policy_loss_vanilla,
    "gspo": core_algos.compute_policy_loss_gspo,
    "cispo": core_algos.compute_policy_loss_cispo,
}


class Critic(torch.nn.Module):
    """A Qwen2 whose head is one output; verl's is the token classification of transformers with one label."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = load(folder / "policy").model
        head = np.load(folder / "value_head.npz")
        self.value = torch.nn.Parameter(torch.tensor(head["value"]))
        self.value_bias = torch.nn.Parameter(torch.tensor(head["value_bias"]))


class Rows:
    """The trajectories, prompts padded on the left and completions on the right, as verl pads them."""

    def __init__(self, rows: list[dict]) -> None:
        prompts, completions = (max(len(row[name]) for row in rows) for name in ("prompt", "completion"))

        def right(name: str) -> torch.Tensor:
            return torch.tensor([row[name] + [0] * (completions - len(row[name])) for row in rows])

        left = [[0] * (prompts - len(row["prompt"])) + row["prompt"] for row in rows]
        self.completions = right("completion")
        self.ids = torch.cat([torch.tensor(left), self.completions], 1)
        starts = torch.tensor([prompts - len(row["prompt"]) for row in rows])
        stops = torch.tensor([prompts + len(row["completion"]) for row in rows])
        places = torch.arange(self.ids.shape[1])
        self.attention = ((places >= starts[:, None]) & (places < stops[:, None])).long()
        self.positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        self.mask = right("sampled").float()
        self.engine = right("logprobs").float()
        self.groups = np.array([row["group"] for row in rows])
        self.rewards = torch.zeros_like(self.engine)
        for row, reward in enumerate(row["reward"] for row in rows):
            self.rewards[row, self.mask[row].nonzero()[-1]] = reward

    def states(self, model: torch.nn.Module, part: slice) -> torch.Tensor:
        """The hidden state before each token of the completions."""
        found = model(self.ids[part], attention_mask=self.attention[part], position_ids=self.positions[part])
        return found.last_hidden_state[:, -self.completions.shape[1] - 1 : -1]

    def logprobs(self, model: torch.nn.Module, part: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the completions' tokens."""
        every = model.lm_head(self.states(model.model, part)).log_softmax(-1)
        return every.gather(-1, self.completions[part][..., None])[..., 0], -(every.exp() * every).sum(-1)

    def values(self, critic: Critic, part: slice = slice(None)) -> torch.Tensor:
        return self.states(critic.model, part) @ critic.value + critic.value_bias


def load(folder: Path) -> transformers.Qwen2ForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(folder: Path) -> None:
    losses: dict[str, list[float]] = {}
    gradients: dict[str, np.ndarray] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        if case["peer"] == "verl":
            losses[case["name"]], updates = run(folder, Rows(case["rows"]), case["settings"])
            for index, update in enumerate(updates):
                gradients |= {f"{case['name']}|{index}|{name}": value for name, value in update.items()}
            print(case["name"], losses[case["name"]], file=sys.stderr)
    np.savez(folder / "verl.npz", **gradients)
    versions = [
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__} with verl",
        f"verl {version('verl')}",
    ]
    (folder / "verl.json").write_text(json.dumps({"losses": losses, "versions": versions}))


def run(folder: Path, rows: Rows, settings: dict) -> tuple[list[float], list[dict]]:
    """Losses and gradients of the updates of a policy, or of a critic where the settings have learns=critic."""
    policy, mask = load(folder / "policy"), rows.mask
    critic = Critic(folder) if settings["advantage"] == "gae" else None
    with torch.no_grad():
        old = rows.logprobs(policy)[0] if settings.get("old") == "trainer" else rows.engine
        reference = rows.logprobs(load(folder / "reference"))[0]
        values = rows.values(critic) if critic else None
    rewards, kl = rows.rewards, settings.get("kl")
    if kl and kl["place"] == "reward":
        rewards = rewards - kl["coefficient"] * core_algos.kl_penalty(old, reference, kl["type"]) * mask
    advantages, returns = advantages_of(settings, rewards, rows, values)
    importance = None
    if "correction" in settings:
        found, mask, _ = compute_rollout_correction_and_rejection_mask(old, rows.engine, mask, **settings["correction"])
        importance = found.batch["rollout_is_weights"] if found is not None else None
    totals = {"dp_size": 1, "batch_num_tokens": mask.sum(), "global_batch_size": len(mask)}
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings["clip"])
    object.__setattr__(config, "global_batch_info", totals | {"loss_scale_factor": settings.get("longest")})

    def policy_loss(part: slice) -> torch.Tensor:
        new, entropy = rows.logprobs(policy, part)
        weights = None if importance is None else importance[part]
        how = settings["aggregation"], config, weights
        loss, _ = POLICY_LOSSES[settings["loss"]](old[part], new, advantages[part], mask[part], *how)
        terms = [(-settings.get("entropy", 0.0), entropy)]
        if kl and kl["place"] == "loss":
            terms.append((kl["coefficient"], core_algos.kl_penalty(new, reference[part], kl["type"])))
        for factor, term in terms:
            loss = loss + factor * core_algos.agg_loss(
                term, mask[part], settings["aggregation"], **config.global_batch_info
            )
        return loss

    def value_loss(part: slice) -> torch.Tensor:
        new, clip = rows.values(critic, part), settings["value_clip"]
        given = returns[part], values[part], mask[part]
        return core_algos.compute_value_loss(new, *given, clip, "token-mean", **totals)[0]

    learns_values = settings.get("learns") == "critic"
    model, loss_of = (critic, value_loss) if learns_values else (policy, policy_loss)
    optimizer, losses, gradients = torch.optim.AdamW(model.parameters(), **ADAMW), [], []
    size = len(mask) // MICRO_BATCHES
    for _ in range(UPDATES):
        optimizer.zero_grad()
        parts = [loss_of(slice(i * size, (i + 1) * size)) for i in range(MICRO_BATCHES)]
        sum(parts).backward()
        losses.append(sum(parts).item())
        gradients.append({name: w.grad.numpy().copy() for name, w in model.named_parameters() if w.grad is not None})
        optimizer.step()
    return losses, gradients


def advantages_of(
    settings: dict, rewards: torch.Tensor, rows: Rows, values: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's advantages and returns."""
    if settings["advantage"] == "gae":
        discount, lam = settings["discount"], settings["gae_lambda"]
        return core_algos.compute_gae_advantage_return(rewards, values, rows.mask, discount, lam)
    if settings["advantage"] == "rloo":
        return core_algos.compute_rloo_outcome_advantage(rewards, rows.mask, rows.groups)
    divides = settings["advantage"] == "grpo"
    return core_algos.compute_grpo_outcome_advantage(
        rewards.clone(), rows.mask, rows.groups, norm_adv_by_std_in_grpo=divides
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
