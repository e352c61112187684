"""A run folder that these tests make up, as the trainer leaves one."""

import base64
import json
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


def accuracy_at(step: int, tools: str) -> float:
    return 0.88 - 0.42 * math.exp(-step / 12) if tools == "python" else 0.18 + 0.02 * math.sin(step)


def make_trajectory(rng: random.Random, index: int, step: int, tools: str, output: str | None, tokens: int = 0) -> dict:
    """A record of a trajectory; with `tokens` it thinks for so many first."""
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    truth, correct = a * b, rng.random() < accuracy_at(step, tools)
    answer = truth if correct else truth + 10 * rng.randrange(1, 90)
    called = tools == "python" and rng.random() < 0.72 + 0.28 * (step > 0)
    segments, calls = [], []

    def add(role: str, text: str) -> None:
        start = segments[-1]["stop"] if segments else 0
        segments.append({"role": role, "start": start, "stop": start + max(1, len(text) // 4), "text": text})

    add("prompt", f"<|im_start|>user\nWhat is the product of {a} and {b}?<|im_end|>\n<|im_start|>assistant\n")
    thought = " ".join(str(rng.randrange(1000)) for _ in range(tokens))
    if called:
        code = f"x = {a}\ny = {b}\nprint(x * y)" if correct else f"print({a} * {b} + {answer - truth})"
        status = "success" if output is None or index else "user_error"
        text = str(answer) if output is None else output
        call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
        add("policy", thought + f"I multiply {a} and {b} with code.\n<tool_call>\n{call}\n</tool_call><|im_end|>")
        inside = f"\n<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        add("tool", inside)
        calls.append({"turn": 0, "code": code, "status": status, "output": text, "wall_s": 0.004, "queue_s": 0.001})
    add("policy", ("" if called else thought) + f"The answer is \\boxed{{{answer}}}.<|im_end|>")
    sampled = [int(s["role"] == "policy") for s in segments for _ in range(s["stop"] - s["start"])]
    prompt_tokens = segments[0]["stop"]
    return {
        "id": f"dev-{index}/0",
        "problem": f"What is the product of {a} and {b}?",
        "ground_truth": str(truth),
        "answer": str(answer),
        "correct": correct,
        "reward": 1.0 if correct else -1.0,
        "end": "answered",
        "split": "dev",
        "step": step,
        "ids": [rng.randrange(100_000) for _ in sampled] if tokens else [1] * len(sampled),
        "sampled": sampled,
        "logprobs": [-rng.expovariate(6) if on else 0.0 for on in sampled],
        "segments": segments,
        "tool_calls": calls,
        "turns": 1 + called,
        "prompt_tokens": prompt_tokens,
        "response_tokens": len(sampled) - prompt_tokens,
        "timings": {"started_s": 0.0, "finished_s": 0.4},
    }


def make_run(
    folder: Path,
    tools: str,
    seed: int,
    steps: int = 20,
    count: int = 20,
    output: str | None = None,
    tokens: int = 0,
    curves: bool = True,
) -> Path:
    """A run folder as the trainer leaves it: `count` trajectories each of every fifth step's evaluation.

    Without `curves` its metrics are of evaluations alone, and a page of it is made in half the time.
    """
    rng = random.Random(f"{tools}{seed}")
    (folder / "trajectories").mkdir(parents=True)
    with_tool, records = tools == "python", []
    rl = {"steps": steps, "max_turns": 1 + with_tool}
    config = {"seed": seed, "tools": tools, "out": f"runs/{folder.name}", "rl": rl}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    for step in range(0, 400, 10):
        records.append({"kind": "sft", "step": step, "loss": 0.2 + 5 * math.exp(-step / 60), "learning_rate": 2e-3})
    for step in range(steps + 1):
        accuracy = accuracy_at(step, tools) + rng.gauss(0, 0.025)
        rate = 1 - 0.28 * math.exp(-step / 3) if with_tool else 0.0
        if step:
            record = {
                "kind": "rl",
                "step": step,
                "reward_mean": 2 * accuracy - 1,
                "accuracy": accuracy,
                "tool_rate": rate,
            }
            record |= {"tool_success": 0.98 if with_tool else None, "calls_per_sample": rate, "grad_norm": 0.3}
            record |= {
                "entropy": 0.02 + 0.25 * math.exp(-step / 15) + rng.random() / 50,
                "clip_fraction": rng.random() / 40,
            }
            record |= {"logprob_diff_mean": 1e-6 * (1 + rng.random()), "response_tokens": 34 + 30 * rate + rng.random()}
            record |= {"end/answered": 185, "end/no_answer": 7}
            records.append(record | {"perf/tokens_per_s": 21000.0})
        if step % 5 == 0:
            name = f"trajectories/dev-{step:06d}.jsonl"
            made = [make_trajectory(rng, index, step, tools, output, tokens) for index in range(count)]
            (folder / name).write_text("".join(json.dumps(t) + "\n" for t in made))
            record = {"kind": "eval", "step": step, "split": "dev", "accuracy": accuracy, "accuracy_stderr": 0.03}
            record |= {"tool_rate": rate, "tool_success": 0.98 if with_tool else None, "response_tokens": 60.0}
            record |= {"greedy_accuracy": min(1, accuracy + 0.1)} if step % 10 == 0 else {}
            records.append(record | {"end/answered": count - 1, "end/no_answer": 1, "trajectories": name})
    records = [record for record in records if curves or record["kind"] == "eval"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = [
        {"accuracy": accuracy_at(step, tools), "accuracy_stderr": 0.03, "greedy_accuracy": 0.95, "tool_rate": 0.7}
        | {"tool_success": 0.98, "response_tokens": 61.2}
        for step in (0, steps)
    ]
    seconds = {"cold start": 95.0, "rollout": 120.0, "update": 80.0, "evaluation": 30.0, "compile": 22.0, "other": 6.0}
    summary = {"before": columns[0], "after": columns[1], "split": "test", "problems": 256, "steps": steps}
    summary |= {"tokens_per_s": {"rollout": 31000.0, "update": 21500.0}}
    summary |= {"seconds": seconds | {"total": sum(seconds.values())}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="session", name="make_run")
def make_run_fixture() -> Callable[..., Path]:
    """`make_run(folder, "python", seed)`."""
    return make_run


@dataclass
class Opened:
    """What a browser would find in a page: its HTML without the blocks, and what these hold."""

    html: str
    index: dict
    tables: list
    details: list[dict]

    def column(self, name: str) -> list:
        return self.index["columns"][name]


@pytest.fixture(scope="session", name="opened")
def opened_fixture() -> Callable[[Path], Opened]:
    """`opened(path)`: a page taken apart."""
    block = re.compile(r'<script type="text/plain"[^>]*>([A-Za-z0-9+/=]*)</script>')

    def opened(path: Path) -> Opened:
        page = path.read_text()
        found = [json.loads(zlib.decompress(base64.b64decode(text))) for text in block.findall(page)]
        index, tables, *details = found or ({}, [])
        assert index.get("starts", []) == [sum(map(len, details[:i])) for i in range(len(details))]
        return Opened(block.sub("", page), index, tables, [detail for block in details for detail in block])

    return opened
