"""A record with values of wrong types is reported wherever it is read: file, line, field, and expected type."""

import json
import re

import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.evaluation.config import SAMPLES
from retool_jax.evaluation.numbers import summarise
from retool_jax.evaluation.store import Store
from retool_jax.export.command import export
from retool_jax.export.records import Selection
from retool_jax.report.page import write_report
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory

PROBLEM = Problem("p0", ({"role": "user", "content": "2 + 4?"},), "6")
# Values that a record may have after editing by hand, or on a bad disk.
WRONG = [None, True, -1, 1 << 70, 0.5, "x", [], [[1]], ["x"], {"x": 1}]


@pytest.fixture
def record(tokenizer) -> dict:
    made = Trajectory("p0/0", PROBLEM, end=End.ANSWERED, reward=1.0, reward_terms={"answer": 1.0})
    for role, text in (("prompt", "2 + 4?"), ("policy", "I compute."), ("tool", "6"), ("policy", "\\boxed{6}")):
        ids = tokenizer.encode(text)
        made.add(role, ids, [-0.5] * len(ids) if role == "policy" else None)
    made.tool_uses.append(ToolUse(0, "print(6)", "success", "6", 0.5, 0.25, "code_interpreter", metrics={"cpu_s": 0.1}))
    made.verdict, made.exact = Verdict(True, "6", "integer"), True
    return made.record(tokenizer, split="test", step=3, group=0, sample=0)


def damaged(record: dict):
    """The record with one value of another type, for each place, and the name of that place."""
    for key in record:
        for value in WRONG:
            yield key, record | {key: value}
    for key in ("segments", "tool_calls"):
        for name in record[key][0]:
            for value in WRONG:
                yield f"{key}[0].{name}", record | {key: [record[key][0] | {name: value}, *record[key][1:]]}
    for key in ("ids", "sampled", "logprobs"):
        for value in WRONG:
            yield f"{key}[1]", record | {key: [record[key][0], value, *record[key][2:]]}


def test_every_reader_names_what_it_cannot_read_and_writes_nothing(record, tmp_path, tokenizer):
    folder, out = tmp_path / "evaluation", tmp_path / "out"
    folder.mkdir()
    path = folder / SAMPLES
    (folder / "config.yaml").write_text("tokenizer: miniature\n")
    (folder / "result.json").write_text('{"numbers": {}}')

    def stored() -> None:
        with Store(folder) as store:
            found = [trajectory for _, trajectory in store.trajectories([PROBLEM])] if max(store.done) == (0, 0) else []
            summarise(found, 0.99) if any(not t.dropped for t in found) else None

    readers = {
        "atif": lambda: export(folder, out, "atif", Selection()),
        "store": stored,
    }
    refused = dict.fromkeys(readers, 0)
    for place, changed in damaged(record):
        text = json.dumps(changed) + "\n"
        path.write_text(text)
        for name, read in readers.items():
            try:
                read()
            except UserError as error:
                refused[name] += 1
                assert not out.exists() and path.read_text() == text, (name, place)
                assert re.search(rf"{SAMPLES} line 1 is", str(error)), (name, place, str(error))
                assert place.split("[")[0].split(".")[0] in str(error) or "an id is" in str(error), (name, str(error))
            except Exception as error:
                raise AssertionError((name, place, changed.get(place))) from error
            else:
                if name == "atif":  # values that one format accepts, the table accepts too
                    export(folder, out, "parquet", Selection())
                    out.unlink()
    assert min(refused.values()) > 150, refused


def test_a_report_names_them_too(record, tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "config.yaml").write_text("tokenizer: miniature\n")
    (folder / "result.json").write_text('{"numbers": {}}')
    page = tmp_path / "page.html"
    for changed, message in (
        ({"ids": 5}, "ids is 5 and must be a list"),
        ({"logprobs": [None] * len(record["ids"])}, r"logprobs\[0\] is null and must be a number"),
        ({"logprobs": record["logprobs"][:-1]}, r"has \d+ ids, \d+ sampled, \d+ logprobs, and must have as many of"),
        ({"sampled": "111"}, 'sampled is "111" and must be a list'),
        ({"tool_calls": [{"turn": 0}]}, r"tool_calls\[0\] has no code"),
        ({"segments": [[0, 1]]}, r"segments\[0\] is a list and must be an object"),
        ({"segments": record["segments"][1:]}, "segments must begin with one of the role prompt"),
        ({"segments": [{**record["segments"][0], "stop": 10**6}]}, r"segments\[0\] is of the ids from 0 up to 1000000"),
        ({"timings": {"started_s": None}}, "timings.started_s is null and must be a number"),
        ({"reward": "1"}, 'reward is "1" and must be null or a number'),
        ({"response_tokens": None}, "response_tokens is null and must be a whole number"),
    ):
        (folder / SAMPLES).write_text(json.dumps(record | changed) + "\n")
        with pytest.raises(UserError, match=rf"{SAMPLES} line 1 is no trajectory \(.*{message}.*\); mend or remove"):
            write_report([folder], page)
        assert not page.exists()
    (folder / SAMPLES).write_text(json.dumps(record) + "\n")
    write_report([folder], page)
    assert page.exists()
