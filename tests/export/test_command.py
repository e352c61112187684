"""What the command refuses before it writes anything, and which files it leaves."""

import pytest

from retool_jax.errors import UserError
from retool_jax.export.command import FORMATS, KEYS, main


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run={run}"], "give run=DIR and out=PATH"),
        (["rnu={run}", "out={out}"], "did you mean run="),
        (["run={tmp}/nope", "out={out}"], "there is no folder .*/nope; give that of a run"),
        (["run={tmp}", "out={out}"], "holds no trajectories: neither trajectories/"),
        (["run={run}", "out={out}", "format=csv"], "format=csv is not one of: parquet, traces, atif, inspect"),
        (["run={run}", "out={out}", "step=last"], "step=last must be a whole number"),
        (["run={run}", "out={out}", "greedy=1"], "greedy=1 must be true or false"),
        (["run={run}", "out={out}", "step=7"], "there are: split=dev step=0; split=dev step=5"),
        (["run={run}", "out={out}", "step=7", "format=atif"], "there are: split=dev step=0"),
        (["run={run}", "out={out}", "step=7", "format=traces"], "there are: split=dev step=0"),
        (["run={run}", "out={out}", "push=mine"], "push=mine is no repository of the hub"),
        (["run={run}", "out={out}", "push=me/x", "format=atif"], "format=atif is not pushed; push= takes format="),
        (["run={run}", "out={tmp}"], "is a folder, and format=parquet writes a file"),
        (["run={run}", "out={run}/trajectories/x.jsonl", "format=atif"], "is where trajectories are read from"),
        (["run={run}", "out={run}/trajectories", "format=traces"], "is where trajectories are read from"),
        (["run={run}", "out={run}", "format=traces"], "exists already; remove it"),
        (["run={run}", "out={out}", "step=" + "9" * 5000], "must be a whole number"),
        (["run={run}", "out={out}", "format=inspect"], "must end in .eval or .json"),
        (["run={run}", "out=/proc/x/y.parquet"], "cannot write /proc/x"),
        (["run={run}", "out=/proc/x/y", "format=traces"], "cannot write /proc/x"),
    ],
)
def test_bad_words_are_named_and_nothing_is_written(words, named, run, tmp_path):
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=named):
        main([word.format(run=run, tmp=tmp_path, out=tmp_path / "out") for word in words])
    assert not list(tmp_path.iterdir()) and sorted(run.rglob("*")) == before


def test_a_failed_export_leaves_the_file_that_was_there(run, tmp_path):
    (tmp_path / "trajectories").mkdir()
    good = (run / "trajectories" / "dev-000000.jsonl").read_text()
    (tmp_path / "trajectories" / "dev-000000.jsonl").write_text(f"{good}{{bad\n{good}")
    out = tmp_path / "all.jsonl"
    out.write_text("old")
    with pytest.raises(UserError, match="line 3 is not JSON"):
        main([f"run={tmp_path}", f"out={out}", "format=atif"])
    assert out.read_text() == "old"
    (tmp_path / "trajectories" / "dev-000000.jsonl").write_text(good)
    main([f"run={tmp_path}", f"out={out}", "format=atif"])
    assert out.read_text().count("\n") == 2 and {path.name for path in tmp_path.iterdir()} == {"trajectories", out.name}


def test_help_names_every_key_and_format(capsys):
    main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n{key}=" in told for key in KEYS) and all(f"format={kind}" in told for kind in FORMATS)
