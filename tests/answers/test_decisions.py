"""The checker decides as the tables of `docs/answers.md` say."""

import re
from pathlib import Path

from retool_jax.answers import check_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "answers.md"
ROW = re.compile(r"^\| `(?P<answer>.*?)` \| `(?P<truth>.*?)` \| (?P<verdict>right|wrong) \|")


def test_every_row_of_the_tables_is_what_the_checker_says():
    said, rows, whole_turn = [], [], False
    for line in PAGE.read_text().splitlines():
        if line.startswith("|") and "verdict" in line:
            whole_turn = line.startswith("| last turn")
        if row := ROW.match(line):
            answer, truth, verdict = row.groups()
            rows.append((answer, truth, verdict))
            # A row with boxes is a whole turn.
            said.append((answer if whole_turn or "boxed" in answer else rf"So \boxed{{{answer}}}.", truth))
    assert len(rows) > 100
    found = ["right" if verdict.correct else "wrong" for verdict in check_all(said)]
    assert [row for row, verdict in zip(rows, found, strict=True) if row[2] != verdict] == []
