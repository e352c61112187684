"""The worked examples of the documentation run as they stand there, and assert what they say."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^(```+)python\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["tools", "grammars", "rewards"])
def test_the_code_of_a_page_runs_from_its_top_to_its_end(page):
    path = DOCS / f"{page}.md"
    text = path.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks and any("assert" in block[2] for block in blocks)
    names: dict[str, object] = {"__name__": page}
    for block in blocks:
        above = text.count("\n", 0, block.start(2))
        exec(compile("\n" * above + block[2], str(path), "exec"), names)  # so that an error names the page's line
