r"""Problems to learn from: rows in the columns of DAPO-Math-17k, from the miniature, a file or the hub.

Rows of other published sets are mapped to those columns as they are read. `clean` repairs what is wrong with the sets
themselves: repeats, contradicting answers, and prompts that ask for the answer in two forms at once.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retool_jax.data import arithmetic
from retool_jax.data.sources import read_rows
from retool_jax.errors import UserError

# The one sentence that asks for the form which the reward reads; without quotes, since models copy them.
INSTRUCTION = r"Reason step by step and give the final answer in \boxed{}."


@dataclass(frozen=True)
class Problem:
    """A question as chat messages, and the answer that scores."""

    id: str
    messages: tuple[dict, ...]
    ground_truth: str
    tools: tuple[str, ...] | None = None  # those that it may call, by name; None: all that the run has

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


class Problems:
    """An endless, reproducible stream: position i holds the same problem in every run with this seed.

    A finite data set is repeated, the train split in a new order each epoch; the miniature never repeats. The dev and
    test splits do not depend on the seed.
    """

    def __init__(self, source: str, split: str, seed: int) -> None:
        self.split = split
        self._seed = seed
        self.finite = None if source == "arithmetic" else load_problems(source)

    def __getitem__(self, index: int) -> Problem:
        if self.finite is None:
            row = arithmetic.problem_row(self.split, index, self._seed)
            return to_problem(row, f"arithmetic {self.split} {index}")
        epoch, position = divmod(index, len(self.finite))
        if self.split == "train":
            position = np.random.default_rng([self._seed, epoch]).permutation(len(self.finite))[position]
        return self.finite[position]

    def head(self, count: int) -> list[Problem]:
        """The first `count` problems, or all of a smaller data set."""
        return [self[i] for i in range(count if self.finite is None else min(count, len(self.finite)))]


def load_problems(source: str) -> list[Problem]:
    """The rows of a source (see `sources.read_rows`), checked; one that is repeated (DAPO-Math-17k's are) once."""
    problems: dict[str, Problem] = {}
    for number, row in enumerate(read_rows(source, ", or arithmetic"), start=1):
        problem = to_problem(row, f"{source} row {number}")
        if problems.setdefault(problem.id, problem) != problem:
            raise UserError(
                f"{source} row {number} has the extra_info.index {problem.id!r} of another problem; make them unique"
            )
    if not problems:
        raise UserError(f"data {source} has no rows; give at least one problem")
    return list(problems.values())


# --- one row ----------------------------------------------------------------------------------------------------------

_PAIRS = (
    ("Problem", "Answer"),  # Maxwell-Jia/AIME_2024
    ("problem", "answer"),  # yentinglin/aime_2025, MATH-500
    ("question", "answer"),  # GSM8K
    ("input", "output"),  # the AIME files of ReTool's evaluation
)


def to_problem(row: dict, where: str) -> Problem:
    """One row with DAPO's `prompt`, `reward_model.ground_truth` and `extra_info.index`; `where` is for errors."""
    tools = tools_of(row, where)
    row = _in_dapo_columns(row)
    for column in ("prompt", "reward_model"):
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; it has {', '.join(sorted(row))}")
    reward, extra = ({} if row.get(key) is None else row[key] for key in ("reward_model", "extra_info"))
    if not isinstance(reward, dict) or not isinstance(extra, dict):
        raise UserError(f"{where}: reward_model and extra_info must be objects, as {{'ground_truth': '34'}}")
    answer = "" if reward.get("ground_truth") is None else str(reward["ground_truth"]).strip()
    if not answer:
        raise UserError(f"{where} has an empty reward_model.ground_truth; every problem needs an answer")
    prompt = row["prompt"]
    messages = prompt if isinstance(prompt, list) else []
    if not messages or not all(isinstance(m, dict) and _is_text(m.get("role"), m.get("content")) for m in messages):
        raise UserError(f"{where} has no usable prompt; expected a list of messages with role and content, not empty")
    index = extra.get("index")
    return Problem(
        where if index is None else str(index),
        tuple({"role": m["role"], "content": m["content"]} for m in messages),
        plain_integer(answer),
        tools,
    )


def tools_of(row: dict, where: str) -> tuple[str, ...] | None:
    """The tools that a row names in its column `tools`; None where it names none, so that it gets all.

    Schemas there, as published conversations have, name nothing: the run's tools have their own.

    Raises:
        UserError: the column is no list of names.
    """
    names = row.get("tools")
    if names is None or (isinstance(names, list) and names and all(isinstance(name, dict) for name in names)):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} has tools={str(names)[:80]!r}; it must be a list of names, as ['python']")
    return tuple(names)


def to_row(problem: Problem, source: str) -> dict:
    """The reverse: a row in DAPO's columns, with the tools that the problem names."""
    row = {
        "data_source": source,
        "prompt": list(problem.messages),
        "ability": "MATH",
        "reward_model": {"ground_truth": problem.ground_truth, "style": "rule"},
        "extra_info": {"index": problem.id},
    }
    return row if problem.tools is None else row | {"tools": list(problem.tools)}


def _in_dapo_columns(row: dict) -> dict:
    """A row of another published form in DAPO's columns; a row of no known form as it is."""
    if "prompt" in row and "label" in row and "reward_model" not in row:  # zhuzilin/dapo-math-17k
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return row | {"prompt": messages, "reward_model": {"ground_truth": row["label"]}}
    pair = next((pair for pair in _PAIRS if row.keys() >= set(pair)), None)
    if pair is None or "prompt" in row:
        return row
    question, answer = (row[column] for column in pair)
    if isinstance(answer, str):
        answer = answer.rpartition("####")[2]  # GSM8K: the solution, then the answer
    return {
        "prompt": [{"role": "user", "content": prompt_of(question)}] if _is_text(question) else [],
        "reward_model": {"ground_truth": answer},
        "extra_info": {"index": next((row[key] for key in ("ID", "unique_id", "id") if key in row), None)},
    }


_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+|\d{1,1000})(?:\.0+)?(?:\^(?:\\circ|\{\\circ\})|°)?")


def plain_integer(answer: str) -> str:
    r"""An integer in digits alone: `336^\circ`, `1,234`, `$042$` and `7.0` are 336, 1234, 42 and 7; others as given."""
    match = _INTEGER.fullmatch(answer.replace("$", "").strip().replace("\N{MINUS SIGN}", "-"))
    if not match or not match[2].isascii():
        return answer
    value = int(re.sub(r"\D", "", match[2]))
    return str(-value if match[1] == "-" else value)


def _is_text(*values: object) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


# --- the question and what stands around it ---------------------------------------------------------------------------

_BEFORE = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r".*\*user question:\*",  # ReTool's own prompt, with its way to write code
        r"Answer the following Math Problem and put the answer in the format of \\boxed\{answer\}",
        # DAPO, also as `Answer: \boxed{$Answer}`
        r"Solve the following math problem step by step\. The last line of your response should be of the form"
        r" Answer: .{1,60}?is the answer to the problem\.",
    )
]
_AFTER = [
    re.compile(pattern + r"\s*\Z")
    for pattern in (
        re.escape(INSTRUCTION),
        r'Remember to put your answer on its own line after "Answer:"\.',  # DAPO
        r"The answer format must be: \\boxed\{'The final answer goes here\.'\}",  # verl's recipe
        r"Remember to place the final answer in the last part using the format:\s*"  # ReTool
        r"(?:<answer>)?\s*\\boxed\{'The final answer goes here\.'\}\s*(?:</answer>)?",
        r"Please reason step by step, and put your final answer within \\boxed\{\}\.",  # Qwen2.5-Math
    )
]


def question_of(prompt: str) -> str:
    """The bare question of a published prompt: what asks for a form of the answer is removed from both ends."""
    before = None
    while before != prompt:
        before = prompt = prompt.strip()
        for pattern in _BEFORE:
            if match := pattern.match(prompt):
                prompt = prompt[match.end() :]
        for pattern in _AFTER:
            prompt = pattern.sub("", prompt)
    return prompt


def prompt_of(question: str) -> str:
    """A question as the policy is asked it: with our instruction, once."""
    return f"{question_of(question)}\n\n{INSTRUCTION}"


def control_characters(text: str) -> str:
    r"""The control characters in a text except line breaks and tabs: `\boxed` in a careless literal begins with one."""
    return "".join(sorted({c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t\r"}))


def clean(problems: Iterable[Problem]) -> tuple[list[Problem], Counter[str]]:
    """Each question once, in order, with our instruction; and how many rows were dropped, by reason.

    DAPO-Math-17k repeats each of its rows a hundred times; repeats go by id first, which is cheap, then by question.
    A question that has two different answers is dropped with all its rows, as nobody knows which one is right.
    """
    dropped: Counter[str] = Counter()
    by_id: dict[str, Problem] = {}
    for problem in problems:
        if problem.id not in by_id:
            by_id[problem.id] = problem
        else:
            dropped["repeats a row" if by_id[problem.id] == problem else "has the index of another row"] += 1
    by_question: dict[str, list[Problem]] = defaultdict(list)
    for problem in by_id.values():
        question = question_of(problem.question)
        if not question:
            dropped["has no question"] += 1
        elif control_characters(question):
            dropped["has control characters"] += 1
        else:
            by_question[" ".join(question.split())].append(problem)
    kept = []
    for group in by_question.values():
        if len({problem.ground_truth for problem in group}) > 1:
            dropped["its question has two answers"] += len(group)
            continue
        dropped["repeats a question"] += len(group) - 1
        last = {"role": group[0].messages[-1]["role"], "content": prompt_of(group[0].question)}
        kept.append(replace(group[0], messages=(*group[0].messages[:-1], last)))
    return kept, +dropped


# --- overlap of two sets ----------------------------------------------------------------------------------------------

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|\d+")  # a Chinese character is a word


@dataclass(frozen=True)
class Overlap:
    """Question `index` shares `share` of its n-grams with question `reference` of the other set; 1.0: same words."""

    index: int
    reference: int
    share: float


def overlaps(questions: Sequence[str], references: Sequence[str], size: int = 8, least: float = 0.5) -> list[Overlap]:
    """Questions that (nearly) stand among `references`, each with its nearest one.

    Compared are sequences of words, without case, punctuation and LaTeX's signs. The share is that of common n-grams
    of `size` words, relative to the shorter question; a question below `size` words must be equal in all of them.
    """
    theirs = [_ngrams(text, size) for text in references]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for reference, grams in enumerate(theirs):
        for gram in grams:
            holders[gram].append(reference)
    found = []
    for index, text in enumerate(questions):
        mine = _ngrams(text, size)
        common = Counter(reference for gram in mine for reference in holders.get(gram, ()))
        shares = [(count / min(len(mine), len(theirs[r])), -r) for r, count in common.items()]
        share, reference = max(shares, default=(0.0, 0))
        if share >= least:
            found.append(Overlap(index, -reference, share))
    return found


def _ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    words = _WORD.findall(unicodedata.normalize("NFKC", question_of(text)).casefold())
    return {tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, 1))} if words else set()
