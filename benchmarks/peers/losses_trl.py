"""TRL's part of `losses.py`: `python losses_trl.py FOLDER` runs FOLDER/cases.json and writes what each update did.

GRPOTrainer, SFTTrainer and the divergence of DistillationTrainer run as they are, with three exceptions. The rollout is
given (`rollout_func`), its trajectories are not shuffled before they are split into updates, and with `use_vllm` no
engine is started: the given log-probabilities are its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.trainer import distillation_trainer, grpo_trainer

PAD, EOS = 0, 1
STEADY = {  # an optimiser without a momentum, a schedule, a decay and a bound
    "learning_rate": 3e-3,
    "adam_beta1": 0.0,
    "adam_beta2": 0.98,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}
QUIET = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


class Gradients(transformers.TrainerCallback):
    """The gradient before each update, by the name of the weight."""

    def __init__(self) -> None:
        self.updates: list[dict[str, np.ndarray]] = []

    def on_pre_optimizer_step(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        self.updates.append(gradients_of(model))


class Losses:
    """The loss of each micro-batch, as a trainer's `compute_loss` returns it."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.values: list[float] = []
        self._inner, trainer.compute_loss = trainer.compute_loss, self

    def __call__(self, *words: object, **named: object) -> torch.Tensor:
        loss = self._inner(*words, **named)
        self.values.append(float(loss))
        return loss

    def by_update(self, updates: int) -> list[float]:
        return np.reshape(self.values, (updates, -1)).sum(1).tolist()


def gradients_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: w.grad.numpy().copy() for name, w in model.named_parameters() if w.grad is not None}


def word_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer in which every id is one word."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(EOS + 1, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def load(folder: Path) -> transformers.Qwen2ForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def grpo(folder: Path, case: dict, rows: list[dict]) -> tuple[list[float], list[dict]]:
    """The losses and gradients of all updates of one rollout."""
    settings = dict(case["settings"])
    updates = settings["num_iterations"] * settings["steps_per_generation"] // settings["gradient_accumulation_steps"]
    corrects = "vllm_importance_sampling_mode" in settings
    model, watch = load(folder / "policy"), Gradients()

    def rollout(prompts: list[str], _: trl.GRPOTrainer) -> dict[str, list]:
        assert len(prompts) == len(rows)
        return {
            "prompt_ids": [row["prompt"] for row in rows],
            "completion_ids": [row["completion"] for row in rows],
            "logprobs": [row["logprobs"] for row in rows],
            "env_mask": [[int(x) for x in row["sampled"]] for row in rows],
        }

    with tempfile.TemporaryDirectory() as output:
        own = {"output_dir": output, "max_steps": updates, "shuffle_dataset": False}
        config = trl.GRPOConfig(**own, **STEADY, **QUIET, **settings)
        trainer = trl.GRPOTrainer(
            model,
            lambda completions, **_: [row["reward"] for row in rows],
            config,
            train_dataset=datasets.Dataset.from_list([{"prompt": f"t{i + 2}"} for i in range(case["prompts"])]),
            processing_class=word_tokenizer(model.config.vocab_size),
            callbacks=[watch],
            rollout_func=rollout,
        )
        if config.beta:
            trainer.ref_model.load_state_dict(load(folder / "reference").state_dict())
        if corrects:
            trainer.use_vllm, trainer._last_loaded_step = True, 0
            trainer.vllm_generation = type("NoEngine", (), {"sync_weights": lambda self: None})()
        losses = Losses(trainer)
        trainer.train()
    return losses.by_update(updates), watch.updates


def sft(folder: Path, case: dict, rows: list[dict]) -> tuple[list[float], list[dict]]:
    """Two updates, each on all rows, padded to one length in micro-batches."""
    model, watch = load(folder / "policy"), Gradients()
    examples = []
    for row in rows:
        ids, sampled = row["prompt"] + row["completion"], [False] * len(row["prompt"]) + row["sampled"]
        labels = [token if own else -100 for token, own in zip(ids, sampled, strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    with tempfile.TemporaryDirectory() as output:
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(output_dir=output, max_steps=2, max_length=None, **STEADY, **QUIET, **case["settings"]),
            train_dataset=datasets.Dataset.from_list(examples),
            processing_class=word_tokenizer(model.config.vocab_size),
            callbacks=[watch],
        )
        losses = Losses(trainer)
        trainer.train()
    return losses.by_update(2), watch.updates


def distillation(folder: Path, case: dict, rows: list[dict]) -> tuple[list[float], list[dict]]:
    """The reverse KL divergence from the teacher over the whole vocabulary, of the token after the one prompt."""
    student, teacher = load(folder / "policy"), load(folder / "teacher")
    prompt = torch.tensor([rows[0]["prompt"]])
    assert all(row["prompt"] == rows[0]["prompt"] for row in rows)
    states = student.model(prompt).last_hidden_state[:, -1:]
    with torch.no_grad():
        wanted = teacher.model(prompt).last_hidden_state[:, -1:]
    loss, _, _ = distillation_trainer._chunked_divergence_loss(
        states, wanted, student.lm_head.weight, teacher.lm_head.weight, torch.ones(1, 1), **case["settings"]
    )
    loss.backward()
    return [loss.item()], [gradients_of(student)]


def main(folder: Path) -> None:
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    transformers.utils.logging.set_verbosity_error()
    losses: dict[str, list[float]] = {}
    gradients: dict[str, np.ndarray] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        if case["peer"] == "TRL":
            run = {"grpo": grpo, "sft": sft, "distillation": distillation}[case["work"]]
            losses[case["name"]], updates = run(folder, case, case["rows"])
            for index, update in enumerate(updates):
                gradients |= {f"{case['name']}|{index}|{name}": value for name, value in update.items()}
            print(case["name"], losses[case["name"]], file=sys.stderr)
    np.savez(folder / "TRL.npz", **gradients)
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}", f"trl {trl.__version__}"]
    (folder / "TRL.json").write_text(json.dumps({"losses": losses, "versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
