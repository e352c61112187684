"""A small run of one host and of several, each a process of this machine: whether they draw and learn the same.

    python benchmarks/hosts.py [hosts=4] [algorithm=grpo] [steps=4]

Four problems are learned by heart in a cold start, each answered rightly as often as wrongly, so that every step of RL
has something to learn from. Prints JSON: whether every trajectory has the same ids, how many steps learned, and the
largest difference of a loss. Where it is not the same the exit code is 1.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import arguments

from retool_jax.data.arithmetic import problem_row
from retool_jax.metrics import read_metrics

WORDS = [
    *("config=grpo", "sandbox.backend=[process]", "evaluation.every=0", "evaluation.problems=4"),
    *("model.num_layers=1", "model.hidden_size=64", "model.intermediate_size=128", "model.head_dim=16"),
    *("sft.steps=25", "sft.batch_size=16", "sft.optimizer.learning_rate=0.015", "sft.optimizer.warmup_steps=5"),
    *("sft.optimizer.decay_steps=20", "rl.prompts_per_step=4", "rl.group_size=4", "rl.save_rollouts=true"),
    *("engine.slots=16", "engine.token_buckets=[64]", "evaluation.final_split=dev"),
]


def made_data(folder: Path) -> list[str]:
    """Files of the problems and of their demonstrations, as words."""
    rows, demonstrations = [problem_row("train", index) for index in range(4)], []
    for row in rows:
        for answer in (row["reward_model"]["ground_truth"], "7"):
            call = {"function": {"name": "code_interpreter", "arguments": {"code": f"print({answer})"}}}
            asked = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": answer}]
            told = {"role": "assistant", "content": f"\\boxed{{{answer}}}"}
            demonstrations += [{"messages": [*row["prompt"], *turns, told]} for turns in ([], asked)]
    problems, traces = folder / "problems.jsonl", folder / "demonstrations.jsonl"
    for path, lines in ((problems, rows), (traces, demonstrations)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"sft.data={traces}", f"data.train={problems}", f"data.dev={problems}"]


def train(hosts: int, words: list[str], folder: Path) -> Path:
    """Train below a folder with so many processes; the run's folder."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    of_all = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    command = [sys.executable, "-m", "retool_jax.train", *words, f"run={folder / 'run'}"]
    processes = [
        subprocess.Popen(command, env=of_all | {"JAX_PROCESS_ID": str(number)}, stdout=sys.stderr)
        for number in range(hosts)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit(f"a run of {hosts} hosts failed")
    return folder / "run"


def draws(run: Path) -> list[list[int]]:
    files = sorted((run / "rollouts").iterdir())
    return [json.loads(line)["ids"] for file in files for line in file.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Those of the cold start, then those of RL."""
    (cold_start,) = run.parent.glob("cold-start-*")
    lines = [*read_metrics(cold_start), *read_metrics(run)]
    return [line[name] for line in lines for name in ("loss", "critic/value_loss") if name in line]


def main(words: list[str]) -> None:
    options = arguments.parse(words, {"hosts": 4, "algorithm": "grpo", "steps": 4})
    asked = [*WORDS, f"rl.algorithm={options['algorithm']}", f"rl.steps={options['steps']}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked += made_data(folder)
        one, several = (train(count, asked, folder / str(count)) for count in (1, options["hosts"]))
        ours, theirs = losses(several), losses(one)
        found = {
            "benchmark": "hosts",
            "hosts": options["hosts"],
            "algorithm": options["algorithm"],
            "trajectories": len(draws(one)),
            "same_ids": draws(one) == draws(several),
            "losses": len(theirs),
            "steps_that_learned": sum(line.get("grad_norm", 0) > 0 for line in read_metrics(one)),
            "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        }
    print(json.dumps(found, indent=2))
    sys.exit(not (found["same_ids"] and found["largest_difference"] < 1e-5 and found["steps_that_learned"]))


if __name__ == "__main__":
    main(sys.argv[1:])
