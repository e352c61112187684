"""The update beside its peers: one train step of a tiny Qwen2, 32 rows of 256 tokens, in one sitting on one core.

    python benchmarks/peers [core=0] [rounds=2] [environments=build/peers] [hf_torch=PYTHON]

Every peer runs in an environment of its own, made at the first call; PEER=PYTHON takes one that is there. One that
cannot be made is left out with the reason. Peers take turns, and the fastest of all rounds counts, in tokens per
CPU-second, which other work on the machine changes least. Prints a table and writes nothing else.
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
PEERS = {"hf_torch": ("torch==2.13.0", "transformers==5.24.0")}
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def main(words: list[str]) -> None:
    options = {"core": "0", "rounds": "2", "environments": "build/peers"} | dict(word.split("=", 1) for word in words)
    pythons, reasons = {"ours": sys.executable}, {}
    for peer, packages in PEERS.items():
        try:
            pythons[peer] = options.get(peer) or environment(Path(options["environments"]) / peer, packages)
        except (OSError, subprocess.CalledProcessError) as error:
            reasons[peer] = reason(error)
    best: dict[str, dict] = {}
    for _ in range(int(options["rounds"])):
        for name in [name for name in pythons if name not in reasons]:
            try:
                found = measure(pythons[name], name, int(options["core"]))
            except (OSError, subprocess.CalledProcessError) as error:
                reasons[name] = reason(error)
                continue
            best[name] = max(found, best.get(name, found), key=lambda one: one["tokens_per_cpu_s"])
    show(best, reasons)


def environment(folder: Path, packages: tuple[str, ...]) -> str:
    """The Python of a virtual environment with these packages, made where it is not there yet."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "-q", "--extra-index-url", CPU_WHEELS, *packages]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        (folder / "complete").touch()
    return str(python)


def measure(python: str, name: str, core: int) -> dict:
    """What a peer's script prints, pinned to one core."""
    paths = [str(HERE), *([str(HERE.parents[1])] if name == "ours" else [])]
    run = subprocess.run(
        [python, HERE / f"{name}.py"],
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


def show(best: dict[str, dict], reasons: dict[str, str]) -> None:
    """The table, what ours is of each, and who is missing."""
    print(f"{date.today()}, {processor()}, one core, Python {platform.python_version()}\n")
    print("| who | tokens per CPU-second | ours / theirs | versions |")
    print("| --- | --- | --- | --- |")
    for name, found in best.items():
        ratio = f"{best['ours']['tokens_per_cpu_s'] / found['tokens_per_cpu_s']:.2f}" if "ours" in best else ""
        versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
        print(f"| {name} | {found['tokens_per_cpu_s']} | {ratio} | {versions} |")
    for name, why in reasons.items():
        print(f"\n{name} was not measured: {why}")


def processor() -> str:
    """The machine's processor, with the instructions that matter to a product of matrices."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = dict(tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(wide)})"


if __name__ == "__main__":
    main(sys.argv[1:])
