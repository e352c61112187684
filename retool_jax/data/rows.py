"""Rows of published data sets: which column has the question, and which one has the true answer.

A row is read, or refused with the name of the column that cannot be read. docs/data.md lists the forms.
"""

import json
import math
import re
from collections.abc import Mapping

from retool_jax.answers import extract_boxed
from retool_jax.errors import UserError

QUESTIONS = ("problem", "question", "Problem", "input")  # columns with a bare question
# In order of priority: a label beside an answer may be a class, and a solution is longer than its answer.
ANSWERS = ("answer", "Answer", "final_answer", "reference_answer", "ground_truth", "label", "solution", "output")
IDS = ("ID", "unique_id", "uuid", "id")
# The columns that are ignored if a config names another column for this part.
_REPLACED = {
    "question": ("prompt", *QUESTIONS, "messages", "conversations"),
    "answer": ("reward_model", *ANSWERS),
    "id": ("extra_info",),
}
TEXTS = ("text", "input_text", "output_text")  # types of content parts that are text
# Other names of roles, from OpenAI (newest and oldest) and ShareGPT, to those of chat templates.
ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+|\d{1,1000})(?:\.0+)?(?:\^(?:\\circ|\{\\circ\})|°)?")


def unpacked(value: object) -> object:
    """The object or list in a JSON text, as some exports have it; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def is_text(*values: object) -> bool:
    """Whether all of these are texts that are not blank."""
    return all(isinstance(value, str) and value.strip() for value in values)


def messages_in(value: object) -> list[dict] | None:
    """A column's chat messages, with our names of roles and content parts joined to one text; None if it has none."""
    value = unpacked(value)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") in TEXTS for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        role = ROLES.get(role, role) if isinstance(role, str) else role
        messages.append(message | {"role": role, "content": content})
    return messages


def rename_columns(row: dict, where: str, columns: Mapping[str, str]) -> dict:
    """A row with the columns that a config names for `question`, `answer` and `id` under the names used here.

    Columns that they replace are removed. Without configured columns the row is unchanged.

    Raises:
        UserError: it has no such column.
    """
    chosen = {}
    for part, column in columns.items():
        if not column:
            continue
        if row.get(column) is None:
            kind = "an empty" if column in row else "no"
            raise UserError(f"{where} has {kind} {column!r}, which data.{part}={column} names; it has {_columns(row)}")
        chosen[part] = row[column]
    renamed = {column: value for column, value in row.items() if not any(column in _REPLACED[part] for part in chosen)}
    if "question" in chosen:
        renamed["problem" if is_text(chosen["question"]) else "prompt"] = chosen["question"]
    if "answer" in chosen:
        renamed["answer"] = chosen["answer"]
    return renamed | ({"extra_info": {"index": chosen["id"]}} if "id" in chosen else {})


def conversation_in(row: dict) -> list[dict] | None:
    """The turns of a row that includes the policy's turns; None if no column can have them.

    Columns: `messages` (OpenAI, verl, TRL), `conversations` (ShareGPT), or `prompt` with `completion` (TRL).
    """
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return messages_in(row[column])
    prompt, completion = (row.get(column) for column in ("prompt", "completion"))
    if completion is None:
        return None
    turns = []
    for value, role in ((prompt, "user"), (completion, "assistant")):
        found = messages_in(value)
        turns += [{"role": role, "content": value}] if found is None else found
    return turns


def asks_and_answers(row: dict) -> bool:
    """Whether a row has turns of a policy, so that it can be a demonstration."""
    return any(turn["role"] == "assistant" for turn in conversation_in(row) or ())


def question_in(row: dict, where: str) -> tuple[list[dict], bool]:
    """The turns up to the question, and whether the question is bare, without a request for a form of the answer.

    Raises:
        UserError: there is no column for a question, or it has no usable one.
    """
    for present in ([name for name in row if row[name] is not None], row):  # an empty column only if all are empty
        bare = next((name for name in QUESTIONS if name in present), None)
        column = next((name for name in ("prompt", bare, "messages", "conversations") if name in present), None)
        if column is not None:
            break
    if column is None:
        raise UserError(f"{where} has no column 'prompt'; it has {_columns(row)}")
    messages = None if column == bare else messages_in(row[column])
    if column in ("messages", "conversations"):
        policy = [number for number, turn in enumerate(messages or ()) if turn["role"] == "assistant"]
        messages = messages[: policy[0]] if policy else messages
    elif messages is None and is_text(row[column]):
        messages = [{"role": "user", "content": row[column]}]
    if not messages or not all(is_text(turn["role"], turn["content"]) for turn in messages):
        raise UserError(f"{where} has no usable {column}; expected a list of messages with role and content, not empty")
    if messages[-1]["role"] != "user":
        raise UserError(f"{where} has no usable {column}; it ends in a turn of {messages[-1]['role']}, not the user's")
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages], column == bare


def true_answer(row: dict, where: str) -> str:
    """The true answer: verl's `reward_model.ground_truth`, or the first of `ANSWERS` that is not empty.

    Raises:
        UserError: there is none, or it is not one answer.
    """
    reward = object_in(row, "reward_model", where)
    found = {"reward_model.ground_truth": reward.get("ground_truth")} if "reward_model" in row else {}
    found |= {column: row[column] for column in ANSWERS if column in row}
    if not found:
        raise UserError(f"{where} has no column 'reward_model'; it has {_columns(row)}")
    for column, value in found.items():
        if answer := _one_answer(value, column, where):
            return plain_integer(answer)
    raise UserError(f"{where} has an empty {next(iter(found))}; every problem needs an answer")


def object_in(row: dict, column: str, where: str) -> dict:
    """A column's object, which may be JSON in a text; empty if the column is missing or null."""
    value = unpacked(row.get(column))
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where}: reward_model and extra_info must be objects, as {{'ground_truth': '34'}}")
    return value or {}


def _columns(row: dict) -> str:
    """The names of a row's columns, for an error."""
    names = sorted(map(str, row))
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _one_answer(value: object, column: str, where: str) -> str:
    """The answer in a column's value; empty if there is none."""
    content = unpacked(value)
    if isinstance(content, list) and len(content) == 1 and (isinstance(content[0], str) or not isinstance(value, str)):
        value = content = content[0]
    if isinstance(content, dict | bool) or (isinstance(content, list) and not isinstance(value, str)):
        kind = {bool: "is true or false", dict: "is an object"}.get(type(content), "does not hold one answer")
        raise UserError(f"{where} cannot be scored: its {column} {kind}; give one answer as text ({str(value)[:60]})")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"{where} cannot be scored: its {column} is no finite number; give it as text")
    text = str(value).strip()
    if "####" in text:  # GSM8K: the solution, then the answer
        return text.rpartition("####")[2].strip()
    box, reason = extract_boxed(text)
    if box is not None:
        return box.strip()
    if tagged := _TAGGED.findall(text):
        return tagged[-1].strip()
    if column in ("solution", "output") and ("\n" in text or len(text) > 200 or reason != "no_box"):
        raise UserError(f"{where} cannot be scored: its {column} has no answer in a box; add a column answer")
    if reason != "no_box":
        raise UserError(f"{where} cannot be scored: the box in its {column} has no end; give the whole of it")
    return text


def plain_integer(answer: str) -> str:
    r"""An integer as plain digits: `336^\circ`, `1,234`, `$042$` and `7.0` are 336, 1234, 42 and 7; else unchanged."""
    match = _INTEGER.fullmatch(answer.replace("$", "").strip().replace("\N{MINUS SIGN}", "-"))
    if not match or not match[2].isascii():
        return answer
    value = int(re.sub(r"\D", "", match[2]))
    return str(-value if match[1] == "-" else value)


def tools_of(row: dict, where: str) -> tuple[str, ...] | None:
    """The tools that a row names in its column `tools`; None if it names none, so that it gets all.

    Schemas in this column, as in published conversations, are ignored: the run's tools have their own.

    Raises:
        UserError: the column is no list of names.
    """
    names = unpacked(row.get("tools"))
    if names is None or (isinstance(names, list) and names and all(isinstance(name, dict) for name in names)):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} has tools={str(names)[:80]!r}; it must be a list of names, as ['python']")
    return tuple(names)
