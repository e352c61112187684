"""One plan of the miniature, shared by many tests: the command on eight virtual devices."""

import io
import json
from contextlib import redirect_stdout

import pytest

from retool_jax.plan.command import main

WORDS = (
    *("config=grpo", "mesh=cpu-8", "mesh.tp=2", "model.vocab_size=400", "rl.rows_per_micro=8", "sft.rows_per_micro=8"),
    *("rl.row_length=128", "rl.old_logprobs=trainer", "engine.slots=8"),
)


@pytest.fixture(scope="session")
def words() -> tuple[str, ...]:
    return WORDS


@pytest.fixture(scope="session")
def planned(tmp_path_factory, words) -> tuple[dict, str]:
    """The command's JSON and its output."""
    path, printed = tmp_path_factory.mktemp("plan") / "plan.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("COLUMNS", "120")
        main([*words, f"json={path}"])
    return json.loads(path.read_text()), printed.getvalue()
