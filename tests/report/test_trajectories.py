"""Which trajectories a report shows, and in which pieces."""

import json
from pathlib import Path

import pytest

from retool_jax.report.trajectories import Source, choose_trajectories, readable_parts, share_out


def test_calls_and_outputs_are_set_apart():
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": "x = 12 * 34\nprint(x)"}})
    answered = "\n<|im_start|>user\n<tool_response>\n408\n</tool_response> it said\n</tool_response><|im_end|>\n"
    trajectory = {
        "segments": [
            {"role": "prompt", "text": "<|im_start|>user\n12*34?<|im_end|>\n<|im_start|>assistant\n"},
            {"role": "policy", "text": f"Let me see.\n<tool_call>\n{call}\n</tool_call><|im_end|>"},
            {"role": "tool", "text": answered + "<|im_start|>assistant\n"},
            {"role": "policy", "text": "<tool_call>\n{broken\n</tool_call>The answer is \\boxed{408}<|im_end|>"},
        ],
        "tool_calls": [{"status": "user_error", "wall_s": 0.25}, {"status": "invalid", "output": "no JSON"}],
    }
    parts = [(part.kind, part.text, part.note) for part in readable_parts(trajectory)]
    assert parts == [
        ("reasoning", "Let me see.", ""),
        ("code", "x = 12 * 34\nprint(x)", ""),
        ("output", "408\n</tool_response> it said", "user error · 250 ms"),
        ("code", "{broken", "not a well-formed call"),
        ("reasoning", "The answer is \\boxed{408}", ""),
        ("output", "no JSON", "invalid · the policy was not told"),
    ]


def test_calls_of_any_tool_and_grammar_are_shown_without_their_marks():
    trajectory = {
        "segments": [
            {"role": "policy", "text": "Code:\n<code>\n```python\nprint(6)\n```\n</code>"},
            {"role": "tool", "text": "\n<interpreter>\n6\n</interpreter>\n"},
            {"role": "policy", "text": '<tool_call>{"name": "sum", "arguments": {"of": ["é"]}}</tool_call><|im_end|>'},
            {"role": "tool", "text": "\n<|im_start|>user\n<tool_response>\n<7>\n</tool_response><|im_end|>\n"},
            {"role": "policy", "text": "<tool_call>\n</tool_call><|im_end|>"},
        ],
        "tool_calls": [{"status": "success", "wall_s": 0.25}, {"status": "success"}],
    }
    parts = readable_parts(trajectory)
    assert [(part.kind, part.text, part.note) for part in parts] == [
        ("reasoning", "Code:", ""),
        ("code", "print(6)", ""),
        ("output", "6", "success · 250 ms"),
        ("code", 'sum {"of": ["é"]}', ""),
        ("output", "<7>", "success"),
        ("code", "", "not a well-formed call"),
    ]
    assert [part.failed for part in parts] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("right", "wrong", "dropped", "shown"),
    [
        (50, 50, 0, (5, 5, 0)),
        (50, 2, 0, (8, 2, 0)),
        (1, 50, 0, (1, 9, 0)),
        (3, 0, 0, (3, 0, 0)),
        (50, 50, 50, (4, 5, 1)),
        (2, 3, 50, (2, 3, 5)),
    ],
)
def test_right_and_wrong_trajectories_are_both_chosen(right, wrong, dropped, shown):
    rewards = [1.0] * right + [-1.0] * wrong + [None] * dropped
    records = ({"correct": reward == 1.0, "reward": reward} for reward in rewards)
    chosen = [t["reward"] for t in choose_trajectories(records, 10)]
    assert tuple(map(chosen.count, (1.0, -1.0, None))) == shown


@pytest.mark.parametrize(
    ("sampled", "greedy", "limit", "places"),
    [
        ([5, 5], [5], 15, [5, 5, 5]),
        ([5, 5], [5], 12, [5, 5, 2]),
        ([5, 50], [50], 20, [5, 15, 0]),
        ([9, 9, 9], [], 10, [3, 3, 4]),
        ([9], [9], 0, [0, 0]),
    ],
)
def test_files_share_the_places_and_greedy_ones_come_second(sampled, greedy, limit, places):
    sources = [Source(0, Path("a"), count) for count in sampled] + [Source(0, Path("b"), n, True) for n in greedy]
    assert share_out(sources, limit) == places
