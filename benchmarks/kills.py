"""Check contract 9 at random moments: a run that is killed repeatedly writes the same metrics as an uninterrupted run.

    python benchmarks/kills.py [algorithm=grpo] [kills=10] [seed=0] [folder=runs/kills] [key=value ...]

A small miniature trains to its end. The same command runs in another folder and gets `kill -9` at random moments, drawn
with `seed`: in the cold start, while it compiles, in a rollout, an update, a save or an evaluation. After the last kill
it runs to its end. If it ends earlier, it is compared, and the kills continue in a new folder. All lines of
metrics.jsonl must be equal, except for the timings (perf/). Prints JSON; exits with 1 if a line differs. Other
key=value words go to all runs.

`algorithm` names a config (grpo, ppo, opd), or is `dynamic` or `ahead`, which are variants of grpo. With `ahead` timing
decides which weights sample a token. So the comparison is of the ids of the samples that each step learned from, in
their order: samples in progress are started again once, none is left out and none comes twice.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import arguments

SMALL = [
    *("sandbox.backend=[bubblewrap,process]", "model.num_layers=1", "model.hidden_size=64"),
    *("model.intermediate_size=128", "model.head_dim=16", "sft.steps=60", "rl.steps=18", "rl.prompts_per_step=4"),
    *("rl.group_size=4", "engine.slots=16", "evaluation.every=4", "evaluation.problems=8", "checkpoint.every=3"),
    # So small a model is never right. A reward for the form of its answers gives it something to learn.
    *("evaluation.final_split=dev", "rl.reward.name=shaped", "rl.reward.guard=false"),
]


KINDS = {
    "dynamic": ["config=grpo", "rl.groups.dynamic=true"],
    "ahead": ["config=grpo", "rl.ahead=1", "rl.save_rollouts=true"],
}


def lines_of(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in records]


def sample_ids(folder: Path) -> list[dict]:
    """The ids of each step's samples in a run that saves its rollouts."""
    steps = sorted((folder / "rollouts").glob("step-*.jsonl"))
    return [{path.stem: [json.loads(line)["id"] for line in path.read_text().splitlines()]} for path in steps]


def command_of(algorithm: str, folder: Path, teacher: Path, words: list[str]) -> list[str]:
    teacher_words = [f"rl.teacher.init_from={teacher}"] if algorithm == "opd" else []
    words = [*KINDS.get(algorithm, [f"config={algorithm}"]), *SMALL, *teacher_words, *words, f"run={folder}"]
    return [sys.executable, "-m", "retool_jax.train", *words]


def run_killed(command: list[str], log: Path, due: Callable[[float], bool] = lambda seconds: False) -> bool:
    """Run a command and kill it when `due(seconds since its start)` is true; return whether it was killed."""
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        began = time.monotonic()
        while process.poll() is None:
            if due(time.monotonic() - began):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with code {process.returncode}; see {log}")
    return False


def last_step(folder: Path) -> int:
    lines = lines_of(folder)
    return lines[-1]["step"] if lines else 0


def random_moment(
    progress: Callable[[], int], most: int, rng: random.Random, early_share: float, early_s: float
) -> Callable[[float], bool]:
    """When to kill, as a function of the seconds since the start.

    With probability `early_share` in the first `early_s` seconds, otherwise up to 1 s after `progress()` has grown by 1
    to `most`.
    """
    if rng.random() < early_share:
        limit = rng.uniform(0.5, early_s)
        return lambda seconds: seconds > limit
    target, delay = progress() + rng.randint(1, most), rng.uniform(0.0, 1.0)
    reached_at: list[float] = []

    def due(seconds: float) -> bool:
        if not reached_at and progress() >= target:
            reached_at.append(seconds)
        return bool(reached_at) and seconds > reached_at[0] + delay

    return due


def main(words: list[str]) -> None:
    known = {"algorithm": "grpo", "kills": 10, "seed": 0, "folder": "runs/kills"}
    options, others = arguments.parse_known(words, known)
    algorithm, root, rng = options["algorithm"], Path(options["folder"]), random.Random(options["seed"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    log, teacher = root / "log.txt", root / "teacher"
    if algorithm == "opd":
        run_killed(command_of("grpo", teacher, teacher, ["rl.steps=2"]), log)
    # A cold start lies beside its run, so runs in different folders do not share one.
    whole = root / "unbroken" / "run"
    run_killed(command_of(algorithm, whole, teacher, others), log)
    records_of = sample_ids if algorithm == "ahead" else lines_of
    expected, killed, folders, steps = records_of(whole), 0, 0, []
    if not expected:
        sys.exit(f"{whole} has nothing to compare with; see {log}")
    while killed < options["kills"]:
        folder = root / f"killed-{folders}" / "run"
        command = command_of(algorithm, folder, teacher, others)
        draw_moment = partial(random_moment, partial(last_step, folder), 4, rng, 0.25, 12.0)
        while killed < options["kills"] and run_killed(command, log, draw_moment()):
            killed += 1
            steps.append(lines_of(folder)[-1]["step"] if lines_of(folder) else None)
        run_killed(command, log)
        folders += 1
        if (records := records_of(folder)) != expected:
            differing = next((pair for pair in zip(records, expected, strict=False) if pair[0] != pair[1]), None)
            sys.exit(f"the lines of {folder} differ from those of {whole}; the first pair: {differing}")
    learned = sum(line.get("grad_norm", 0) > 0 for line in lines_of(whole))
    found = {
        "steps_that_learned": learned,
        "algorithm": algorithm,
        "kills": killed,
        "steps_at_kills": steps,
        "runs": folders,
        "lines": len(expected),
    }
    print(json.dumps({"benchmark": "kills", **found, "equal": True}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
