"""A run's folder with trajectories, as an evaluation writes them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.evaluation.measure import write_trajectories
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory

HOSTILE = "a\x00b</code><|im_end|>\u2028</script>"


def add(trajectory: Trajectory, tokenizer, role: str, text: str) -> None:
    ids = tokenizer.encode(text)
    trajectory.add(role, ids, [-0.25 - index / 8 for index in range(len(ids))] if role == "policy" else None)


def make_trajectory(tokenizer, index: int, output: str = "408") -> Trajectory:
    """The interpreter is called, then another tool together with a call that cannot be read, then it answers."""
    problem = Problem(f"dev-{index:06d}", ({"role": "user", "content": "12*34?"},), "408")
    made = Trajectory(f"{problem.id}/{1000 + index}", problem, started_s=1.0, finished_s=1.5)
    add(made, tokenizer, "prompt", "<|im_start|>user\n12*34?<|im_end|>\n<|im_start|>assistant\n")
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": "print(12 * 34)"}})
    add(made, tokenizer, "policy", f"<think>by code</think>\nI see.\n<tool_call>\n{call}\n</tool_call><|im_end|>")
    answer = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    add(made, tokenizer, "tool", answer.format(f"<tool_response>\n{output}\n</tool_response>"))
    made.tool_uses.append(ToolUse(0, "print(12 * 34)", "success", output, 0.25, 0.125, "code_interpreter"))
    call = json.dumps({"name": "calculator", "arguments": {"expression": "12*34"}})
    add(made, tokenizer, "policy", f"<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{{no\n</tool_call><|im_end|>")
    made.tool_uses.append(ToolUse(1, '{"expression": "12*34"}', "success", "408.0", tool="calculator"))
    made.tool_uses.append(ToolUse(1, "", "invalid_call", "no JSON"))
    outputs = "\n".join(f"<tool_response>\n{told}\n</tool_response>" for told in ("408.0", "no JSON"))
    add(made, tokenizer, "tool", answer.format(outputs))
    add(made, tokenizer, "policy", "It is \\boxed{408}.<|im_end|>")
    made.end, made.reward, made.verdict = End.ANSWERED, 1.0, Verdict(True, "408", "integer")
    made.reward_terms = {"answer": 1.0}
    return made


@pytest.fixture(scope="session", name="make_trajectory")
def make_trajectory_fixture(tokenizer) -> Callable[..., Trajectory]:
    """`make_trajectory(index)`, or with another output of its first call."""
    return lambda *words, **values: make_trajectory(tokenizer, *words, **values)


@pytest.fixture(scope="session")
def run(tokenizer, tmp_path_factory) -> Path:
    """Two evaluations of dev on two problems, sampled and greedy; the machinery lost the last trajectory."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for step in (0, 5):
        for end in ("", "-greedy"):
            made = [make_trajectory(tokenizer, index) for index in (0, 1)]
            made[1].tool_uses[0].metrics["sizes"] = 2.0
            if step:
                made[1].end, made[1].reward, made[1].verdict = End.SANDBOX_LOST, None, None
                made[1].fault = "worker lost"
            path = folder / "trajectories" / f"dev-{step:06d}{end}.jsonl"
            write_trajectories(path, tokenizer, made, "dev", step)
    return folder


@pytest.fixture(scope="session")
def hostile(tokenizer, tmp_path_factory) -> Path:
    """An evaluation's folder with texts of policy and data set that are difficult for formats."""
    folder = tmp_path_factory.mktemp("runs") / "hostile"
    made = make_trajectory(tokenizer, 0, output=HOSTILE)
    record = made.record(tokenizer, split="test", sample=3, set={"name": "x"})
    record |= {"id": "../../x\ud800/\x00", "problem": "lone \udfff surrogate", "answer": "\ud800", "ground_truth": 6}
    record["logprobs"][-1] = float("-inf")
    record["tool_calls"][0]["metrics"] = {"peak": float("nan")}
    folder.mkdir()
    (folder / "samples.jsonl").write_text(json.dumps(record) + "\n" + '{"id": "torn')
    return folder
