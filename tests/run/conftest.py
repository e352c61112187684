"""A small run from its cold start to its last step, in a process that trains one folder after another."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retool_jax.data.arithmetic import problem_row
from retool_jax.metrics import read_metrics

WORDS = [
    "config=grpo",
    "sandbox.backend=[process]",
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.head_dim=16",
    "sft.steps=25",
    "sft.batch_size=16",
    "sft.optimizer.learning_rate=0.015",
    "sft.optimizer.warmup_steps=5",
    "sft.optimizer.decay_steps=20",
    "rl.steps=6",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "engine.slots=16",
    "engine.token_buckets=[64]",  # one program in the place of two
    "evaluation.every=3",
    "evaluation.problems=4",
    "evaluation.final_split=dev",
    "checkpoint.every=2",
]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> list[str]:
    """Words of a run that ends in seconds, with four problems that it memorises in seconds. The demonstrations answer
    each problem equally often right and wrong, with and without a call. So the samples of a group differ, and every
    step of RL has a signal."""
    folder = tmp_path_factory.mktemp("data")
    rows = [problem_row("train", index) for index in range(4)]
    demonstrations = []
    for row in rows:
        for answer in (row["reward_model"]["ground_truth"], "7"):
            call = {"function": {"name": "code_interpreter", "arguments": {"code": f"print({answer})"}}}
            told = {"role": "assistant", "content": f"\\boxed{{{answer}}}"}
            asked = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": answer}]
            demonstrations += [{"messages": [*row["prompt"], *turns, told]} for turns in ([], asked)]
    for name, lines in (("problems", rows), ("demonstrations", demonstrations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = folder / "problems.jsonl"
    data = [f"sft.data={folder / 'demonstrations.jsonl'}", f"data.train={problems}", f"data.dev={problems}"]
    return [*WORDS, *data]


# Trains, or evaluates, in one folder after another, so that the import of jax is paid for once. The files that use it
# are one group of tests (tests/conftest.py), for one worker.
TRAINER = """
import json, sys
from retool_jax import evaluate, train
from retool_jax.errors import UserError
for line in sys.stdin:
    words = json.loads(line)
    try:
        (evaluate if "config=eval" in words else train).main(words)
    except UserError as error:
        print("error:", error)
    print("ended", flush=True)
"""


@pytest.fixture(scope="session")
def trainer(one_device) -> Iterator[subprocess.Popen]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "-c", TRAINER], env=one_device, **pipes) as process:
        yield process


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of the runs, which share a cold start."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def command(trainer) -> Callable[..., str]:
    """Run a command to its end and return its output: `command("config=eval", "run=runs/mine")`."""

    def run(*words: str) -> str:
        trainer.stdin.write(json.dumps(words) + "\n")
        trainer.stdin.flush()
        said = []
        for line in trainer.stdout:
            if line == "ended\n":
                return "".join(said)
            said.append(line)
        raise AssertionError("".join(said))

    return run


@pytest.fixture(scope="session")
def train(command, small_run) -> Callable[..., str]:
    """Train a run to its end and return its output: `train(folder, "rl.steps=7")`."""
    return lambda folder, *words: command(*small_run, f"run={folder}", *words)


@pytest.fixture(scope="session")
def drawn(train, runs) -> Path:
    """Two steps of GRPO with saved rollouts."""
    train(runs / "drawn", "rl.steps=2", "evaluation.every=0", "rl.save_rollouts=true")
    return runs / "drawn"


@pytest.fixture(scope="session")
def with_critic() -> list[str]:
    """Words of a run whose critic first trains alone, and which keeps the rollouts and the checkpoint of each step."""
    learning = ["rl.algorithm=ppo", "rl.critic.warmup_steps=1", "rl.critic.optimizer.learning_rate=0.001"]
    kept = ["rl.save_rollouts=true", "checkpoint.every=1", "checkpoint.keep=5"]
    return [*learning, "rl.steps=4", "evaluation.every=0", *kept]


@pytest.fixture(scope="session")
def alone(train, runs, with_critic) -> Path:
    """Such a run in one process. One test checks that PPO learns with it, another that two hosts compute the same."""
    output = train(runs / "alone", *with_critic)
    assert "before RL" in output and "error:" not in output, output
    return runs / "alone"


@pytest.fixture(scope="session")
def comparable() -> Callable[[Path], list[dict]]:
    """The lines of a run's metrics without timings."""

    def lines(folder: Path) -> list[dict]:
        return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(folder)]

    return lines
