"""What every script here measures: the tiny Qwen2 that all of them have, a batch of it, and how a step is timed."""

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
ROWS, LENGTH, REPEATS = 32, 256, 3


def report(step: Callable[[], object], **versions: str) -> None:
    """Print tokens per CPU-second of the fastest step, behind one that compiles, as JSON."""
    step()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    print(json.dumps({"tokens_per_cpu_s": round(ROWS * LENGTH / min(seconds)), "versions": versions}))
