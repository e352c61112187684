"""The numbers of a finished evaluation, as JSON and as a table, and the comparison of two evaluations."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from retool_jax.errors import UserError, one_line
from retool_jax.evaluation.estimators import (
    Estimate,
    maj_at,
    mean_at_n,
    paired_difference,
    pass_at,
    recipe_best_worst_maj,
)
from retool_jax.metrics import format_percent
from retool_jax.rollout.trajectory import INFRASTRUCTURE
from retool_jax.shapes import FINITE, TEXT, WHOLE, OrNull


@dataclass(frozen=True)
class ProblemResult:
    """A problem and the results of its samples, without those that the machinery dropped.

    Attributes:
        id: the problem's.
        correct: the verdict of each sample.
        answers: the answer of each sample, None without one.
    """

    id: str
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...]


# Keys of a config, or their first parts, that say how a sample is drawn; its weights and tokenizer are another matter.
DRAWING = ("evaluation.temperature", "evaluation.top_", "rollout.", "engine.max_length", "tools", "sandbox.limits.")

# The parts of result.json that other code reads.
_ESTIMATE = {"value": FINITE, "stderr": OrNull(FINITE), "low": FINITE, "high": FINITE, "problems": WHOLE}
_NUMBERS = ("turns_mean", "calls_per_sample", "response_tokens", "checker_timeouts")
_SHARES = {"tool_rate": OrNull(FINITE), "tool_success": OrNull(FINITE)}
RESULT = {
    **{"set?": TEXT, "samples?": WHOLE, "dropped?": WHOLE},
    "numbers?": OrNull({"recipe?": OrNull({...: OrNull(FINITE)}), ...: OrNull(_ESTIMATE)}),
    "strict_differs?": OrNull({"count": WHOLE, "share": OrNull(FINITE)}),
    "trajectories?": OrNull({...: OrNull(FINITE)}),
}
# A result that is complete, so that it can be shown again, has all of these.
_DRAWN = (
    {f"end/{end}": WHOLE for end in INFRASTRUCTURE} | dict.fromkeys(_NUMBERS, FINITE) | _SHARES | {...: OrNull(FINITE)}
)
COMPLETE = {key.removesuffix("?"): shape for key, shape in RESULT.items()} | {"trajectories": _DRAWN}


def numbers_of(problems: Sequence[ProblemResult], ks: Sequence[int] = (), seed: int = 0) -> dict:
    """Accuracy, pass@k, maj@k and verl's numbers in a form for JSON.

    `accuracy`, `pass@1`, `maj@1` and so on each have the fields of an `Estimate`, with None for NaN, and the number of
    `problems` in the mean. An entry is None if no problem has k samples. `recipe` has the numbers of
    `estimators.recipe_best_worst_maj`.

    Args:
        ks: the k of pass@k and maj@k; if empty, the largest number of samples of a problem and all powers of two below.
        seed: of the intervals.

    Raises:
        UserError: no problem has a sample, or one of the `ks` is below 1.
    """
    correct, answers = [p.correct for p in problems], [p.answers for p in problems]
    most = max(map(len, correct), default=0)
    ks = ks or [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    count = {k: sum(len(samples) >= k for samples in correct) for k in (1, *ks)}  # of problems with k samples
    numbers = {"accuracy": _fields(mean_at_n(correct, seed), count[1])}
    numbers |= {f"pass@{k}": _fields(pass_at(correct, k, seed), count[k]) if count[k] else None for k in ks}
    numbers |= {f"maj@{k}": _fields(maj_at(correct, answers, k, seed), count[k]) if count[k] else None for k in ks}
    return {**numbers, "recipe": recipe_best_worst_maj(correct, answers)}


def compare(ours: Mapping, theirs: Mapping) -> dict:
    """Compare two results, `{"set": str, "problems": [{"id", "correct": [bool, ...], ...}, ...]}`.

    Returns `set`; the numbers of shared `problems` and of problems in `only_ours` and `only_theirs`; and `ours`,
    `theirs` and the paired `difference` (ours minus theirs) over the shared problems, as estimates in the form of
    `numbers_of`. A problem without samples counts as absent. `drawn_differently` has, of the keys in both results'
    `config` that say how a sample is drawn, those whose values differ, with both values. `changed` is whether the
    results are of as many problems and of other ones, as after a file was edited.

    Raises:
        UserError: one is not such a result, they are of different sets, or they have no problem in common. Two sets are
            the same if their names are equal apart from case and punctuation, if the names are paths to the same file,
            or if the results have the same `problems_sha256`.
    """
    (name, first), (other, second) = _read(ours, "this result"), _read(theirs, "the result to compare with")
    plain = ["".join(filter(str.isalnum, os.path.realpath(text))).casefold() for text in (name, other)]
    digests = ours.get("problems_sha256"), theirs.get("problems_sha256")
    if plain[0] != plain[1] and not (digests[0] and digests[0] == digests[1]):
        raise UserError(f"a result on {name!r} cannot be compared with one on {other!r}; choose two of one set")
    shared = [problem for problem in first if problem in second]
    if not shared:
        raise UserError(
            f"of the {len(first)} problems of this result and the {len(second)} of the other none is in both (the ids"
            f" begin with {min(first, default='')!r} and {min(second, default='')!r}); choose two results on one"
            " version of the set"
        )
    left, right = [first[problem] for problem in shared], [second[problem] for problem in shared]
    return {
        "set": name,
        "problems": len(shared),
        "only_ours": len(first) - len(shared),
        "only_theirs": len(second) - len(shared),
        "ours": _fields(mean_at_n(left), len(shared)),
        "theirs": _fields(mean_at_n(right), len(shared)),
        "difference": _fields(paired_difference(left, right), len(shared)),
        "changed": all(digests) and digests[0] != digests[1] and len(ours["problems"]) == len(theirs["problems"]),
        "drawn_differently": _drawn_differently(ours.get("config"), theirs.get("config")),
    }


def _drawn_differently(ours: object, theirs: object) -> dict[str, list]:
    """The keys of both configs that say how a sample is drawn and have different values."""
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return {}
    keys = sorted(key for key in ours if key.startswith(DRAWING) and key in theirs)
    return {key: [ours[key], theirs[key]] for key in keys if ours[key] != theirs[key]}


def table(numbers: Mapping, title: str | None = None) -> Table:
    """The estimates of `numbers_of` or `compare` for the console, one row each, in per cent; without other entries.

    If there are verl's numbers, its best@k is shown beside pass@k, and its maj@k beside maj@k.
    """
    shown = Table("", title=title, title_justify="left", title_style="bold")
    recipe = numbers.get("recipe") or {}
    for column in ("mean ± standard error", "95 % interval", "problems", *(["verl's bootstrap"] if recipe else [])):
        shown.add_column(column, justify="right")
    for name, *cells in rows_of(numbers):
        of_verl = format_percent(recipe.get(name.replace("pass@", "best@")))
        shown.add_row(name, *cells, *([of_verl] if recipe else []))
    return shown


def rows_of(numbers: Mapping) -> list[tuple[str, str, str, str]]:
    """Each estimate as (name, mean ± standard error, 95 % interval, problems), in per cent, without other entries."""
    return [
        (
            name,
            format_percent(fields["value"], fields["stderr"]),
            f"{100 * fields['low']:.1f} to {100 * fields['high']:.1f} %",
            f"{fields['problems']:,}",
        )
        for name, fields in numbers.items()
        if isinstance(fields, Mapping) and "stderr" in fields
    ]


def _fields(estimate: Estimate, problems: int) -> dict[str, float | int | None]:
    """An estimate for JSON, which has no NaN."""
    fields = {name: None if math.isnan(value) else value for name, value in asdict(estimate).items()}
    return {**fields, "problems": problems}


def _read(result: Mapping, what: str) -> tuple[str, dict[str, list[bool]]]:
    """The name of a result's set, and the verdicts of each problem by its id, without problems that have none."""
    try:
        name, rows = result["set"], [(str(row["id"]), list(row["correct"])) for row in result["problems"]]
        if not all(isinstance(verdict, bool) for _, correct in rows for verdict in correct):
            raise TypeError("a verdict is neither true nor false")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{what} cannot be read ({type(error).__name__}: {one_line(error)}): it needs a 'set', and 'problems' with"
            " an 'id' and a list of 'correct' each; name a file that an evaluation wrote"
        ) from error
    if len({problem for problem, _ in rows}) < len(rows):
        raise UserError(f"{what} has two problems with one id, so it cannot be compared; evaluate the set again")
    return str(name), {problem: correct for problem, correct in rows if correct}
