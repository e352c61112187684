r"""Word problems in plain English with numbers that a small model cannot do in its head, and demonstrations of them.

They are the task of a real model of 135 M weights (docs/models.md): a policy that calls Python only has to say what to
compute, any other policy has to compute it. A kind is a template: questions, the ranges of its numbers, and the steps
to the answer. Numbers are drawn until every step gives an integer above 0.

The kinds of `HELD_OUT` are only for evaluation, to measure transfer: neither demonstrations nor RL with `word_problems`
have them. Splits are disjoint by the numbers in a problem, as the miniature's are (`arithmetic.split_of`).
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retool_jax.data.arithmetic import SPLITS, split_of
from retool_jax.data.gsm8k import trace_of, twin_of
from retool_jax.data.instructions import prompt_of

FLAWED = 0.2
"""The share of demonstrations with tools whose program has a wrong operator: it runs, but answers another question.
They teach the form of a call as well as the others do, and only the reward shows which program is right."""

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}
_MISTAKEN = {"+": "-", "-": "+", "*": "+", "//": "*"}

_NAMES = ("Ada", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Leo")
_THINGS = ("apples", "bolts", "books", "bricks", "cards", "eggs", "pens", "plates", "seeds", "shells", "stamps")


@dataclass(frozen=True)
class Kind:
    """One template.

    Attributes:
        numbers: the lowest and the highest value of each number, by its name in `asks` and `steps`.
        steps: lines of Python, each `value = left operator right`; the last value is the answer.
        asks: phrasings; {name} and {other} are two people, {thing} is what is counted, in the plural.
    """

    name: str
    numbers: dict[str, tuple[int, int]]
    steps: tuple[str, ...]
    asks: tuple[str, ...]


TRAINED = (
    Kind(
        "seats",
        {"rows": (103, 489), "seats": (103, 489)},
        ("total = rows * seats",),
        (
            "A stadium has {rows} rows with {seats} seats in each row. How many seats does it have?",
            "{name} sets up {rows} rows of {seats} seats. How many seats are there in all?",
        ),
    ),
    Kind(
        "stock",
        {"stock": (10_003, 98_999), "sold": (1_003, 9_989)},
        ("left = stock - sold",),
        (
            "A shop has {stock} {thing} and sells {sold} of them. How many {thing} are left?",
            "{name} had {stock} {thing} and gave away {sold}. How many {thing} does {name} still have?",
        ),
    ),
    Kind(
        "boxes",
        {"amount": (2_003, 59_999), "size": (13, 97)},
        ("boxes = amount // size",),
        (
            "{name} packs {amount} {thing} into boxes of {size}. How many boxes does {name} fill?",
            "A box holds {size} {thing}. How many boxes are needed for {amount} {thing}?",
        ),
    ),
    Kind(
        "crates",
        {"crates": (103, 299), "each": (103, 299), "sold": (1_003, 9_989)},
        ("packed = crates * each", "left = packed - sold"),
        (
            "A farm fills {crates} crates with {each} {thing} each and sells {sold} {thing}. How many are left?",
            "There were {crates} crates of {each} {thing}. Then {name} took {sold} {thing} out. How many remain?",
        ),
    ),
    Kind(
        "wages",
        {"rate": (103, 489), "days": (103, 299), "bonus": (1_003, 9_989)},
        ("pay = rate * days", "total = pay + bonus"),
        (
            "{name} earns {rate} dollars a day for {days} days and a bonus of {bonus} dollars. How much is that?",
            "{name} had {bonus} dollars and saved {rate} more on each of {days} days. How many dollars is that now?",
        ),
    ),
    Kind(
        "orders",
        {"desks": (103, 489), "desk_price": (103, 489), "lamps": (103, 489), "lamp_price": (13, 97)},
        ("for_desks = desks * desk_price", "for_lamps = lamps * lamp_price", "total = for_desks + for_lamps"),
        (
            "A school buys {desks} desks for {desk_price} dollars each and {lamps} lamps for {lamp_price} each. "
            "How many dollars does it pay?",
            "{name} sells {desks} desks at {desk_price} dollars and {lamps} lamps at {lamp_price} dollars. "
            "How many dollars does {name} get?",
        ),
    ),
    Kind(
        "discount",
        {"price": (2_003, 59_999), "percent": (3, 87)},
        ("hundredfold = price * percent", "discount = hundredfold // 100", "left = price - discount"),
        (
            "A machine costs {price} dollars. Its price falls by {percent} percent. How many dollars does it cost now?",
            "{name} had {price} {thing} and lost {percent} percent of them. How many {thing} are left?",
        ),
    ),
    Kind(
        "average",
        {"monday": (1_003, 9_989), "tuesday": (1_003, 9_989), "wednesday": (1_003, 9_989)},
        ("two_days = monday + tuesday", "total = two_days + wednesday", "average = total // 3"),
        (
            "{name} walks {monday} steps on Monday, {tuesday} on Tuesday and {wednesday} on Wednesday. "
            "How many steps a day is that on average?",
            "A shop sold {monday} {thing} on Monday, {tuesday} on Tuesday and {wednesday} on Wednesday. "
            "What is the average of the three days?",
        ),
    ),
    Kind(
        "rest",
        {"amount": (10_003, 59_999), "broken": (1_003, 9_989), "people": (13, 97)},
        ("kept = amount - broken", "share = kept // people"),
        (
            "Of {amount} {thing}, {broken} are broken. The others are shared equally by {people} people. "
            "How many {thing} does each of them get?",
            "{name} has {amount} {thing}, keeps {broken} and deals out the rest equally to {people} people. "
            "How many {thing} does each of them get?",
        ),
    ),
    Kind(
        "more",
        {"first": (1_003, 9_989), "more": (1_003, 9_989)},
        ("second = first + more", "total = first + second"),
        (
            "{name} has {first} {thing}. {other} has {more} {thing} more than {name}. How many do both have together?",
            "{name} made {first} {thing}, and {other} made {more} more than that. How many did they make together?",
        ),
    ),
    Kind(
        "times",
        {"first": (203, 989), "times": (13, 97)},
        ("second = first * times", "total = first + second"),
        (
            "{name} has {first} {thing}. {other} has {times} times as many. How many do both have together?",
            "A village has {first} people, and a town has {times} times as many. How many people live in both?",
        ),
    ),
    Kind(
        "tank",
        {"full": (60_003, 98_999), "rate": (103, 299), "minutes": (103, 199)},
        ("lost = rate * minutes", "left = full - lost"),
        (
            "A tank holds {full} liters. For {minutes} minutes it loses {rate} liters a minute. How many are left?",
            "{name} has {full} dollars and spends {rate} dollars on each of {minutes} days. How many dollars are left?",
        ),
    ),
    Kind(
        "packs",
        {"guests": (103, 989), "each": (13, 97), "pack": (13, 97)},
        ("needed = guests * each", "packs = needed // pack"),
        (
            "Each of {guests} guests gets {each} {thing}. A pack has {pack} {thing}. How many packs are needed?",
            "{name} puts {each} {thing} on each of {guests} tables. A pack has {pack}. How many packs is that?",
        ),
    ),
    Kind(
        "pond",
        {"length": (203, 489), "width": (203, 489), "side": (103, 199)},
        ("field = length * width", "pond = side * side", "left = field - pond"),
        (
            "A field is {length} meters long and {width} meters wide. A square pond in it has sides of {side} meters. "
            "How many square meters of field are left?",
            "{name} cuts a square with sides of {side} mm out of a sheet of {length} by {width} mm. "
            "How many square mm are left?",
        ),
    ),
    Kind(
        "dearer",
        {"dear": (503, 989), "cheap": (103, 489), "count": (103, 489)},
        ("difference = dear - cheap", "extra = difference * count"),
        (
            "{name} buys {count} chairs for {dear} dollars each, not for {cheap} dollars each. "
            "How many dollars more is that in all?",
            "A lamp was {dear} dollars and is {cheap} dollars now. How many dollars does {name} save on {count} lamps?",
        ),
    ),
)

HELD_OUT = (
    Kind(
        "fence",
        {"length": (103, 489), "width": (103, 489), "price": (13, 97)},
        ("half = length + width", "around = half * 2", "cost = around * price"),
        (
            "A field is {length} meters long and {width} meters wide. A fence around it costs {price} dollars a meter. "
            "How many dollars does the fence cost?",
            "{name} runs around a yard of {length} by {width} meters {price} times. How many meters is that?",
        ),
    ),
    Kind(
        "orchards",
        {"rows": (203, 489), "trees": (203, 489), "other_rows": (103, 299), "other_trees": (103, 299)},
        ("here = rows * trees", "there = other_rows * other_trees", "difference = here - there"),
        (
            "{name} has {rows} rows of {trees} trees, and {other} has {other_rows} rows of {other_trees} trees. "
            "How many more trees does {name} have?",
            "One hall has {rows} rows of {trees} seats, another one {other_rows} rows of {other_trees} seats. "
            "How many seats fewer does the second hall have?",
        ),
    ),
    Kind(
        "part",
        {"amount": (2_003, 59_999), "part": (13, 97)},
        ("given = amount // part", "kept = amount - given"),
        (
            "{name} has {amount} {thing} and gives one of every {part} to {other}. How many {thing} does {name} keep?",
            "One in {part} of {amount} {thing} is broken. How many {thing} are whole?",
        ),
    ),
    Kind(
        "bags",
        {"first": (1_003, 9_989), "second": (1_003, 9_989), "size": (13, 97)},
        ("total = first + second", "bags = total // size"),
        (
            "{name} has {first} {thing} and {other} has {second}. They fill all of them into bags of {size}. "
            "How many bags do they fill?",
            "A bag holds {size} {thing}. How many bags are needed for {first} red {thing} and {second} blue ones?",
        ),
    ),
    Kind(
        "hotel",
        {"floors": (13, 97), "rooms": (13, 97), "lamps": (13, 97)},
        ("all_rooms = floors * rooms", "all_lamps = all_rooms * lamps"),
        (
            "A hotel has {floors} floors with {rooms} rooms each, and {lamps} lamps in each. How many lamps is that?",
            "{name} loads {floors} trucks with {rooms} boxes of {lamps} {thing} each. How many {thing} is that?",
        ),
    ),
)


@dataclass(frozen=True)
class Exercise:
    """One problem of a kind, with its numbers by name."""

    kind: Kind
    numbers: dict[str, int]
    question: str

    @property
    def answer(self) -> int:
        return [*values_of(self.kind.steps, self.numbers).values()][-1]


def values_of(steps: Sequence[str], numbers: dict[str, int]) -> dict[str, int]:
    """The given numbers and the value of each step, by name; in the order of the steps."""
    values = dict(numbers)
    for step in steps:
        name, _, left, sign, right = step.split()
        values[name] = _OPERATORS[sign](_value(left, values), _value(right, values))
    return values


def program_of(steps: Sequence[str], numbers: dict[str, int]) -> str:
    """The steps as a program, with the given numbers in place of their names."""
    lines = [" ".join(str(numbers.get(word, word)) for word in step.split()) for step in steps]
    return "\n".join([*lines, f"print({steps[-1].split()[0]})"])


def exercise(split: str, index: int, seed: int = 0, held_out: bool = False) -> Exercise:
    """Exercise number `index` of an endless, reproducible stream. `seed` chooses the stream of the train split.

    Dev and test each have only one stream, so that runs with different seeds are measured on the same problems.
    """
    rng = np.random.default_rng([seed if split == "train" else 0, SPLITS.index(split), index])
    kinds = HELD_OUT if held_out else TRAINED
    kind = kinds[rng.integers(len(kinds))]
    candidates = _draws(kind, rng)
    numbers = next(n for n in candidates if _comes_out_even(kind.steps, n) and split_of(tuple(n.values())) == split)
    name, other = rng.choice(_NAMES, 2, replace=False)
    words = {"name": name, "other": other, "thing": _THINGS[rng.integers(len(_THINGS))]}
    return Exercise(kind, numbers, kind.asks[rng.integers(len(kind.asks))].format(**numbers, **words))


def problem_row(split: str, index: int, seed: int = 0, held_out: bool = False) -> dict:
    """Exercise number `index` as a row with the columns of DAPO-Math-17k, and its kind."""
    item = exercise(split, index, seed, held_out)
    return {
        "data_source": "word_problems",
        "prompt": [{"role": "user", "content": prompt_of(item.question)}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(item.answer), "style": "rule"},
        "extra_info": {"index": f"{'held-out-' * held_out}{split}-{index:06d}", "kind": item.kind.name},
    }


def demonstration(index: int, tools: bool, seed: int = 0) -> list[dict]:
    """A cold-start conversation about train exercise `index`, as chat messages.

    With tools it runs a program, which is wrong in a share of `FLAWED`, and states what it prints. Without tools it
    writes the steps in words, with the right numbers.
    """
    item = exercise("train", index, seed)
    steps = item.kind.steps
    if not tools:
        values = values_of(steps, item.numbers)
        words = "\n".join(_in_words(step, values) for step in steps)
        return twin_of(item.question, f"{words}\n####", str(item.answer))
    rng = np.random.default_rng([seed, len(SPLITS), index])
    if rng.random() < FLAWED:
        steps = _with_a_mistake(steps, rng.integers(len(steps)))
    printed = str([*values_of(steps, item.numbers).values()][-1])
    return trace_of(item.question, program_of(steps, item.numbers), printed, printed)


def _draws(kind: Kind, rng: np.random.Generator) -> Iterator[dict[str, int]]:
    """Endless draws of a kind's numbers, in batches, because few divide without a remainder."""
    lowest, highest = np.array([*kind.numbers.values()]).T
    while True:
        for row in rng.integers(lowest, highest + 1, (64, len(lowest))).tolist():
            yield dict(zip(kind.numbers, row, strict=True))


def _value(word: str, values: dict[str, int]) -> int:
    return int(word) if word.isdigit() else values[word]


def _comes_out_even(steps: Sequence[str], numbers: dict[str, int]) -> bool:
    """Whether the numbers are different, and every step gives an integer above 0."""
    values = values_of(steps, numbers)
    divisions = [step.split()[2::2] for step in steps if " // " in step]
    whole = not any(_value(left, values) % _value(right, values) for left, right in divisions)
    return whole and min(values.values()) > 0 and len(set(numbers.values())) == len(numbers)


def _with_a_mistake(steps: tuple[str, ...], at: int) -> tuple[str, ...]:
    name, _, left, sign, right = steps[at].split()
    return (*steps[:at], f"{name} = {left} {_MISTAKEN[sign]} {right}", *steps[at + 1 :])


def _in_words(step: str, values: dict[str, int]) -> str:
    name, _, left, sign, right = step.split()
    sign = sign.replace("//", "/")
    return f"{name.replace('_', ' ')}: {_value(left, values)} {sign} {_value(right, values)} = {values[name]}"
