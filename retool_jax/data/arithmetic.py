"""The miniature: arithmetic that a small model cannot do in its head, and demonstrations of how to use Python for it.

Problems have the columns of DAPO-Math-17k. A model of a few hundred thousand weights cannot compute products, greatest
common divisors and modular powers of three-digit numbers. It can compute small sums of a number and a round one, so a
model without tools is not at zero. All operands have three digits: the model spends its capacity on copying them, and
each width is a separate skill to learn.

The splits are disjoint by operands: no pair or triple of numbers is in two splits, whatever is asked about it.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "dev", "test")
_HELD_OUT_PERCENT = {"dev": 10, "test": 10}
_KINDS = ("product", "gcd", "power", "sum")
_KIND_SHARES = (0.3, 0.25, 0.25, 0.2)

_QUESTIONS = {
    "product": ("What is {0} times {1}?", "Multiply {0} by {1}.", "Compute {0} * {1}."),
    "gcd": ("What is the gcd of {0} and {1}?", "Find gcd({0}, {1})."),
    "power": ("What is {0} to the power {1} modulo {2}?", "Compute {0}^{1} mod {2}."),
    "sum": ("What is {0} plus {1}?", "Add {0} and {1}."),
}
# For each kind: the code, and a function for what it prints.
_RIGHT: dict[str, tuple[str, Callable[..., int]]] = {
    "product": ("print({0} * {1})", lambda a, b: a * b),
    "gcd": ("import math\nprint(math.gcd({0}, {1}))", math.gcd),
    "power": ("print(pow({0}, {1}, {2}))", pow),
    "sum": ("print({0} + {1})", lambda a, b: a + b),
}
# A beginner's mistake for each kind: the code runs, but answers another question.
_WRONG: dict[str, tuple[str, Callable[..., int]]] = {
    "product": ("print({0} ** 2)", lambda a, b: a**2),
    "gcd": ("import math\nprint(math.lcm({0}, {1}))", math.lcm),
    "power": ("print({0} * {1} % {2})", lambda a, b, m: a * b % m),
    "sum": ("print({0} * {1})", lambda a, b: a * b),
}


@dataclass(frozen=True)
class Exercise:
    """One question with its operands; `kind` is one of product, gcd, power, sum."""

    kind: str
    operands: tuple[int, ...]
    question: str

    @property
    def answer(self) -> int:
        return _RIGHT[self.kind][1](*self.operands)


def split_of(operands: tuple[int, ...]) -> str:
    """The split of these operands, in any order, from a hash that is the same in every process."""
    digest = hashlib.blake2b(repr(sorted(operands)).encode(), digest_size=8).digest()
    percent = int.from_bytes(digest, "big") % 100
    for split, share in _HELD_OUT_PERCENT.items():
        if percent < share:
            return split
        percent -= share
    return "train"


def exercise(split: str, index: int, seed: int = 0) -> Exercise:
    """Exercise number `index` of an endless, reproducible stream. `seed` chooses the stream of the train split.

    Each held-out split has only one stream, so that runs with different seeds are measured on the same problems.
    """
    rng = np.random.default_rng([seed if split == "train" else 0, SPLITS.index(split), index])
    kind = _KINDS[rng.choice(len(_KINDS), p=_KIND_SHARES)]
    while True:
        operands = _draw_operands(kind, rng)
        if split_of(operands) == split:
            break
    question = _QUESTIONS[kind][rng.integers(len(_QUESTIONS[kind]))]
    return Exercise(kind, operands, question.format(*operands))


def problem_row(split: str, index: int, seed: int = 0) -> dict:
    """Exercise number `index` as a row with the columns of DAPO-Math-17k."""
    item = exercise(split, index, seed)
    return {
        "data_source": "arithmetic",
        "prompt": [{"role": "user", "content": item.question}],
        "ability": item.kind,
        "reward_model": {"ground_truth": str(item.answer), "style": "rule"},
        "extra_info": {"index": f"{split}-{index:06d}"},
    }


def demonstration(index: int, tools: bool, seed: int = 0) -> list[dict]:
    """A cold-start conversation about train exercise `index`, as chat messages; imperfect on purpose.

    With tools, 45 % compute the right thing, 25 % run the wrong operator and the rest state a number without computing
    it. Without tools, all state the number. A right use and a guess begin alike, so only the reward can distinguish
    them.
    """
    item = exercise("train", index, seed)
    messages = [{"role": "user", "content": item.question}]
    behaviour = np.random.default_rng([seed, len(SPLITS), index]).random()
    if tools and behaviour < 0.7:
        template, result = (_RIGHT if behaviour < 0.45 else _WRONG)[item.kind]
        call = {"name": "code_interpreter", "arguments": {"code": template.format(*item.operands)}}
        answer = result(*item.operands)
        messages.append({"role": "assistant", "content": "I will compute it.", "tool_calls": [{"function": call}]})
        messages.append({"role": "tool", "content": str(answer)})
    else:
        answer = item.answer
    messages.append({"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."})
    return messages


def _draw_operands(kind: str, rng: np.random.Generator) -> tuple[int, ...]:
    match kind:
        case "product":
            # The product always has six digits: a small model can learn to copy numbers of one width.
            return tuple(int(x) for x in rng.integers(317, 1000, 2))
        case "gcd":
            # A common factor of two digits, so that guessing "1" never helps.
            factor = int(rng.integers(12, 100))
            low, high = -(-100 // factor), 999 // factor
            return tuple(factor * int(x) for x in rng.integers(low, high + 1, 2))
        case "power":
            return tuple(int(x) for x in rng.integers(100, 1000, 3))
        case "sum":
            # The second number is round, so the sum needs no interpreter: one digit to add and two to copy.
            return int(rng.integers(100, 500)), 100 * int(rng.integers(1, 5))
    raise ValueError(f"unknown kind {kind!r}")
