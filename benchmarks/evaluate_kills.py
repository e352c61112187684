"""Check contract 9 for evaluations: one that is killed at random moments gives the result of an uninterrupted one.

    python benchmarks/evaluate_kills.py [init_from=runs/grpo] [kills=5] [seed=0] [folder=runs/kills] [key=value ...]

Evaluates the miniature once to its end, and again in another folder with `kill -9` at random moments, drawn with
`seed`: some in the first seconds, the others shortly after the file of samples has grown by a random number of lines.
If an evaluation ends before all kills, it is compared, and the kills continue in a new folder. Prints JSON; exits with
1 if a result differs by a byte. Other key=value words go to both.
"""

import json
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import arguments
from kills import random_moment, run_killed


def lines_in(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def main(words: list[str]) -> None:
    known = {"init_from": "runs/grpo", "kills": 5, "seed": 0, "folder": "runs/kills"}
    options, others = arguments.parse_known(words, known)
    root, rng = Path(options["folder"]), random.Random(options["seed"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    log = root / "log.txt"

    def command(folder: Path) -> list[str]:
        settings = ["config=eval", f"init_from={options['init_from']}", *others, f"run={folder}"]
        return [sys.executable, "-m", "retool_jax.evaluate", *settings]

    whole = root / "unbroken"
    run_killed(command(whole), log)
    expected, total = (whole / "result.json").read_bytes(), lines_in(whole)
    killed, folders, at = 0, 0, []
    while killed < options["kills"]:
        folder = root / f"killed-{folders}"
        draw_moment = partial(random_moment, partial(lines_in, folder), max(total // 6, 1), rng, 0.2, 8.0)
        while killed < options["kills"] and run_killed(command(folder), log, draw_moment()):
            killed += 1
            at.append(lines_in(folder))
        run_killed(command(folder), log)
        folders += 1
        if (folder / "result.json").read_bytes() != expected:
            sys.exit(f"{folder / 'result.json'} differs from {whole / 'result.json'}")
        if lines_in(folder) != total:
            sys.exit(f"{folder} has {lines_in(folder)} samples, {whole} {total}")
    found = {"kills": killed, "samples_at_kills": at, "samples": total, "folders": folders, "equal": True}
    print(json.dumps({"benchmark": "evaluate_kills", **found}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
