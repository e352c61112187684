"""The column `tools` of a row: which tools a problem may call."""

import pytest

from retool_jax.data.problems import clean, to_problem, to_row
from retool_jax.errors import UserError

ROW = {"prompt": [{"role": "user", "content": "What is 3 + 4?"}], "reward_model": {"ground_truth": "7"}}


@pytest.mark.parametrize(
    ("tools", "names"),
    [
        (None, None),
        (["calculator"], ("calculator",)),
        ([], ()),
        ([{"type": "function", "function": {"name": "code_interpreter"}}], None),  # schemas name nothing
    ],
)
def test_a_problem_keeps_the_tools_that_its_row_names(tools, names):
    problem = to_problem(ROW | {"tools": tools}, "row 1")
    assert problem.tools == names
    assert to_problem({"problem": "What is 3 + 4?", "answer": "7", "tools": tools}, "row 1").tools == names
    again = to_row(problem, "mine")
    assert ("tools" in again) == (names is not None) and to_problem(again, "row 1") == problem
    assert clean([(1, problem)])[0][0].tools == names


@pytest.mark.parametrize("tools", ["python", [1], {"name": "python"}, ["python", None]])
def test_a_column_that_is_no_list_of_names_is_told(tools):
    with pytest.raises(UserError, match=r"row 1 has tools=.*; it must be a list of names, as \['python'\]"):
        to_problem(ROW | {"tools": tools}, "row 1")
