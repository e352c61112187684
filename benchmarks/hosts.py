"""Check that a small run on several hosts (processes of this machine) samples and learns the same as on one.

    python benchmarks/hosts.py [hosts=4] [algorithm=grpo] [steps=4]

The cold start memorises four problems with as many right as wrong answers, so that every step of RL has something to
learn. Prints JSON: whether all trajectories have the same ids, how many steps learned, and the largest difference of a
loss. Exits with 1 if ids differ, losses differ by 1e-5 or more, or no step learned.
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


def make_data(folder: Path) -> list[str]:
    """Write the problems and their demonstrations; return the settings that name the files."""
    rows, demonstrations = [problem_row("train", index) for index in range(4)], []
    for row in rows:
        for answer in (row["reward_model"]["ground_truth"], "7"):
            call = {"function": {"name": "code_interpreter", "arguments": {"code": f"print({answer})"}}}
            tool = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": answer}]
            final = {"role": "assistant", "content": f"\\boxed{{{answer}}}"}
            demonstrations += [{"messages": [*row["prompt"], *turns, final]} for turns in ([], tool)]
    problems, traces = folder / "problems.jsonl", folder / "demonstrations.jsonl"
    for path, lines in ((problems, rows), (traces, demonstrations)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"sft.data={traces}", f"data.train={problems}", f"data.dev={problems}"]


def train(hosts: int, words: list[str], folder: Path) -> Path:
    """Train with `hosts` processes in a new folder; return the run's folder."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    command = [sys.executable, "-m", "retool_jax.train", *words, f"run={folder / 'run'}"]
    processes = [
        subprocess.Popen(command, env=shared | {"JAX_PROCESS_ID": str(number)}, stdout=sys.stderr)
        for number in range(hosts)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit(f"a run of {hosts} hosts failed")
    return folder / "run"


def trajectory_ids(run: Path) -> list[list[int]]:
    files = sorted((run / "rollouts").iterdir())
    return [json.loads(line)["ids"] for file in files for line in file.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """All losses of the cold start, then all of RL."""
    (cold_start,) = run.parent.glob("cold-start-*")
    lines = [*read_metrics(cold_start), *read_metrics(run)]
    return [line[name] for line in lines for name in ("loss", "critic/value_loss") if name in line]


def main(words: list[str]) -> None:
    options = arguments.parse(words, {"hosts": 4, "algorithm": "grpo", "steps": 4})
    settings = [*WORDS, f"rl.algorithm={options['algorithm']}", f"rl.steps={options['steps']}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings += make_data(folder)
        one, several = (train(count, settings, folder / str(count)) for count in (1, options["hosts"]))
        of_one, of_several = losses(one), losses(several)
        found = {
            "benchmark": "hosts",
            "hosts": options["hosts"],
            "algorithm": options["algorithm"],
            "trajectories": len(trajectory_ids(one)),
            "same_ids": trajectory_ids(one) == trajectory_ids(several),
            "losses": len(of_one),
            "steps_that_learned": sum(line.get("grad_norm", 0) > 0 for line in read_metrics(one)),
            "largest_difference": max(abs(a - b) for a, b in zip(of_several, of_one, strict=True)),
        }
    print(json.dumps(found, indent=2))
    sys.exit(not (found["same_ids"] and found["largest_difference"] < 1e-5 and found["steps_that_learned"]))


if __name__ == "__main__":
    main(sys.argv[1:])
