"""Measure TRL's GRPOTrainer: `python hf_trl.py WORK`.

`grpo` is a whole step. `tool_step` is a whole step whose rows take turns with a tool; `rollout` is only the sampling in
such steps. Each turn passes the whole context of every row to the method that TRL's own tool loop calls. Tool calls are
not parsed and tools answer at once, so TRL's own loop could only take longer.
"""

import sys
import tempfile
import time

import torch
import transformers
import trl
from datasets import Dataset
from hf_torch import VERSIONS, make_model
from shape import (
    ANSWER,
    DRAWN,
    GROUP,
    MODEL,
    PROMPT,
    REPEATS,
    ROWS,
    TOOL_LENGTH,
    TOOL_PROMPT,
    TURN,
    TURNS,
    show,
)
from tokenizers import Tokenizer, models, pre_tokenizers

PAD, EOS = 0, 1


class StepTimes(transformers.TrainerCallback):
    """CPU-seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._began = time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.steps.append(time.process_time() - self._began)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer in which every id is one word."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(EOS + 1, MODEL["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def random_ids(count: int) -> list[int]:
    return torch.randint(EOS + 1, MODEL["vocab_size"], (count,)).tolist()


def tool_rollout(seconds: list[float]) -> trl.trainer.grpo_trainer.RolloutFunc:
    """A rollout of turns with tool answers in between, sampled as TRL's own loop does; appends its CPU-seconds."""

    def rollout(prompts: list[str], trainer: trl.GRPOTrainer) -> dict[str, list]:
        began = time.process_time()
        prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
        contexts, masks = [list(ids) for ids in prompt_ids], [[] for _ in prompt_ids]
        for turn in range(TURNS):
            drawn, _ = trainer._generate_single_turn(contexts, None, {}, num_generations=1)
            for context, mask, ids in zip(contexts, masks, drawn, strict=True):
                answer = random_ids(ANSWER) if turn + 1 < TURNS else []
                context += ids + answer
                mask += [1] * len(ids) + [0] * len(answer)
        seconds.append(time.process_time() - began)
        completions = [context[TOOL_PROMPT:] for context in contexts]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}

    return rollout


def main(work: str) -> None:
    model, tools = make_model(), work != "grpo"
    step_times, rollout_seconds, steps = StepTimes(), [], REPEATS + 1  # the first step warms up and does not count
    turn = TURN if tools else DRAWN
    prompts = [random_ids(TOOL_PROMPT if tools else PROMPT) for _ in range(steps * ROWS // GROUP)]
    rows = Dataset.from_list([{"prompt": " ".join(f"t{i}" for i in ids)} for ids in prompts])
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=TOOL_LENGTH - TOOL_PROMPT if tools else DRAWN,
            generation_kwargs={"max_new_tokens": turn, "min_new_tokens": turn},
            max_steps=steps,
            learning_rate=1e-4,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )

        def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
            assert len(completion_ids[0]) == settings.max_completion_length
            return [(-1.0) ** row for row in range(len(completion_ids))]

        trainer = trl.GRPOTrainer(
            model,
            reward,
            settings,
            train_dataset=rows,
            processing_class=word_tokenizer(),
            callbacks=[step_times],
            rollout_func=tool_rollout(rollout_seconds) if tools else None,
        )
        trainer.train()
    seconds = rollout_seconds if work == "rollout" else step_times.steps
    show(work, seconds[1:], trl=trl.__version__, **VERSIONS)


if __name__ == "__main__":
    main(sys.argv[1])
