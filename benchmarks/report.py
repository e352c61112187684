"""Measure the size of a report with many trajectories and the time to write and to open it.

    python benchmarks/report.py [trajectories=10000] [tokens=100] [steps=60] [browser=chromium] [out=FOLDER]

Makes a synthetic run with an evaluation at every fifth step. Its trajectories have `tokens` sampled tokens, with words
from a vocabulary of 4,000, and a program with its output. Prints JSON: megabytes of the files and of the page, how many
trajectories the page shows, seconds to write it, and, if there is a Chromium, `ready_ms`: the milliseconds from the
start of the page's load until its list can be used, as the page itself records. `out` keeps the folder and the page.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import arguments

from retool_jax.report.page import write_report

DEFAULTS = {"trajectories": 10_000, "tokens": 100, "steps": 60, "browser": "chromium", "out": ""}
EVERY = 5


def main(words: list[str]) -> None:
    options = arguments.parse(words, DEFAULTS)
    folder = Path(options["out"] or tempfile.mkdtemp(prefix="retool-report-"))
    make_run(folder, options["trajectories"], options["tokens"], options["steps"])
    page, began = folder / "report.html", time.monotonic()
    write_report([folder], page)
    numbers = {
        "benchmark": "report",
        "trajectories": options["trajectories"],
        "files_mb": sum(path.stat().st_size for path in (folder / "trajectories").iterdir()) / 1e6,
        "write_s": time.monotonic() - began,
        "page_mb": page.stat().st_size / 1e6,
        "shown": shown(page),
        "ready_ms": ready(options["browser"], page),
    }
    print(json.dumps(numbers))
    if not options["out"]:
        shutil.rmtree(folder)


def make_run(folder: Path, count: int, tokens: int, steps: int) -> None:
    """A run folder with metrics and `count` trajectories."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randrange(1, 8))) for _ in range(4000)]
    ranks = [1 / (rank + 10) for rank in range(4000)]
    (folder / "trajectories").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\ntokenizer: miniature\n")
    evaluated_steps, lines = range(0, steps + 1, EVERY), []
    for step in range(steps + 1):
        numbers = {
            "kind": "rl",
            "step": step,
            "accuracy": step / (steps + 9),
            "tool_rate": 0.9,
            "entropy": 1 / (step + 1),
        }
        lines += [numbers] if step else []
        if step in evaluated_steps:
            name = f"trajectories/dev-{step:06d}.jsonl"
            share = count // len(evaluated_steps) + (step // EVERY < count % len(evaluated_steps))
            with (folder / name).open("w") as file:
                for index in range(share):
                    file.write(json.dumps(trajectory(draw, vocabulary, ranks, step, index, tokens)) + "\n")
            numbers = {"kind": "eval", "step": step, "split": "dev", "accuracy": step / (steps + 9)}
            lines.append(numbers | {"accuracy_stderr": 0.02, "trajectories": name})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def trajectory(
    draw: random.Random, vocabulary: list[str], ranks: list[float], step: int, index: int, tokens: int
) -> dict:
    """A record as runs write it: a prompt, half of the tokens, a program, its output, the other half."""
    sizes, roles = (40, tokens // 2, 30, tokens - tokens // 2), ("prompt", "policy", "tool", "policy")
    ids = [draw.choices(range(4000), ranks, k=size) for size in sizes]
    texts = [" ".join(vocabulary[i] for i in part) for part in ids]
    a, b = draw.randrange(10**6), draw.randrange(10**6)
    code, output = f"def f(x, y):\n    return x * y  # {texts[0][:30]}\nprint(f({a}, {b}))", str(a * b)
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
    texts[1] += f"\n<tool_call>\n{call}\n</tool_call><|im_end|>"
    texts[2] = f"\n<|im_start|>user\n<tool_response>\n{output}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    texts[3] += f"\nSo \\boxed{{{a * b}}}.<|im_end|>"
    stops = [sum(sizes[: i + 1]) for i in range(4)]
    sampled = [int(role == "policy") for role, size in zip(roles, sizes, strict=True) for _ in range(size)]
    right = draw.random() < step / 70
    return {
        "id": f"dev-{index:06d}/{step}",
        **{"split": "dev", "step": step, "problem": texts[0], "ground_truth": str(a * b), "answer": str(a * b)},
        **{"correct": right, "reward": 1.0 if right else -1.0, "end": "answered", "turns": 2},
        **{"prompt_tokens": 40, "response_tokens": tokens + 30, "ids": [i for part in ids for i in part]},
        **{"sampled": sampled, "logprobs": [round(-draw.expovariate(3) * on, 6) for on in sampled]},
        "segments": [
            {"role": role, "start": stop - size, "stop": stop, "text": text}
            for role, size, stop, text in zip(roles, sizes, stops, texts, strict=True)
        ],
        "tool_calls": [
            {"turn": 0, "code": code, "status": "success", "output": output, "wall_s": 0.02, "queue_s": 0.01}
        ],
        "timings": {"started_s": 0.0, "finished_s": 3.0},
    }


def shown(page: Path) -> int:
    """The number of trajectories that a page says it shows."""
    found = re.search(r"([\d,]+) (?:of [\d,]+ are in this page|that were kept)", page.read_text())
    return int(found[1].replace(",", "")) if found else 0


def ready(browser: str, page: Path) -> float | None:
    """Milliseconds until the page's script has filled its list; None without a browser."""
    if not shutil.which(browser):
        return None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=60000", page.as_uri()]
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-ready="(\d+)"', done.stdout[:2000])
    return float(found[1]) if found else None


if __name__ == "__main__":
    main(sys.argv[1:])
