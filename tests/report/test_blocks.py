"""Trajectories inside of a page: blocks give back what the run wrote, and the index what the list filters by."""

import json
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.report.blocks import logprob_codes, make_blocks, run_lengths, token_texts
from retool_jax.report.page import main, write_report
from retool_jax.report.runs import load_runs

HOSTILE = "</script><script>alert('owned')</script><!-- ]]> &amp; <img src=x onerror=alert(1)> \u2028\u202e\ud800\x00"
SHOWN = (
    HOSTILE.replace("\u2028", "\\u2028")
    .replace("\u202e", "\\u202e")
    .replace("\ud800", "\\ud800")
    .replace("\x00", "\\u0000")
)


def records_of(folder: Path) -> list[dict]:
    """Every trajectory of a run, in the order of steps."""
    return [json.loads(line) for path in sorted((folder / "trajectories").iterdir()) for line in path.open()]


def test_a_page_gives_back_every_trajectory(make_run, opened, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    write_report([folder], tmp_path / "page.html")
    page, records = opened(tmp_path / "page.html"), records_of(folder)
    assert len(page.details) == len(records) == 100
    for record, shown in zip(records, page.details, strict=True):
        assert shown["ids"] == record["ids"]
        mask = [i % 2 for i, count in enumerate(shown["mask"]) for _ in range(count)]
        assert mask == record["sampled"]
        drawn = [p for p, on in zip(record["logprobs"], record["sampled"], strict=True) if on]
        assert [-((code / 64) ** 2) for code in shown["logprobs"]] == pytest.approx(drawn, rel=0.1, abs=0.01)
        assert (shown["problem"], shown["truth"]) == (record["problem"], record["ground_truth"])
        said = [s["text"] for s in record["segments"] if s["role"] == "policy"][-1].removesuffix("<|im_end|>")
        assert shown["parts"][-1][:2] == ["reasoning", said]
        codes = [[kind, text] for kind, text, *_ in shown["parts"] if kind != "reasoning"]
        assert codes == [
            pair for call in record["tool_calls"] for pair in (["code", call["code"]], ["output", call["output"]])
        ]
        assert shown["calls"] == [[0, "success", 0.001, 0.004] for _ in record["tool_calls"]]
        assert shown["times"] == [0.0, 0.4]


def test_the_list_is_filtered_by_columns(make_run, opened, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, output="Traceback", curves=False)
    path = folder / "trajectories" / "dev-000005.jsonl"
    path.with_name("dev-000005-greedy.jsonl").write_text(path.read_text())
    write_report([folder], tmp_path / "page.html")
    page, records = opened(tmp_path / "page.html"), records_of(folder)
    greedy = [json.loads(line) for line in path.open()]
    records = [r for r in records if r["step"] != 5] + greedy  # the same lines stand in both files
    columns = page.index["columns"]
    shown = list(zip(*(columns[name] for name in ("step", "id", "tokens", "calls", "errors")), strict=True))
    listed = [*records_of(folder)[:20], *greedy, *(r for r in records if r["step"] > 5), *greedy]
    failed = [sum(call["status"] != "success" for call in r["tool_calls"]) for r in listed]
    expected = [
        (r["step"], r["id"], r["response_tokens"], len(r["tool_calls"]), errors)
        for r, errors in zip(listed, failed, strict=True)
    ]
    assert shown == expected and sum(columns["errors"]) > 0
    assert columns["split"] == ["dev"] * 100 + ["dev, greedy"] * 20
    assert set(columns["end"]) == {"answered"} and set(columns["run"]) == {0}
    outcomes = [page.index["outcomes"][i] for i in columns["outcome"]]
    assert outcomes[-20:] == ["right" if r["correct"] else "wrong" for r in greedy]
    surprise = [-sum(r["logprobs"]) / sum(r["sampled"]) for r in greedy]
    assert columns["surprise"][-20:] == pytest.approx(surprise, abs=1e-4)


def test_hostile_texts_are_data(make_run, opened, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, output=HOSTILE, curves=False)
    path = folder / "trajectories" / "dev-000020.jsonl"
    first, *others = [json.loads(line) for line in path.open()]
    names = ("id", "problem", "ground_truth", "answer", "end", "split", "fault", "verdict")
    first |= dict.fromkeys(names, HOSTILE) | {"reward_terms": {HOSTILE: float("nan")}}
    first["segments"][-1]["text"] = HOSTILE
    path.write_text("".join(json.dumps(record) + "\n" for record in [first, *others]))
    write_report([folder], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert "alert(" not in page.html and "\u202e" not in page.html
    place = page.column("id").index(SHOWN)
    assert page.column("split")[place] == SHOWN and page.column("end")[place] == SHOWN.replace("_", " ")
    shown = page.details[place]
    assert [shown[name] for name in ("problem", "truth", "answer", "fault", "verdict")] == [SHOWN] * 5
    assert shown["reward_terms"] == {SHOWN: None}
    assert shown["parts"][-1][1] == SHOWN
    outputs = [part for detail in page.details for part in detail["parts"] if part[0] == "output"]
    assert outputs and {text for _, text, *_ in outputs} == {SHOWN}


def test_what_does_not_fit_is_left_out_and_said(make_run, opened, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    (run,) = load_runs([folder])
    assert [make_blocks([run], limit).shown for limit in (None, 1000, 5, 0)] == [100, 100, 5, 0]
    main([f"run={folder}", "trajectories=33"])
    page = opened(folder / "report.html")
    assert len(page.details) == 33 and "33 of 100 are in this page, 67 are left out" in page.html
    steps = page.column("step")
    assert sorted(steps.count(step) for step in (0, 5, 10, 15, 20)) == [6, 6, 7, 7, 7]


def test_tokens_have_texts_of_the_runs_own_tokenizer(make_run, opened, tmp_path, tokenizer):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(config | {"tokenizer": "miniature"}))
    ids = tokenizer.encode("\n<|im_start|>user\nH\N{GRINNING FACE} \u202e<|im_end|>")
    path = folder / "trajectories" / "dev-000000.jsonl"
    records = [json.loads(line) for line in path.open()]
    for record in records:
        record |= {"ids": ids, "sampled": [1] * len(ids), "logprobs": [-0.5] * len(ids)}
        record["segments"] = [record["segments"][0] | {"stop": len(ids)}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report([folder], tmp_path / "page.html")
    (table,) = opened(tmp_path / "page.html").tables
    text = "".join(table[str(number)] for number in ids)
    assert text == "\n<|im_start|>user\nH\\xf0\\x9f\\x98\\x80 \\xe2\\x80\\xae<|im_end|>"
    assert token_texts(tokenizer, [10**15, -1]) == {-1: "[-1]", 10**15: "[1000000000000000]"}


def test_without_a_tokenizer_segments_keep_their_texts(make_run, opened, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(config | {"tokenizer": str(tmp_path / "gone")}))
    write_report([folder], tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert "no tokenizer at" in page.tables[0] and page.index["tables"] == [0]
    segments = [[s["role"], s["start"], s["stop"], s["text"]] for s in records_of(folder)[0]["segments"]]
    assert page.details[0]["segments"] == segments


def test_a_large_run_stays_within_its_size(make_run, tmp_path, monkeypatch):
    """A tenth of 10,000 trajectories takes less than a tenth of 20 MB; if not all fit, a part is shown."""
    (run,) = load_runs([make_run(tmp_path / "a", "python", 0, steps=5, count=500, tokens=100, curves=False)])
    blocks = make_blocks([run])
    assert blocks.shown == blocks.total == 1000 and len(blocks.details) > 1
    whole = sum(map(len, blocks.details))
    assert whole < 2_000_000
    monkeypatch.setattr("retool_jax.report.blocks.PAGE_BYTES", whole // 2)
    monkeypatch.setattr("retool_jax.report.blocks.BLOCK_CHARACTERS", 20_000)
    blocks = make_blocks([run])
    assert whole // 4 < sum(map(len, blocks.details)) <= whole // 2
    assert 250 < blocks.shown < 500 and sorted(set(blocks.index["step"])) == [0, 5]
    monkeypatch.setattr("retool_jax.report.blocks.EXPECTED_SHARE", 9.0)  # a guess that is far too high
    blocks = make_blocks([run])
    assert sum(map(len, blocks.details)) <= whole // 2 and len(blocks.index["id"]) == blocks.shown > 250


@pytest.mark.parametrize("flags", [[], [0], [1], [1, 1, 0], [0, 0, 1, 0, 1, 1]])
def test_run_lengths_begin_with_what_was_not_drawn(flags):
    lengths = run_lengths(flags)
    assert [i % 2 for i, count in enumerate(lengths) for _ in range(count)] == flags


def test_log_probs_of_any_size_fit_a_byte():
    assert logprob_codes([0.0, -1.0, -15.8, -1e9, float("-inf"), float("nan"), 1e-9]) == [0, 64, 254, 255, 255, 255, 0]


def test_a_record_that_cannot_be_shown_is_named(make_run, tmp_path):
    run = make_run(tmp_path / "a", "python", 0, steps=5, count=2, curves=False)
    path = min((run / "trajectories").iterdir())
    whole, *others = path.read_text().splitlines()
    for key, value, message in (
        ("end", None, "end is null and must be a text"),
        ("segments", [{"role": "policy"}], r"segments\[0\] has no start"),
        ("sampled", [], r"\d+ ids, 0 sampled, \d+ logprobs, and must have as many of each"),
    ):
        path.write_text("\n".join([json.dumps(json.loads(whole) | {key: value}), *others]))
        with pytest.raises(
            UserError, match=rf"{path.name} line 1 is no trajectory \(.*{message}\); mend or remove that line"
        ):
            make_blocks(load_runs([run]))
