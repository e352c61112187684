"""Contract 9 at random moments: a run that is killed again and again writes the numbers of an unbroken one.

    python benchmarks/kills.py [algorithm=grpo] [kills=10] [seed=0] [folder=runs/kills] [key=value ...]

A small miniature trains to its end, and the same command in another folder, where `kill -9` comes at moments drawn with
`seed`: in the cold start, while it compiles, in a rollout, an update, a save or a look. After the last kill it runs to
its end; one that ends before that is compared, and the kills go on in a new folder. Every line of metrics.jsonl has to
be equal but for what the clock decides (perf/). Prints what it found as JSON; the exit code is 1 where a line differs.
Other words go to all runs.

`algorithm` is that of a config (grpo, ppo, opd), or `dynamic` or `ahead`, which are ways to run grpo. With `ahead` the
clock decides which weights draw a token. So what is compared there is which samples each step learned from, in their
order: what was under way is begun again once, none is left out and none comes twice.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import arguments

SMALL = [
    *("sandbox.backend=[bubblewrap,process]", "model.num_layers=1", "model.hidden_size=64"),
    *("model.intermediate_size=128", "model.head_dim=16", "sft.steps=60", "rl.steps=18", "rl.prompts_per_step=4"),
    *("rl.group_size=4", "engine.slots=16", "evaluation.every=4", "evaluation.problems=8", "checkpoint.every=3"),
    # So small a model is never right; it is rewarded for the form of what it says, so that there is something to learn.
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


def issued(folder: Path) -> list[dict]:
    """The samples of each step, of a run that saves its rollouts."""
    steps = sorted((folder / "rollouts").glob("step-*.jsonl"))
    return [{path.stem: [json.loads(line)["id"] for line in path.read_text().splitlines()]} for path in steps]


def command_of(algorithm: str, folder: Path, teacher: Path, words: list[str]) -> list[str]:
    own = [f"rl.teacher.init_from={teacher}"] if algorithm == "opd" else []
    words = [*KINDS.get(algorithm, [f"config={algorithm}"]), *SMALL, *own, *words, f"run={folder}"]
    return [sys.executable, "-m", "retool_jax.train", *words]


def run_killed(command: list[str], log: Path, now: Callable[[float], bool] = lambda seconds: False) -> bool:
    """Whether it was killed, when `now` said so of the seconds since its start, before it ended by itself."""
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        began = time.monotonic()
        while process.poll() is None:
            if now(time.monotonic() - began):
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with code {process.returncode}; see {log}")
    return False


def moment(folder: Path, draw: random.Random) -> Callable[[float], bool]:
    """When to kill: one time in four within the first seconds, else a while behind one of the next steps' lines."""

    def last() -> int:
        lines = lines_of(folder)
        return lines[-1]["step"] if lines else 0

    if draw.random() < 0.25:
        limit = draw.uniform(0.5, 12.0)
        return lambda seconds: seconds > limit
    target, late, seen = last() + draw.randint(1, 4), draw.uniform(0.0, 1.0), []

    def now(seconds: float) -> bool:
        if not seen and last() >= target:
            seen.append(seconds)
        return bool(seen) and seconds > seen[0] + late

    return now


def main(words: list[str]) -> None:
    known = {"algorithm": "grpo", "kills": 10, "seed": 0, "folder": "runs/kills"}
    options, others = arguments.parse_known(words, known)
    algorithm, root, draw = options["algorithm"], Path(options["folder"]), random.Random(options["seed"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    log, teacher = root / "log.txt", root / "teacher"
    if algorithm == "opd":
        run_killed(command_of("grpo", teacher, teacher, ["rl.steps=2"]), log)
    # Cold starts lie beside the runs, so each run here makes its own.
    whole = root / "unbroken" / "run"
    run_killed(command_of(algorithm, whole, teacher, others), log)
    found_in = issued if algorithm == "ahead" else lines_of
    theirs, killed, folders, steps = found_in(whole), 0, 0, []
    if not theirs:
        sys.exit(f"{whole} left nothing that could be compared; see {log}")
    while killed < options["kills"]:
        folder = root / f"killed-{folders}" / "run"
        command = command_of(algorithm, folder, teacher, others)
        while killed < options["kills"] and run_killed(command, log, moment(folder, draw)):
            killed += 1
            steps.append(lines_of(folder)[-1]["step"] if lines_of(folder) else None)
        run_killed(command, log)
        folders += 1
        if (ours := found_in(folder)) != theirs:
            differing = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), None)
            sys.exit(f"{folder} has other lines than {whole}; the first pair: {differing}")
    learned = sum(line.get("grad_norm", 0) > 0 for line in lines_of(whole))
    found = {
        "steps_that_learned": learned,
        "algorithm": algorithm,
        "kills": killed,
        "steps_at_kills": steps,
        "runs": folders,
        "lines": len(theirs),
    }
    print(json.dumps({"benchmark": "kills", **found, "equal": True}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
