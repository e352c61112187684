"""What all scripts here share: the tiny Qwen2, the amounts of work, and the timing."""

import json
import time
from collections.abc import Callable

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}  # 4.2 M parameters with an untied head, fp32
ROWS = 32  # in every batch
LENGTH = 256  # tokens in a row of `update`, all in the loss
PROMPT, DRAWN = 64, 192  # tokens in a row of `generate` and `grpo`: given and sampled, together `LENGTH`
GROUP = 8  # rows with the same prompt, in all works but `update` and `generate`
TOOL_PROMPT, TURNS, TURN, ANSWER = 261, 4, 36, 29  # `rollout` and `tool_step`: tool answers stand between the turns
REPEATS = 3

TOOL_DRAWN = TURNS * TURN  # tokens that a row of `rollout` samples
TOOL_LENGTH = TOOL_PROMPT + TOOL_DRAWN + (TURNS - 1) * ANSWER
TOKENS = {  # counted for the rates: of `update` those that are learned from, of the others those that are sampled
    "update": ROWS * LENGTH,
    "generate": ROWS * DRAWN,
    "grpo": ROWS * DRAWN,
    "rollout": ROWS * TOOL_DRAWN,
    "tool_step": ROWS * TOOL_DRAWN,
}


def report(work: str, step: Callable[[], object], **versions: str) -> None:
    """Measure a step REPEATS times after one that compiles, and print the fastest."""
    step()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    show(work, seconds, **versions)


def show(work: str, seconds: list[float], **versions: str) -> None:
    """Print the fastest step's CPU-seconds and tokens per CPU-second, as JSON."""
    best = min(seconds)
    numbers = {"cpu_s": round(best, 2), "tokens_per_cpu_s": round(TOKENS[work] / best)}
    print("\n" + json.dumps(numbers | {"versions": versions}))
