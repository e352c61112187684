r"""Which box of a text is the answer."""

import pytest

from retool_jax.answers import extract_boxed


@pytest.mark.parametrize(
    ("text", "content", "reason"),
    [
        ("no box, Answer: 42", None, "no_box"),
        ("", None, "no_box"),
        (r"\fbox{42}", None, "no_box"),
        (r"\boxed{1} and then \boxed{2}", "2", "boxed"),
        (r"\boxed{1} and \boxed{2}", "1, 2", "boxed"),
        (r"$\boxed{1}$, $\boxed{2}$ or $x_3 = \boxed{\frac{1}{2}}$.", r"1, 2, \frac{1}{2}", "boxed"),
        (r"\boxed{1}. So \boxed{2}, \boxed{3}", "2, 3", "boxed"),
        (r"\boxed{1} orders=\boxed{2}", "2", "boxed"),
        # No run of spaces or signs may cost more than its length.
        ("\\boxed{1}" + " " * 5000 + "," + "$ " * 5000 + "\\boxed{2}", "1, 2", "boxed"),
        ("\\boxed{1}" + " " * 5000 + "," + " " * 5000 + "x\\boxed{2}", "2", "boxed"),
        ("\\boxed{1}" + "$" * 5000 + "\\text" + " " * 5000 + "{\\boxed{2}", "2", "boxed"),
        ("\\boxed{1}\n\\boxed{1}", "1", "boxed"),
        (r"\boxed{1, \boxed{2} and \boxed{3}", "2, 3", "boxed"),
        (r"\boxed{42}<|im_end|>", "42", "boxed"),
        (r"\boxed {42}", "42", "boxed"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\boxed{42}}", "42", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"\boxed{x \in \{1 \right.}", r"x \in \{1 \right.", "boxed"),
        (r"\boxed{42", None, "unterminated_box"),
        (r"\boxed{1} and \boxed{\frac{45}{1}", None, "unterminated_box"),
        (r"\boxed{1} and \boxed", None, "unterminated_box"),
        (r"\boxed{42} " + "and on " * 1000, "42", "boxed"),
        (r'<tool_call>print("\boxed{42}")</tool_call>', None, "no_box"),
        (r'\boxed{1} <tool_call>print("\boxed{42}")</tool_call>', "1", "boxed"),
        (r'\boxed{1} <tool_call>print("\boxed{42}")', "1", "boxed"),
        ("<code>\n```python\n# \\boxed{42}\n```\n</code> so \\boxed{1}", "1", "boxed"),
        (r"<code># \boxed{42}</code>", None, "no_box"),
        (r"<think>maybe \boxed{42}</think> no idea", None, "no_box"),
        (r"maybe \boxed{42}</think> it is \boxed{1}", "1", "boxed"),
        (r"<think>let me see \boxed{42}", None, "no_box"),
        (r"<think>a <tool_call> is a way</think> \boxed{42}", "42", "boxed"),
    ],
)
def test_which_box_counts(text, content, reason):
    assert extract_boxed(text) == (content, reason)
