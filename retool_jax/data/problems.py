r"""Problems: the miniature's, word problems, or published rows from a file or the hub.

`clean` repairs common faults of published sets: repeated rows, contradicting answers, and prompts that ask for the
answer in two forms.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath

import numpy as np

from retool_jax.data import arithmetic, word_problems
from retool_jax.data.config import HELD_OUT, SetConfig
from retool_jax.data.instructions import prompt_of, question_of, without_instructions
from retool_jax.data.rows import IDS, object_in, question_in, rename_columns, tools_of, true_answer
from retool_jax.data.sources import read_rows
from retool_jax.errors import UserError
from retool_jax.tokens.demonstrations import holds_control

# Sources whose rows are generated on demand, from (split, index, seed).
MADE: dict[str, Callable[[str, int, int], dict]] = {
    "arithmetic": arithmetic.problem_row,
    "word_problems": word_problems.problem_row,
    HELD_OUT: partial(word_problems.problem_row, held_out=True),
}


@dataclass(frozen=True)
class Problem:
    """A question as chat messages, and the true answer."""

    id: str
    messages: tuple[dict, ...]
    ground_truth: str
    tools: tuple[str, ...] | None = None  # names of the tools that it may use; None: all tools of the run

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


class Problems:
    """An endless, reproducible stream: position i has the same problem in every run with this seed.

    A finite data set is repeated, with a new order of the train split in each epoch; sources that are made here never
    repeat. The dev and test splits do not depend on the seed.
    """

    def __init__(self, source: str, split: str, seed: int) -> None:
        self.split = split
        self._source, self._seed = source, seed
        self.finite = None if source in MADE else load_problems(source)

    @property
    def name(self) -> str:
        """The set's name in metric names: its split if it is made here, a file's name without folder and suffix, and
        for the hub verl-recipe's name in `retool.py`, such as aime_2025 for yentinglin/aime_2025."""
        if self.finite is None:
            return self.split
        path = PurePath(self._source)
        if path.suffix in (".jsonl", ".json", ".parquet"):
            name = path.stem
        elif self._source.startswith("tfds:"):  # tfds:NAME/SPLIT
            name = self._source.removeprefix("tfds:").rpartition("/")[0]
        else:
            name = PurePath(self._source.partition(":")[0]).name
        return re.sub(r"[^a-z0-9_.-]", "_", name.lower())

    @property
    def digest(self) -> str:
        """`digest_of` a finite data set; empty for a source that is made here."""
        return digest_of(self.finite) if self.finite else ""

    def __getitem__(self, index: int) -> Problem:
        if self.finite is None:
            row = MADE[self._source](self.split, index, self._seed)
            return to_problem(row, f"{self._source} {self.split} {index}")
        epoch, position = divmod(index, len(self.finite))
        if self.split == "train":
            position = np.random.default_rng([self._seed, epoch]).permutation(len(self.finite))[position]
        return self.finite[position]

    def head(self, count: int) -> list[Problem]:
        """The first `count` problems, or all of a smaller data set."""
        return [self[i] for i in range(count if self.finite is None else min(count, len(self.finite)))]


def digest_of(problems: Sequence[Problem]) -> str:
    """SHA-256 of the problems' fields, in their order."""
    fields = [(p.id, p.messages, p.ground_truth, p.tools) for p in problems]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def count_shared(problems: Sequence[Problem], others: Sequence[Problem]) -> int:
    """The number of problems with exactly the same question as one of `others`."""
    questions = {problem.question for problem in others}
    return sum(problem.question in questions for problem in problems)


def load_problems(source: str, columns: Mapping[str, str] | None = None) -> list[Problem]:
    """The checked rows of a source (see `sources.read_rows`); repeated rows, as in DAPO-Math-17k, only once.

    `columns` has the names that a config sets for the columns `question`, `answer` and `id`.
    """
    problems: dict[str, Problem] = {}
    first: dict[str, int] = {}  # by id: its row
    for number, row in enumerate(read_rows(source, f", or one of {', '.join(MADE)}"), start=1):
        where = f"{source} row {number}"
        row = rename_columns(row, where, columns) if columns else row
        # An id has no path: a set is the same one wherever its file is.
        problem = to_problem(row, where, f"row {number}")
        if problems.setdefault(problem.id, problem) != problem:
            raise UserError(
                f"{where} has the id {problem.id!r} of another problem, that of row {first[problem.id]}; make ids"
                " unique"
            )
        first.setdefault(problem.id, number)
    if not problems:
        raise UserError(f"data {source} has no rows; give at least one problem")
    return list(problems.values())


def problems_of_set(config: SetConfig, count: int) -> list[Problem]:
    """The first `count` problems of an evaluation's set, in its order; 0: all of them.

    Raises:
        UserError: as `load_problems`, or `count` is 0 for a set that is made here and has no end.
    """
    if config.source not in MADE:
        columns = {"question": config.question, "answer": config.answer, "id": config.id}
        found = load_problems(config.source, columns)
        return found[:count] if count else found
    if not count:
        raise UserError(f"data.source={config.source} has no end; set evaluation.problems to how many of it to ask")
    return Problems(config.source, config.split, 0).head(count)


# --- one row ----------------------------------------------------------------------------------------------------------


def to_problem(row: dict, where: str, name: str = "") -> Problem:
    """The problem in a row of any form that `rows` knows.

    `where` is for errors. A row without an id gets `name`, or `where` if that is empty.
    """
    tools = tools_of(row, where)
    messages, bare = question_in(row, where)
    index = object_in(row, "extra_info", where).get("index")
    if index is None and row.get("prompt") is None:
        index = next((row[key] for key in IDS if row.get(key) is not None), None)
    if bare:
        messages[-1]["content"] = prompt_of(messages[-1]["content"])
    return Problem(name or where if index is None else str(index), tuple(messages), true_answer(row, where), tools)


def to_row(problem: Problem, source: str) -> dict:
    """The reverse of `to_problem`: a row in DAPO's columns, with the problem's tools if it names any."""
    row = {
        "data_source": source,
        "prompt": list(problem.messages),
        "ability": "MATH",
        "reward_model": {"ground_truth": problem.ground_truth, "style": "rule"},
        "extra_info": {"index": problem.id},
    }
    return row if problem.tools is None else row | {"tools": list(problem.tools)}


# --- repeats and contradictions ---------------------------------------------------------------------------------------


def control_characters(text: str) -> str:
    r"""The control characters in a text except line breaks and tabs; a wrongly escaped `\boxed` begins with one."""
    return "".join(sorted({c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t\r"}))


def clean(rows: Iterable[tuple[int, Problem]]) -> tuple[list[Problem], Counter[str], list[tuple[int, str]]]:
    """Each question once, in order, with our instruction.

    DAPO-Math-17k repeats each row a hundred times. Repeats are found first by id, which is cheap, then by question. A
    question with two different answers is dropped with all its rows, as it is unknown which answer is right.

    Args:
        rows: problems with the numbers of their rows.

    Returns:
        The kept problems; the number of dropped rows by reason; and (row, reason with its details) of each dropped row,
        without those that only repeat another row.
    """
    reasons: Counter[str] = Counter()
    dropped: list[tuple[int, str]] = []

    def drop(row: int, reason: str, detail: str = "") -> None:
        reasons[reason] += 1
        dropped.append((row, f"{reason}: {detail}" if detail else reason))

    by_id: dict[str, tuple[int, Problem]] = {}
    for row, problem in rows:
        first, known = by_id.setdefault(problem.id, (row, problem))
        if first != row and known == problem:
            reasons["repeats a row"] += 1
        elif first != row:
            drop(row, "has the id of another row", f"{problem.id!r}, as row {first}")
    by_question: dict[str, list[tuple[int, Problem]]] = defaultdict(list)
    for row, problem in by_id.values():
        question = question_of(problem.question)
        if not question:
            drop(row, "has no question")
        elif control_characters(question):
            drop(row, "has control characters", repr(control_characters(question)))
        elif holds_control(question):
            drop(row, "holds marks of a chat template")
        else:
            by_question[" ".join(question.split())].append((row, problem))
    kept = []
    for (first, problem), *others in by_question.values():
        if any(other.ground_truth != problem.ground_truth for _, other in others):
            answers = ", ".join(f"{one.ground_truth} in row {row}" for row, one in [(first, problem), *others])
            for row, _ in [(first, problem), *others]:
                drop(row, "its question has two answers", answers)
            continue
        for row, _ in others:
            drop(row, "repeats a question", f"that of row {first}")
        *before, last = problem.messages
        asking = [*without_instructions(before), last | {"content": prompt_of(last["content"])}]
        kept.append(replace(problem, messages=tuple(asking)))
    return kept, reasons, dropped
