"""The report of a run that these tests make up: complete, self-contained, and deaf to hostile tool output."""

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from retool_jax import report
from retool_jax.errors import UserError

ROOT = Path(report.__file__).parents[2]
HOSTILE = "<script>alert('owned')</script> &amp; <img src=x onerror=alert(1)>"


def accuracy_at(step: int, tools: str) -> float:
    return 0.88 - 0.42 * math.exp(-step / 12) if tools == "python" else 0.18 + 0.02 * math.sin(step)


def make_trajectory(rng: random.Random, index: int, step: int, tools: str, output: str | None) -> dict:
    a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
    truth, correct = a * b, rng.random() < accuracy_at(step, tools)
    answer = truth if correct else truth + 10 * rng.randrange(1, 90)
    called = tools == "python" and rng.random() < 0.72 + 0.28 * (step > 0)
    segments, calls = [], []

    def add(role: str, text: str) -> None:
        start = segments[-1]["stop"] if segments else 0
        segments.append({"role": role, "start": start, "stop": start + max(1, len(text) // 4), "text": text})

    add("prompt", f"<|im_start|>user\nWhat is the product of {a} and {b}?<|im_end|>\n<|im_start|>assistant\n")
    if called:
        code = f"x = {a}\ny = {b}\nprint(x * y)" if correct else f"print({a} * {b} + {answer - truth})"
        status = "success" if output is None or index else "user_error"
        text = str(answer) if output is None else output
        call = json.dumps({"name": "code_interpreter", "arguments": {"code": code}})
        add("policy", f"I multiply {a} and {b} with code.\n<tool_call>\n{call}\n</tool_call><|im_end|>")
        inside = f"\n<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        add("tool", inside)
        calls.append({"turn": 0, "code": code, "status": status, "output": text, "wall_s": 0.004, "queue_s": 0.001})
    add("policy", f"The answer is \\boxed{{{answer}}}.<|im_end|>")
    sampled = [int(s["role"] == "policy") for s in segments for _ in range(s["stop"] - s["start"])]
    prompt_tokens = segments[0]["stop"]
    return {
        "id": f"dev-{index}/0",
        "problem": f"What is the product of {a} and {b}?",
        "ground_truth": str(truth),
        "answer": str(answer),
        "correct": correct,
        "reward": 1.0 if correct else -1.0,
        "end": "answered",
        "split": "dev",
        "step": step,
        "ids": [1] * len(sampled),
        "sampled": sampled,
        "logprobs": [-rng.expovariate(6) if on else 0.0 for on in sampled],
        "segments": segments,
        "tool_calls": calls,
        "turns": 1 + called,
        "prompt_tokens": prompt_tokens,
        "response_tokens": len(sampled) - prompt_tokens,
        "timings": {"started_s": 0.0, "finished_s": 0.4},
    }


def make_run(folder: Path, tools: str, seed: int, steps: int = 20, count: int = 20, output: str | None = None) -> Path:
    """A run folder as the trainer leaves it."""
    rng = random.Random(f"{tools}{seed}")
    (folder / "trajectories").mkdir(parents=True)
    with_tool, records = tools == "python", []
    rl = {"steps": steps, "max_turns": 1 + with_tool}
    config = {"seed": seed, "tools": tools, "out": f"runs/{folder.name}", "rl": rl}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    for step in range(0, 400, 10):
        records.append({"kind": "sft", "step": step, "loss": 0.2 + 5 * math.exp(-step / 60), "learning_rate": 2e-3})
    for step in range(steps + 1):
        accuracy = accuracy_at(step, tools) + rng.gauss(0, 0.025)
        rate = 1 - 0.28 * math.exp(-step / 3) if with_tool else 0.0
        if step:
            record = {
                "kind": "rl",
                "step": step,
                "reward_mean": 2 * accuracy - 1,
                "accuracy": accuracy,
                "tool_rate": rate,
            }
            record |= {"tool_success": 0.98 if with_tool else None, "calls_per_sample": rate, "grad_norm": 0.3}
            record |= {
                "entropy": 0.02 + 0.25 * math.exp(-step / 15) + rng.random() / 50,
                "clip_fraction": rng.random() / 40,
            }
            record |= {"logprob_diff_mean": 1e-6 * (1 + rng.random()), "response_tokens": 34 + 30 * rate + rng.random()}
            record |= {"end/answered": 185, "end/no_answer": 7}
            records.append(record | {"perf/tokens_per_s": 21000.0})
        if step % 5 == 0:
            name = f"trajectories/dev-{step:06d}.jsonl"
            made = [make_trajectory(rng, index, step, tools, output) for index in range(count)]
            (folder / name).write_text("".join(json.dumps(t) + "\n" for t in made))
            record = {"kind": "eval", "step": step, "split": "dev", "accuracy": accuracy, "accuracy_stderr": 0.03}
            record |= {"tool_rate": rate, "tool_success": 0.98 if with_tool else None, "response_tokens": 60.0}
            record |= {"greedy_accuracy": min(1, accuracy + 0.1)} if step % 10 == 0 else {}
            records.append(record | {"end/answered": count - 1, "end/no_answer": 1, "trajectories": name})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = [
        {"accuracy": accuracy_at(step, tools), "accuracy_stderr": 0.03, "greedy_accuracy": 0.95, "tool_rate": 0.7}
        | {"tool_success": 0.98, "response_tokens": 61.2}
        for step in (0, steps)
    ]
    seconds = {"cold start": 95.0, "rollout": 120.0, "update": 80.0, "evaluation": 30.0, "compile": 22.0, "other": 6.0}
    summary = {"before": columns[0], "after": columns[1], "split": "test", "problems": 256, "steps": steps}
    summary |= {"tokens_per_s": {"rollout": 31000.0, "update": 21500.0}}
    summary |= {"seconds": seconds | {"total": sum(seconds.values())}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Elements(HTMLParser):
    """The tags and attributes that a browser would see, and whether every tag closes."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def page_of(*words: str) -> str:
    report.main(list(words))
    return Path(words[0].removeprefix("run=").split(",")[0], "report.html").read_text()


def test_one_run_is_one_self_contained_file(tmp_path, capsys):
    page = page_of(f"run={make_run(tmp_path / 'a', 'python', 0)}")
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", page)
    elements = Elements(page)
    assert not elements.open
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in elements.found}
    assert all(
        attributes.get(name, "#").startswith("#") for _, attributes in elements.found for name in ("href", "src")
    )
    for words in (
        "46.0 % <span>→</span>",
        "256 test problems",
        "time by part",
        "Tool-call rate",
        "Cold-start loss",
        "answered",
    ):
        assert words in page
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(page) < 1_000_000 and "wrote" in capsys.readouterr().out


def test_hostile_tool_output_stays_text(tmp_path):
    page = page_of(f"run={make_run(tmp_path / 'a', 'python', 0, output=HOSTILE)}")
    assert "&lt;script&gt;alert" in page
    tags = Elements(page).found
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not any(tag == "img" or any(name.startswith("onerror") for name in attributes) for tag, attributes in tags)


def test_several_runs_share_one_picture(tmp_path):
    folders = [make_run(tmp_path / name, tools, 0) for name, tools in (("a", "python"), ("b", "none"))]
    for words in ([f"run={folders[0]}", f"run={folders[1]}"], [f"run={folders[0]},{folders[1]}"]):
        page = page_of(*words)
        picture = page[page.index("<svg") : page.index("</svg>")]
        assert "with tool (tools=python)" in picture and "text only (tools=none)" in picture
        assert "var(--series0)" in picture and "var(--series1)" in picture
        assert "test 46 → 80 %" in picture


def test_labels_are_what_differs():
    def labels(*configs):
        return report.config_labels(configs, [f"run{index}" for index in range(len(configs))])

    base = {"tools": "python", "seed": 0, "out": "runs/a", "rl": {"clip": 0.2, "turns": 2}}
    assert labels(base) == ["run0"]
    assert labels(base, base) == ["run0", "run1"]
    assert labels(base, base | {"seed": 1, "out": "runs/b"}) == ["seed 0", "seed 1"]
    text_only = base | {"tools": "none", "rl": {"clip": 0.2, "turns": 1}}
    assert labels(base, text_only) == ["with tool (tools=python)", "text only (tools=none)"]
    assert labels(base, base | {"rl": {"clip": 0.3, "turns": 2}})[1] == "rl.clip=0.3"


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
        "tool_calls": [{"status": "user_error", "wall_s": 0.25}],
    }
    parts = [(part.kind, part.text, part.note) for part in report.readable_parts(trajectory)]
    assert parts == [
        ("reasoning", "Let me see.", ""),
        ("code", "x = 12 * 34\nprint(x)", ""),
        ("output", "408\n</tool_response> it said", "user error · 250 ms"),
        ("code", "{broken", "not a well-formed call"),
        ("reasoning", "The answer is \\boxed{408}", ""),
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "shown"), [(50, 50, (5, 5)), (50, 2, (8, 2)), (1, 50, (1, 9)), (3, 0, (3, 0))]
)
def test_right_and_wrong_trajectories_are_both_chosen(tmp_path, right, wrong, shown):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"correct": c}) + "\n" for c in [True] * right + [False] * wrong))
    chosen = [t["correct"] for t in report.choose_trajectories(path, 10)]
    assert (chosen.count(True), chosen.count(False)) == shown


def test_long_texts_are_cut_in_the_middle(tmp_path):
    page = page_of(f"run={make_run(tmp_path / 'a', 'python', 0, output='x' * 50_000)}")
    assert "characters left out" in page and len(page) < 3_000_000


def test_a_run_in_its_first_minutes_and_a_cold_start_have_a_report(tmp_path):
    folder = make_run(tmp_path / "a", "python", 0)
    (folder / "summary.json").unlink()
    assert "no summary yet" in page_of(f"run={folder}")
    (folder / "config.yaml").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"sft"' in line) + '{"kind": "sf')
    page = page_of(f"run={folder}")
    assert "Cold-start loss" in page and "Nothing was evaluated yet" in page


def test_bad_input_is_one_line_with_the_way_out(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("")
    for words, message in (
        ([], "usage"),
        (["runs=x"], "did you mean run="),
        ([f"run={tmp_path}/empty"], r"metrics.jsonl does not exist; .*retool_jax.train"),
        ([f"run={tmp_path}/torn"], "metrics.jsonl is empty"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(words)
    run = make_run(tmp_path / "a", "python", 0)
    with pytest.raises(UserError, match="cannot write"):
        report.main([f"run={run}", "out=/proc/nowhere/report.html"])


def test_the_command_exits_with_2_and_imports_no_jax(tmp_path):
    command = [sys.executable, "-m", "retool_jax.report", f"run={tmp_path}/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"error: run folder {tmp_path}/nowhere does not exist; `python -m retool_jax.train config=grpo` makes one\n"
    )
    code = "import sys, retool_jax.report; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
