"""Train the miniature in each way on several seeds; make the tables and the picture of docs/results.md.

    python benchmarks/results.py [seeds=0,1,2] [kinds=grpo,text,...] [runs=runs/results] [docs=docs/results.md]
        [key=value ...]

Each run is a separate command in a folder below `runs`; other key=value words go to all trainings. A run that is
complete is read and not repeated, so a second call prints the tables at once. Runs with the same seed share a cold
start, whose time has its own column. `opd` needs the run of `grpo` with the same seed, as its teacher. The runs of
`text` are also evaluated with the tool. With `docs`, the tables replace those between the marks of that page, and the
picture is saved beside it.
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import arguments
import numpy as np

from retool_jax.files import replacing
from retool_jax.report.curves import draw_accuracy
from retool_jax.report.runs import load_runs

ABLATION = {
    "grpo": ("cold start, then RL with the tool", ["config=grpo"]),
    "text": ("the same without the tool", ["config=grpo_text"]),
    "no_sft": ("RL with the tool, without a cold start", ["config=grpo_no_sft"]),
}
ALGORITHMS = {
    "ppo": ("`config=ppo`", ["config=ppo"]),
    "opd": ("`config=opd`", ["config=opd"]),
    "ahead": ("`config=grpo rl.ahead=1`", ["config=grpo", "rl.ahead=1"]),
    "dynamic": ("`config=grpo_dynamic`", ["config=grpo_dynamic"]),
}
KINDS = ABLATION | ALGORITHMS
AT_TEST = "the run without the tool, given it for the test alone"
OPTIONS = {"seeds": "0,1,2", "kinds": ",".join(KINDS), "runs": "runs/results", "docs": ""}
COLUMNS = ("run", "seed", "T=1 before", "T=1 after", "gain", "greedy before", "greedy after", "cold start", "rest")


def call(command: list[str], what: str) -> None:
    """Run a Python module; its output goes to stderr, so that stdout has only the tables."""
    done = subprocess.run([sys.executable, "-m", *command], stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"{what} ended with code {done.returncode}")


def train(kind: str, seed: str, runs: Path, words: list[str]) -> dict:
    """Train a run unless it is complete; return its summary."""
    folder = runs / f"{kind}-{seed}"
    if not (folder / "summary.json").is_file():
        teacher = [f"rl.teacher.init_from={runs / f'grpo-{seed}'}"] if kind == "opd" else []
        settings = [*KINDS[kind][1], f"seed={seed}", f"run={folder}", *teacher, *words]
        call(["retool_jax.train", *settings], f"{kind} with seed {seed}")
    return json.loads((folder / "summary.json").read_text())


def evaluate_with_tool(seed: str, runs: Path, words: list[str]) -> dict:
    """Evaluate the run without the tool (`text`) with the tool, unless that is done; return the result."""
    folder = runs / f"tool-at-test-{seed}"
    if not (folder / "result.json").is_file():
        settings = ["config=eval", f"init_from={runs / f'text-{seed}'}", "tools=python", f"run={folder}"]
        settings += [f"seed={seed}", "evaluation.problems=256", "evaluation.samples=1", *words]
        call(["retool_jax.evaluate", *settings], AT_TEST)
    return json.loads((folder / "result.json").read_text())


def row_of(name: str, seed: str, summary: dict) -> tuple[str, ...]:
    """One row of the table of runs, with the columns COLUMNS."""
    before, after, seconds = summary["before"], summary["after"], summary["seconds"]
    cold = seconds.get("cold start", 0.0)
    return (
        name,
        seed,
        *(f"{100 * scores['accuracy']:.1f} ± {100 * scores['accuracy_stderr']:.1f} %" for scores in (before, after)),
        f"{100 * (after['accuracy'] - before['accuracy']):+.1f}",
        *(f"{100 * scores['greedy_accuracy']:.1f} %" for scores in (before, after)),
        f"{cold / 60:.1f} min" if cold >= 1 else "shared",
        f"{(seconds['total'] - cold) / 60:.1f} min",
    )


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def means(found: dict[str, list[dict]], at_test: list[dict]) -> str:
    """The main table: means over seeds of each way to train, sampled and greedy.

    `at_test` are the results of evaluations with the tool of the runs that were trained without it.
    """

    def row(name: str, evaluations: list[dict]) -> tuple[str, ...]:
        sampled, greedy = (spread([scores[key] for scores in evaluations]) for key in ("accuracy", "greedy_accuracy"))
        rate = np.mean([scores["tool_rate"] for scores in evaluations])
        return name, str(len(evaluations)), sampled, greedy, f"{rate:.2f}"

    rows = []
    for kind, summaries in found.items():
        rows.append(row(KINDS[kind][0], [summary["after"] for summary in summaries]))
        if kind == "grpo":
            rows.append(row("that cold start alone", [summary["before"] for summary in summaries]))
    if at_test:
        sampled = [result["numbers"]["accuracy"]["value"] for result in at_test]
        rate = np.mean([result["trajectories"]["tool_rate"] for result in at_test])
        rows.append((AT_TEST, str(len(at_test)), spread(sampled), "", f"{rate:.2f}"))
    return markdown(("trained by", "seeds", "T=1", "greedy", "tool rate"), rows)


def spread(values: list[float]) -> str:
    """Mean and range, in percent."""
    return f"{100 * np.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f}) %"


def gaps(found: dict[str, list[dict]], seeds: list[str]) -> str:
    """For each seed, how far RL with the tool is ahead of the paper's two baselines."""
    rows = []
    for seed, ours, text in zip(seeds, found["grpo"], found["text"], strict=True):
        after = ours["after"]["accuracy"]
        ahead = (after - text["after"]["accuracy"], after - ours["before"]["accuracy"])
        rows.append((seed, *(f"{100 * gap:+.1f} points" for gap in ahead)))
    return markdown(("seed", "over text-only RL", "over the cold start alone"), rows)


def machine(run: Path) -> str:
    """This machine's processor and the main packages of a run, in one line."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    processor = re.search(r"model name\s*: (.*)", cpuinfo)
    versions = dict(line.split("==") for line in (run / "versions.txt").read_text().splitlines() if "==" in line)
    packages = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax") if name in versions)
    return f"{os.cpu_count()} cores ({processor[1] if processor else 'unknown'}), {packages}."


def insert(page: Path, tables: dict[str, str]) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- end -->` in a page by each named table."""
    text = page.read_text()
    for name, table in tables.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
        if not count:
            sys.exit(f"{page} has no <!-- {name} --> followed by <!-- end -->; add both where the table belongs")
    with replacing(page) as file:
        file.write(text)


def main(words: list[str]) -> None:
    options, others = arguments.parse_known(words, OPTIONS)
    runs = Path(options["runs"])
    seeds = options["seeds"].split(",")
    kinds = options["kinds"].split(",")
    found: dict[str, list[dict]] = defaultdict(list)
    rows = []
    for seed in seeds:
        for kind in kinds:
            summary = train(kind, seed, runs, others)
            found[kind].append(summary)
            rows.append((kind, row_of(KINDS[kind][0], seed, summary)))
    tables = {"runs": markdown(COLUMNS, [row for _, row in sorted(rows, key=lambda row: kinds.index(row[0]))])}
    shared = [word for word in others if word.startswith("sandbox.")]  # the others are settings of training
    at_test = [evaluate_with_tool(seed, runs, shared) for seed in seeds] if "text" in kinds else []
    tables["means"] = means(found, at_test)
    if {"grpo", "text"} <= found.keys():
        tables["gaps"] = gaps(found, seeds)
    first = runs / f"{kinds[0]}-{seeds[0]}"
    if (first / "versions.txt").is_file():
        tables["machine"] = machine(first)
    print("\n\n".join(tables.values()))
    if options["docs"]:
        page = Path(options["docs"])
        insert(page, tables)
        drawn = [runs / f"{kind}-{seed}" for kind in ABLATION if kind in found for seed in seeds]
        draw_accuracy(load_runs(drawn)).savefig(page.with_suffix(".png"), dpi=160, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
