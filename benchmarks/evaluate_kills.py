"""Contract 9 for evaluations: one that is killed at random moments ends in the result of an unbroken one.

    python benchmarks/evaluate_kills.py [init_from=runs/grpo] [kills=5] [seed=0] [folder=runs/kills] [word ...]

Evaluates the miniature once to its end, and once more in another folder where `kill -9` comes at moments drawn with
`seed`: some in the first seconds, the others a while after the file of samples has grown by a drawn number of lines. A
folder that comes to its end before all kills is compared, and the kills go on in a new one. Prints what it found as
JSON; the exit code is 1 where a result differs by a byte. Other words go to both.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import arguments
from kills import run_killed


def lines_in(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def moment(folder: Path, draw: random.Random, total: int) -> Callable[[float], bool]:
    """When to kill: one time in five within the first seconds, else a moment behind one of the next batches."""
    if draw.random() < 0.2:
        limit = draw.uniform(0.5, 8.0)
        return lambda seconds: seconds > limit
    target, late = lines_in(folder) + draw.randint(1, max(total // 6, 1)), draw.uniform(0.0, 1.0)
    seen: list[float] = []

    def now(seconds: float) -> bool:
        if not seen and lines_in(folder) >= target:
            seen.append(seconds)
        return bool(seen) and seconds > seen[0] + late

    return now


def main(words: list[str]) -> None:
    known = {"init_from": "runs/grpo", "kills": 5, "seed": 0, "folder": "runs/kills"}
    options, others = arguments.parse_known(words, known)
    root, draw = Path(options["folder"]), random.Random(options["seed"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    log = root / "log.txt"

    def command(folder: Path) -> list[str]:
        own = ["config=eval", f"init_from={options['init_from']}", *others, f"run={folder}"]
        return [sys.executable, "-m", "retool_jax.evaluate", *own]

    whole = root / "unbroken"
    run_killed(command(whole), log)
    theirs, total = (whole / "result.json").read_bytes(), lines_in(whole)
    killed, folders, at = 0, 0, []
    while killed < options["kills"]:
        folder = root / f"killed-{folders}"
        while killed < options["kills"] and run_killed(command(folder), log, moment(folder, draw, total)):
            killed += 1
            at.append(lines_in(folder))
        run_killed(command(folder), log)
        folders += 1
        if (folder / "result.json").read_bytes() != theirs:
            sys.exit(f"{folder / 'result.json'} is not that of {whole}")
        if lines_in(folder) != total:
            sys.exit(f"{folder} has {lines_in(folder)} samples, {whole} {total}")
    found = {"kills": killed, "samples_at_kills": at, "samples": total, "folders": folders, "equal": True}
    print(json.dumps({"benchmark": "evaluate_kills", **found}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
