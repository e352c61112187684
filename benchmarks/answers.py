r"""Compare graders on answers that were changed on purpose: ours, math-verify and optionally two of verl.

    python benchmarks/answers.py math500=FILE deepmath=FILE [mutations=2000] [seed=0] [out=FILE] [verl=FOLDER]

Each line of the files is a JSON object with the truth under `answer`. Each mutation changes one truth: `sign` and
`digit` make it wrong; `unit` and `form` write it differently, so that it stays right. Prints JSON: how many answers
each grader accepts, by kind of mutation, and the time of its slowest verdict. `out` gets a line for every answer on
which the graders differ or ours is wrong.

verl's graders run as published, from a folder made with `pip install --no-deps --target FOLDER verl pylatexenc`:
`math_dapo` with `strict_box_verify` (the box equals the truth as a string; what its ReTool recipe uses) and
`prime_math` (MATH's and PRM800K's normalisation, then SymPy).
"""

import importlib
import json
import random
import re
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import arguments
import math_verify

from retool_jax.answers import check, workers

DEFAULTS = {"math500": "", "deepmath": "", "mutations": 2000, "seed": 0, "out": "", "verl": ""}
STAYS_RIGHT = {"unit": True, "form": True, "sign": False, "digit": False, "same": True}
UNITS = (
    r"{}\text{{ units}}",
    r"{}\text{{ ways}}",
    r"{}\,\text{{cm}}",
    r"\${}",
    r"{}^\circ",
    r"{}\text{{ square feet}}",
)
NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
FRACTION = re.compile(r"(-?)\\d?frac\s*(?:\{([0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))")
Grader = Callable[[str, str], bool]


def main(words: list[str]) -> None:
    options = arguments.parse(words, DEFAULTS)
    graders = {"ours": lambda text, truth: check(text, truth).correct, "math_verify": math_verify_grader}
    if options["verl"]:
        graders |= verl_graders(Path(options["verl"]))
    truths = [
        json.loads(line)["answer"]
        for name in ("math500", "deepmath")
        if options[name]
        for line in Path(options[name]).read_text().splitlines()
    ]
    rng = random.Random(options["seed"])
    answers = [(truth, truth, "same") for truth in truths]
    while len(answers) < len(truths) + options["mutations"]:
        truth, kind = rng.choice(truths), rng.choice(list(MUTATIONS))
        if (answer := MUTATIONS[kind](truth, rng)) and answer != truth:
            answers.append((truth, answer, kind))

    workers.pool.start()
    counts: dict[str, Counter] = {kind: Counter() for kind in STAYS_RIGHT}
    slowest: Counter = Counter()
    differing = []
    for truth, answer, kind in answers:
        verdicts = {}
        for name, grader in graders.items():
            began = time.perf_counter()
            verdicts[name] = grader(rf"The answer is $\boxed{{{answer}}}$.", truth)
            slowest[name] = max(slowest[name], round(time.perf_counter() - began, 3))
        counts[kind]["answers"] += 1
        counts[kind].update(name for name, right in verdicts.items() if right)
        if len(set(verdicts.values())) > 1 or verdicts["ours"] is not STAYS_RIGHT[kind]:
            differing.append({"kind": kind, "truth": truth, "answer": answer, **verdicts})
    if options["out"]:
        Path(options["out"]).write_text("".join(json.dumps(line) + "\n" for line in differing))
    numbers = {"taken_for_right": counts, "differing": len(differing), "slowest_s": slowest}
    print(json.dumps({"benchmark": "answers"} | numbers))


# --- mutations --------------------------------------------------------------------------------------------------------


def change_sign(truth: str, rng: random.Random) -> str | None:
    """Flip the leading sign, or one between two terms."""
    places = list(re.finditer(r"(?<=[0-9a-z})])\s*[+-]\s*(?=[0-9a-z\\])", truth))
    if places and rng.random() < 0.5:
        place = rng.choice(places)
        return truth[: place.start()] + (" - " if "+" in place[0] else " + ") + truth[place.end() :]
    if truth.startswith("-"):
        return truth[1:]
    return f"-{truth}" if re.match(r"[1-9]|\\d?frac|\\sqrt|\\pi", truth) and "," not in truth else None


def change_digit(truth: str, rng: random.Random) -> str | None:
    places = [m.start() for m in re.finditer("[0-9]", truth)]
    if not places:
        return None
    place = rng.choice(places)
    return truth[:place] + str((int(truth[place]) + rng.randint(1, 9)) % 10) + truth[place + 1 :]


def add_unit(truth: str, rng: random.Random) -> str | None:
    if not (NUMBER.fullmatch(truth) or FRACTION.fullmatch(truth)):
        return None
    return rng.choice(UNITS).format(truth)


def change_form(truth: str, rng: random.Random) -> str | None:
    """Write the same value differently: a decimal, an uncancelled fraction, SymPy's output, with spaces or a name."""
    forms = [rf"\left({truth}\right)" if not re.search(r"[,=(]|[a-zA-Z]{3}|box", truth) else None]
    forms += [f"x = {truth}" if not re.search(r"[=<>a-zA-Z]", truth) else None, f" {truth} ."]
    if found := FRACTION.fullmatch(truth):
        over, under = int(found[2] or found[3]), int(found[4] or found[5])
        forms += [f"{found[1]}{over}/{under}", rf"{found[1]}\frac{{{3 * over}}}{{{3 * under}}}"]
        value = Fraction(over, under)
        forms += [f"{found[1]}{float(value)}"] if 1000 % under == 0 else []
    if NUMBER.fullmatch(truth):
        forms += [f"{truth}.0" if "." not in truth else f"{truth}0", rf"\text{{{truth}}}", rf"\mathbf{{{truth}}}"]
    printed = re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}(?![a-zA-Z\\])", r"\1/\2", truth.replace("dfrac", "frac"))
    printed = re.sub(r"(?<=[0-9])\s*\\(pi|sqrt)", r"*\\\1", printed).replace(r"\pi", "pi")
    printed = re.sub(r"\\sqrt\{([0-9]+)\}", r"sqrt(\1)", printed)
    forms += [printed if "\\" not in printed and printed != truth else None]
    return rng.choice([form for form in forms if form])


MUTATIONS = {"sign": change_sign, "digit": change_digit, "unit": add_unit, "form": change_form}


# --- others' graders --------------------------------------------------------------------------------------------------


def math_verify_grader(text: str, truth: str) -> bool:
    """math-verify with its defaults; the truth is in a box, as in verl's wrapper."""
    return math_verify.verify(math_verify.parse(rf"\boxed{{{truth}}}"), math_verify.parse(text))


def verl_graders(folder: Path) -> dict[str, Grader]:
    """Two graders of verl, imported without the `__init__` of its packages, which would import torch and ray."""
    sys.path.append(str(folder))
    for name in ("verl", "verl.utils", "verl.utils.reward_score"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["verl.utils.metric"] = types.SimpleNamespace(Metric=None)  # it needs torch; the graders do not use it
    dapo, prime = (importlib.import_module(f"verl.utils.reward_score.{name}") for name in ("math_dapo", "prime_math"))
    return {
        "verl_dapo_strict": lambda text, truth: bool(dapo.compute_score(text, truth, strict_box_verify=True)["acc"]),
        "verl_prime_math": lambda text, truth: bool(prime.compute_score(text, truth)[0]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
