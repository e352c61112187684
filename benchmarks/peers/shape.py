"""What every script here measures: the tiny Qwen2 of all of them, how much work there is, and how it is timed."""

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
ROWS = 32  # of every batch
LENGTH = 256  # tokens of a row of `update`, all of them in the loss
PROMPT, DRAWN = 64, 192  # tokens of `generate` and `grpo`, a row; as many as `LENGTH` together
GROUP = 8  # rows of `grpo` and `tool_step` that have one prompt
TOOL_PROMPT, TURNS, TURN, ANSWER = 261, 4, 36, 29  # `rollout` and `tool_step`: turns of a row, with answers between
REPEATS = 3

TOOL_DRAWN = TURNS * TURN  # tokens that a row of `rollout` draws
TOOL_LENGTH = TOOL_PROMPT + TOOL_DRAWN + (TURNS - 1) * ANSWER
TOKENS = {  # that each work is told in: those that are learned from, or those that are drawn
    "update": ROWS * LENGTH,
    "generate": ROWS * DRAWN,
    "grpo": ROWS * DRAWN,
    "rollout": ROWS * TOOL_DRAWN,
    "tool_step": ROWS * TOOL_DRAWN,
}


def report(work: str, step: Callable[[], object], **versions: str) -> None:
    """Print what the fastest step takes, behind one that compiles."""
    step()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    show(work, seconds, **versions)


def show(work: str, seconds: list[float], **versions: str) -> None:
    """Print CPU seconds of the fastest step and tokens per CPU-second, as JSON."""
    best = min(seconds)
    numbers = {"cpu_s": round(best, 2), "tokens_per_cpu_s": round(TOKENS[work] / best)}
    print("\n" + json.dumps(numbers | {"versions": versions}))
