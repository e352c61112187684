"""The benchmark of graders: answers that were changed on purpose, and the graders that accept them."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "answers.py"
TRUTHS = ["42", r"\frac{3}{4}", r"-\frac{\pi}{6}", r"2\sqrt{3}", "(3,5)", r"\text{east}"]


def test_ours_takes_what_stays_right_and_nothing_that_was_made_wrong(tmp_path):
    (tmp_path / "truths.jsonl").write_text("".join(json.dumps({"answer": truth}) + "\n" for truth in TRUTHS))
    words = [f"math500={tmp_path / 'truths.jsonl'}", "mutations=24", f"out={tmp_path / 'differing.jsonl'}"]
    done = subprocess.run([sys.executable, BENCHMARK, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    counts = numbers["taken_for_right"]
    assert numbers["benchmark"] == "answers" and counts["same"]["answers"] == len(TRUTHS)
    assert sum(kind["answers"] for kind in counts.values()) == len(TRUTHS) + 24
    for kind, right in (("same", 1), ("unit", 1), ("form", 1), ("sign", 0), ("digit", 0)):
        assert counts[kind].get("ours", 0) == counts[kind]["answers"] * right and counts[kind]["answers"] > 0
    differing = [json.loads(line) for line in (tmp_path / "differing.jsonl").read_text().splitlines()]
    assert len(differing) == numbers["differing"] and all(line["ours"] != line["math_verify"] for line in differing)
