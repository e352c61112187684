"""What each algorithm teaches the miniature, on several seeds: a table of accuracy before and after, and of the time.

    python benchmarks/learning.py [seeds=0,1,2] [kinds=grpo,ppo,opd,ahead,dynamic] [runs=runs/learning] [key=value ...]

Each run is a command of its own (`python -m retool_jax.train`), one after another, in a folder below `runs`; other
words go to all of them. What is complete is read and not run again, so the table can be asked for at any time. Runs of
one seed share a cold start, whose time is told apart. `opd` needs its teacher, the run of `grpo` with the same seed.
"""

import json
import subprocess
import sys
from pathlib import Path

KINDS = {
    "grpo": ["config=grpo"],
    "ppo": ["config=ppo"],
    "opd": ["config=opd"],
    "ahead": ["config=grpo", "rl.ahead=1"],
    "dynamic": ["config=grpo", "rl.groups.dynamic=true"],
}
COLUMNS = ("run", "seed", "sampled before", "sampled after", "gain", "greedy after", "cold start", "rest", "total")


def command_of(kind: str, seed: str, folder: Path, words: list[str]) -> list[str]:
    teacher = [f"rl.teacher.init_from={folder.parent / f'grpo-{seed}'}"] if kind == "opd" else []
    own = [*KINDS[kind], f"seed={seed}", f"run={folder}", *teacher, *words]
    return [sys.executable, "-m", "retool_jax.train", *own]


def row_of(kind: str, seed: str, summary: dict) -> tuple[str, ...]:
    before, after, seconds = summary["before"], summary["after"], summary["seconds"]
    cold = seconds.get("cold start", 0.0)
    accuracies = [f"{100 * look['accuracy']:.1f} ± {100 * look['accuracy_stderr']:.1f} %" for look in (before, after)]
    gain = f"{100 * (after['accuracy'] - before['accuracy']):+.1f}"
    times = [f"{s / 60:.1f} min" for s in (cold, seconds["total"] - cold, seconds["total"])]
    return kind, seed, *accuracies, gain, f"{100 * after['greedy_accuracy']:.1f} %", *times


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words if word.split("=")[0] in ("seeds", "kinds", "runs"))
    others = [word for word in words if word.split("=")[0] not in options]
    runs = Path(options.get("runs", "runs/learning"))
    rows = [COLUMNS]
    for seed in options.get("seeds", "0,1,2").split(","):
        for kind in options.get("kinds", ",".join(KINDS)).split(","):
            folder = runs / f"{kind}-{seed}"
            if not (folder / "summary.json").is_file():
                done = subprocess.run(command_of(kind, seed, folder, others), stdout=sys.stderr)
                if done.returncode:
                    sys.exit(f"{kind} with seed {seed} ended with code {done.returncode}")
            rows.append(row_of(kind, seed, json.loads((folder / "summary.json").read_text())))
    rows.insert(1, tuple("---" for _ in COLUMNS))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
