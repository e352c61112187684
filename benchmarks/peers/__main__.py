"""Our work beside its peers': the same tiny Qwen2, as many tokens, in one sitting on one core.

    python benchmarks/peers [core=0] [rounds=2] [works=update,generate,...] [environments=build/peers] [NAME=PYTHON]

- `update`: a train step on 32 rows of 256 tokens.
- `generate`: 32 rows draw 192 tokens behind prompts of 64.
- `grpo`: a whole step on four prompts of 64, eight rows each, that draw 192.
- `rollout`: four turns of 36 behind prompts of 261, with answers of 29 tokens between, 32 rows.
- `tool_step`: a whole step with such a rollout.

Peers run in environments of their own, made at the first call; NAME=PYTHON takes one that is there. What cannot be
made or run is left out with the reason. Peers take turns, and the fastest of all rounds counts, in CPU-seconds, which
other work on the machine changes least. Prints a table, and on stderr what is measured meanwhile; writes nothing else.
"""

import json
import os
import platform
import subprocess
import sys
import venv
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {  # of the pythons that peers run in
    "torch": ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0"),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "qwix==0.1.8", "transformers==5.12.1"),
}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
PEERS = {  # by work: who does it, in which Python, by which script and word
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
    known = {*options, *ENVIRONMENTS}
    if odd := [word for word in words if "=" not in word or word.split("=")[0] not in known]:
        sys.exit(f"error: cannot read {odd[0]!r}; the words are {', '.join(f'{key}=...' for key in known)}")
    options |= dict(word.split("=", 1) for word in words)
    works = options["works"].split(",")
    jobs = {(work, who): job for work in works for who, job in ({"ours": ("ours", "ours", work)} | PEERS[work]).items()}
    pythons, broken = {"ours": sys.executable}, {}
    for name in sorted({name for name, _, _ in jobs.values()} - pythons.keys()):
        try:
            pythons[name] = options.get(name) or environment(Path(options["environments"]) / name, ENVIRONMENTS[name])
        except (OSError, subprocess.CalledProcessError) as error:
            broken[name] = reason(error)
    reasons = {key: broken[job[0]] for key, job in jobs.items() if job[0] in broken}
    best: dict[tuple[str, str], dict] = {}
    for _ in range(int(options["rounds"])):
        for key in [key for key in jobs if key not in reasons]:
            name, script, word = jobs[key]
            try:
                found = measure(pythons[name], script, word, int(options["core"]))
            except (OSError, subprocess.CalledProcessError) as error:
                reasons[key] = reason(error)
                continue
            best[key] = max(found, best.get(key, found), key=lambda one: one["tokens_per_cpu_s"])
            print(f"{' of '.join(key)}: {found['cpu_s']} CPU-seconds", file=sys.stderr)
    show([key for key in jobs if key in best], best, reasons)


def environment(folder: Path, packages: tuple[str, ...]) -> str:
    """The Python of a virtual environment with these packages, made where it is not there yet."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        # PyTorch by itself: its index would be asked for every other package too.
        torch = [name for name in packages if name.startswith("torch==")]
        steps = [["--extra-index-url", CPU_WHEELS, *torch]] * bool(torch) + [list(packages)]
        for step in steps:
            command = [python, "-m", "pip", "install", "-q", *step]
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        (folder / "complete").touch()
    return str(python)


def measure(python: str, script: str, word: str, core: int) -> dict:
    """What a script prints of a work, pinned to one core."""
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


def reason(error: OSError | subprocess.CalledProcessError) -> str:
    """Its last line, or that of what it ran."""
    said = (getattr(error, "stderr", None) or str(error)).strip()
    return said.splitlines()[-1]


def show(keys: list[tuple[str, str]], best: dict[tuple[str, str], dict], reasons: dict[tuple[str, str], str]) -> None:
    """The table, how fast ours is beside each, the versions, and who is missing."""
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
    """The machine's processor, with the instructions that matter to a product of matrices."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(wide)})"


if __name__ == "__main__":
    main(sys.argv[1:])
