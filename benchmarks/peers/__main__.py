"""Compare retool_jax with its peers on one core: the same tiny Qwen2 and the same number of tokens for each.

    python benchmarks/peers [core=0] [rounds=2] [works=update,generate,...] [environments=build/peers] [NAME=PYTHON]

- `update`: a train step on 32 rows of 256 tokens.
- `generate`: 32 rows sample 192 tokens each after prompts of 64.
- `grpo`: a whole step on four prompts of 64 tokens, with eight rows each, which sample 192 tokens.
- `rollout`: 32 rows sample four turns of 36 tokens after prompts of 261, with tool answers of 29 tokens in between.
- `tool_step`: a whole step with such a rollout.

Each peer runs in its own virtual environment, which the first call makes; NAME=PYTHON uses an existing one. A peer that
cannot be installed or run is left out, and the reason is printed. Peers take turns, and the fastest of all rounds
counts. Times are CPU-seconds, which other work on the machine changes least. Prints a table, and progress on stderr.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

from environments import ENVIRONMENTS, last_line, make_environment

HERE = Path(__file__).resolve().parent
PEERS = {  # work -> peer -> (environment, script, the script's argument)
    "update": {
        "HF torch": ("torch", "hf_torch", "update"),
        "google-tunix": ("tunix", "google_tunix", "update"),
    },
    "generate": {
        "HF torch": ("torch", "hf_torch", "generate"),
        "HF torch, static cache": ("torch", "hf_torch", "generate_static"),
        "google-tunix": ("tunix", "google_tunix", "generate"),
    },
    "grpo": {"TRL": ("torch", "hf_trl", "grpo"), "google-tunix": ("tunix", "google_tunix", "grpo")},
    "rollout": {"TRL": ("torch", "hf_trl", "rollout")},
    "tool_step": {"TRL": ("torch", "hf_trl", "tool_step")},
}


def main(words: list[str]) -> None:
    options = {"core": "0", "rounds": "2", "works": ",".join(PEERS), "environments": "build/peers"}
    known = [*options, *dict.fromkeys(name for peers in PEERS.values() for name, _, _ in peers.values())]
    if odd := [word for word in words if "=" not in word or word.split("=")[0] not in known]:
        sys.exit(f"error: cannot read {odd[0]!r}; the options are {', '.join(f'{key}=...' for key in known)}")
    options |= dict(word.split("=", 1) for word in words)
    jobs: dict[tuple[str, str], tuple[str, str, str]] = {}
    for work in options["works"].split(","):
        jobs[work, "ours"] = ("ours", "ours", work)
        jobs |= {(work, peer): job for peer, job in PEERS[work].items()}
    pythons, broken = {"ours": sys.executable}, {}
    for name in sorted({name for name, _, _ in jobs.values()} - pythons.keys()):
        try:
            folder = Path(options["environments"]) / name
            pythons[name] = options.get(name) or make_environment(folder, ENVIRONMENTS[name])
        except (OSError, subprocess.CalledProcessError) as error:
            broken[name] = last_line(error)
    reasons = {key: broken[job[0]] for key, job in jobs.items() if job[0] in broken}
    best: dict[tuple[str, str], dict] = {}
    for _ in range(int(options["rounds"])):
        for key in [key for key in jobs if key not in reasons]:
            name, script, word = jobs[key]
            try:
                found = measure(pythons[name], script, word, int(options["core"]))
            except (OSError, subprocess.CalledProcessError) as error:
                reasons[key] = last_line(error)
                continue
            best[key] = max(found, best.get(key, found), key=lambda numbers: numbers["tokens_per_cpu_s"])
            print(f"{' of '.join(key)}: {found['cpu_s']} CPU-seconds", file=sys.stderr)
    show([key for key in jobs if key in best], best, reasons)


def measure(python: str, script: str, word: str, core: int) -> dict:
    """Run a script pinned to one core; return the numbers that it prints in its last line."""
    paths = [str(HERE), *([str(HERE.parents[1])] if script == "ours" else [])]
    run = subprocess.run(
        [python, HERE / f"{script}.py", word],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(run.stdout.splitlines()[-1])


def show(keys: list[tuple[str, str]], best: dict[tuple[str, str], dict], reasons: dict[tuple[str, str], str]) -> None:
    """Print the table with the ratio of our rate to each peer's, the versions, and why peers are missing."""
    print(f"{date.today()}, {processor()}, one core, Python {platform.python_version()}\n")
    print("| work | who | CPU-seconds | tokens per CPU-second | ours / theirs |")
    print("| --- | --- | --- | --- | --- |")
    versions: dict[str, str] = {}
    for work, who in keys:
        found, ours = best[work, who], best.get((work, "ours"))
        ratio = f"{ours['tokens_per_cpu_s'] / found['tokens_per_cpu_s']:.2f}" if ours else ""
        print(f"| {work} | {who} | {found['cpu_s']} | {found['tokens_per_cpu_s']} | {ratio} |")
        versions |= {f"{package} {version}": "" for package, version in found["versions"].items()}
    print(f"\n{', '.join(versions)}")
    for (work, who), why in reasons.items():
        print(f"\n{work} of {who} was not measured: {why}")


def processor() -> str:
    """The processor's name and those of its vector instructions that speed up matrix products."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(wide)})"


if __name__ == "__main__":
    main(sys.argv[1:])
