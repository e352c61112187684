"""The evaluate command: what it refuses before any work, what it writes, and that a kill changes none of it."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from retool_jax import evaluate, train
from retool_jax.data.arithmetic import problem_row
from retool_jax.errors import UserError
from retool_jax.evaluation.config import SAMPLES
from retool_jax.models.huggingface import save_params
from retool_jax.run.load import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights(model, params, tmp_path_factory) -> Path:
    """A Hugging Face folder of the tiny model, with random weights and no tokenizer."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_params(model, params, folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    """Six problems in columns with other names."""
    path = tmp_path_factory.mktemp("data") / "own.jsonl"
    rows = [problem_row("test", index) for index in range(6)]
    lines = [
        {"frage": r["prompt"][0]["content"], "lösung": r["reward_model"]["ground_truth"], "nr": i}
        for i, r in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def words(weights, problems) -> list[str]:
    """Words of an evaluation that ends in seconds: six problems, three samples each, text only."""
    return [
        *("config=eval", "tools=none", f"init_from={weights}", "tokenizer=miniature", "rollout.max_prompt_tokens=60"),
        *(f"data.source={problems}", "data.question=frage", "data.answer=lösung", "data.id=nr"),
        *("evaluation.problems=0", "evaluation.samples=3", "engine.slots=4"),
    ]


def error_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        evaluate.main(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- before any work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["evaluation.samples=0"], "evaluation.samples=0 must be between 1 and 4096"),
        (["evaluation.samples=two"], "evaluation.samples=two is of type str; it must be int"),
        (["evaluation.preset=verl"], "evaluation.preset=verl is not one of: recipe, paper, open, greedy"),
        (["evaluation.pass_k=[1,4]"], "evaluation.pass_k=4 is above evaluation.samples=3, the samples of a problem;"),
        (["evaluation.temperature=0"], "evaluation.samples=3 at evaluation.temperature=0 would all be the same; set"),
        (["evaluation.top_p=0"], "evaluation.top_p=0 must be above 0 and at most 1"),
        (["evaluation.purposes=rule"], "evaluation.purposes=rule is not rules or my_package.my_module:my_classifier"),
        (["evaluation.smaples=3"], "unknown key evaluation.smaples; did you mean evaluation.samples?"),
        (["comapre=x"], "unknown key comapre; did you mean compare?"),
        (["rl.steps=3"], "unknown key rl.steps; it belongs to configs of task grpo"),
        (["init_from="], "there is nothing to evaluate; set init_from to a run or Hugging Face folder"),
        (["init_from=/nope"], "no checkpoint at /nope: expected checkpoints of a run"),
        (["model.vocab_size=500", "model.hidden_size=32"], "vocab_size"),
        (
            ["data.question=question"],
            "row 1 has no 'question', which data.question=question names; it has frage, lösung",
        ),
        (["data.answer="], "row 1 has no column 'reward_model'; it has"),
        (["rollout.max_prompt_tokens=30"], "problem 0 has a prompt of 57 tokens; the limit is"),
        (["rollout.max_prompt_tokens=200"], "rollout.max_prompt_tokens=200 leaves no room in engine.max_length=128"),
        (["data.source=arithmetic"], "data.question=frage is a column, and data.source=arithmetic, which is made here"),
        (
            ["data.source=arithmetic", "data.question=", "data.answer=", "data.id="],
            "data.source=arithmetic has no end; set evaluation.problems",
        ),
        (["data.source=/nope.jsonl"], "no data file /nope.jsonl; give a JSONL or parquet file"),
        (["compare=/nope.json"], "cannot read /nope.json ("),
        (["config=grpo"], "this config trains; run python -m retool_jax.train with it"),
        (["mesh.fsdp=3"], "does not divide the 8 device(s) here"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_anything_is_written(words, tmp_path, more, message):
    if more == ["config=grpo"]:
        words = []
    assert message in error_of(*words, f"run={tmp_path / 'run'}", *more)
    assert list(tmp_path.iterdir()) == []


def test_another_architecture_another_evaluation_and_a_place_that_cannot_be_written_are_refused(words, tmp_path):
    shutil.copytree(Path(words[2].partition("=")[2]), tmp_path / "gpt")
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    assert "gpt_neox" in error_of(*words, f"init_from={tmp_path / 'gpt'}", f"run={tmp_path / 'run'}")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        assert "not empty and holds no run" in (told := error_of(*words, f"run={tmp_path / place}")) or (
            f"{tmp_path / 'file'} is no folder; choose another run=FOLDER" in told
        )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    assert "not empty and holds no run" in error_of(*words, f"run={tmp_path / 'theirs'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gpt", "theirs"]


def test_a_config_of_one_command_is_refused_by_the_other():
    with pytest.raises(UserError, match=r"of task evaluate and trains nothing; run python -m retool_jax\.evaluate"):
        train.main(["config=eval"])


def test_help_and_a_misspelt_key_need_no_jax():
    code = (
        "import sys\nfrom retool_jax import evaluate\n"
        "for words in ([], ['--help'], ['config=eval_aime25', '-h']): evaluate.main(words)\n"
        "try: evaluate.main(['config=eval', 'evaluation.prest=open'])\n"
        "except evaluate.UserError as error: print(error)\n"
        "print(*{'jax', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *text, error, loaded = done.stdout.splitlines()
    assert text[0] == "usage: python -m retool_jax.evaluate config=NAME [key=value ...]"
    assert any(line.startswith("  evaluation.samples=30 ") for line in text), "the preset's, resolved"
    assert (error, loaded) == ("unknown key evaluation.prest; did you mean evaluation.preset?", "")


# --- presets and folders ----------------------------------------------------------------------------------------------


def test_a_presets_numbers_are_those_that_are_not_set():
    def how(*words: str) -> tuple:
        found = load(["config=eval", *words]).evaluation
        return found.samples, found.temperature, found.top_p, found.ks

    assert how() == (8, 1.0, 1.0, (1, 2, 4, 8))
    assert how("evaluation.preset=recipe") == (30, 1.0, 0.6, (1, 2, 4, 8, 16, 30))
    assert how("evaluation.preset=paper") == (32, 1.0, 0.7, (1, 2, 4, 8, 16, 32))
    assert how("evaluation.preset=open") == (16, 1.0, 1.0, (1, 2, 4, 8, 16))
    assert how("evaluation.preset=greedy") == (1, 0.0, 1.0, (1,))
    own = ("evaluation.samples=4", "evaluation.top_p=1", "evaluation.temperature=2", "evaluation.pass_k=[4,1]")
    assert how("evaluation.preset=recipe", *own) == (4, 2.0, 1.0, (1, 4))
    run = load(["config=eval", "evaluation.preset=recipe", "evaluation.top_k=5"])
    assert run.run == "runs/eval-evaluation.preset=recipe-evaluation.top_k=5" and run.evaluation.top_k == 5
    assert replace(run, seed=3).evaluation == run.evaluation
    assert load(["config=eval", "compare=x.json"]).run == "runs/eval", "what it is compared with makes no other of it"


# --- what it does -----------------------------------------------------------------------------------------------------

# Evaluates in one folder after another, on one device, so that the import of jax is paid for once.
EVALUATOR = """
import json, sys
from retool_jax import evaluate
from retool_jax.errors import UserError
for line in sys.stdin:
    try:
        evaluate.main(json.loads(line))
    except UserError as error:
        print("error:", error)
    print("ended", flush=True)
"""


@pytest.fixture(scope="module")
def measure(one_device, words) -> Iterator[Callable[..., str]]:
    """Run the command to its end and return its output: `measure(folder, "seed=1")`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "-c", EVALUATOR], env=one_device, cwd=ROOT, **pipes) as process:

        def run(folder: Path, *more: str) -> str:
            process.stdin.write(json.dumps([*words, f"run={folder}", *more]) + "\n")
            process.stdin.flush()
            said = []
            for line in process.stdout:
                if line == "ended\n":
                    return "".join(said)
                said.append(line)
            raise AssertionError("".join(said))

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(measure, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of an evaluation that was not interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, measure(folder)


def test_a_result_has_the_verdicts_their_numbers_and_where_they_come_from(whole, words, problems):
    folder, said = whole
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", SAMPLES, "result.json", "versions.txt"}
    result = json.loads((folder / "result.json").read_text())
    assert result["set"] == str(problems) and (result["samples"], result["dropped"]) == (3, 0)
    assert [p["id"] for p in result["problems"]] == list("012345")
    records = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    assert len(records) == 18 and all(
        r["split"] == str(problems) and len(r["logprobs"]) == len(r["ids"]) for r in records
    )
    by_key = {(r["group"], r["sample"]): r for r in records}
    for i, problem in enumerate(result["problems"]):
        assert problem["correct"] == [by_key[i, j]["correct"] for j in range(3)]
        assert problem["answers"] == [by_key[i, j]["answer"] for j in range(3)]
        assert len({tuple(by_key[i, j]["ids"]) for j in range(3)}) == 3, "each sample has draws of its own"
    assert {"accuracy", "pass@1", "pass@2", "pass@3", "maj@3", "recipe"} <= result["numbers"].keys()
    assert result["trajectories"]["response_tokens"] > 0 and result["strict_differs"] == {"count": 0, "share": 0.0}
    assert not [name for name in result["trajectories"] if name.startswith("perf/")]
    assert any(line.startswith("jax==") for line in result["versions"])
    assert result["config"]["evaluation.samples"] == 3 and "run" not in result["config"]
    assert len(result["weights"]["sha256"]) == 64 and result["weights"]["step"] is None
    assert "evaluation 18/18  accuracy" in said and "3 samples of each problem" in " ".join(said.split())


def test_an_evaluation_that_was_cut_off_anywhere_ends_in_the_same_result(whole, measure, tmp_path):
    folder, text = whole[0], (whole[0] / SAMPLES).read_bytes()
    draw = random.Random(1)
    for number, cut in enumerate((0, draw.randrange(len(text)), len(text) - 1)):
        other = tmp_path / str(number)
        shutil.copytree(folder, other)
        (other / "result.json").unlink()
        (other / SAMPLES).write_bytes(text[:cut])
        said = measure(other, "engine.slots=3") if number == 1 else measure(other)
        left = text[:cut].count(b"\n")
        assert (f"{left} of 18 samples are there already" in said) == bool(left)
        lines = (other / SAMPLES).read_text().splitlines()
        assert sorted((r["group"], r["sample"]) for r in map(json.loads, lines)) == [
            (i, j) for i in range(6) for j in range(3)
        ]
        result = json.loads((other / "result.json").read_text())
        theirs = json.loads((folder / "result.json").read_text())
        result["config"]["engine.slots"] = theirs["config"]["engine.slots"]
        assert result == theirs
    assert (tmp_path / "0" / "result.json").read_bytes() == (folder / "result.json").read_bytes()


def test_a_finished_one_is_shown_and_compared_without_drawing(whole, measure, tmp_path):
    folder = whole[0]
    before = (folder / SAMPLES).stat().st_mtime_ns
    result = json.loads((folder / "result.json").read_text())
    for problem in result["problems"]:
        problem["correct"] = [True] * 3
    (tmp_path / "theirs.json").write_text(json.dumps(result))
    said = measure(folder, f"compare={tmp_path / 'theirs.json'}")
    assert "is complete; nothing to draw" in said and "difference" in said and "-100.0 ± 0.0 %" in said
    assert "drawn in different ways" not in said
    assert (folder / SAMPLES).stat().st_mtime_ns == before
    other = result | {"set": "the same one elsewhere", "config": result["config"] | {"evaluation.top_p": 0.5}}
    (tmp_path / "theirs.json").write_text(json.dumps(other))
    said = measure(folder, f"compare={tmp_path / 'theirs.json'}")
    assert "difference" in said and "drawn in different ways: evaluation.top_p is 1.0 and 0.5" in said
    (tmp_path / "theirs.json").write_text(json.dumps(result | {"set": "another", "problems_sha256": "0"}))
    assert "error: a result on" in measure(tmp_path / "new", f"compare={tmp_path / 'theirs.json'}")
    assert not (tmp_path / "new").exists()


def test_other_samples_other_problems_and_other_weights_are_another_evaluation(whole, measure, words, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(whole[0], other)
    assert "holds another run: evaluation.samples is 3 there and 4 here" in measure(other, "evaluation.samples=4")
    asked = json.loads((other / "asked.json").read_text())
    for what, key in (("weights", "init_from"), ("problems", "data.source")):
        changed = {"sha256": "0", "step": 1} if what == "weights" else "0"
        (other / "asked.json").write_text(json.dumps(asked | {what: changed}))
        assert f"has samples of other {what}: {key} is not what it was" in measure(other)
