"""Files are replaced as a whole or not at all, and output replaces neither special files nor files of a run."""

import os

import pytest

from retool_jax.errors import UserError
from retool_jax.files import check_result, read_lines, replacing


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "below" / "it.json"
    with replacing(path) as file:
        file.write("old")
    with pytest.raises(ValueError), replacing(path) as file:
        file.write("half of the n")
        raise ValueError
    assert path.read_text() == "old" and [each.name for each in path.parent.iterdir()] == ["it.json"]


def test_a_link_goes_on_leading_to_what_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "it.json")
    with replacing(tmp_path / "link.json") as file:
        file.write("new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "disk" / "it.json").read_text() == "new"


def test_what_is_no_file_is_left_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("folder", "a folder"), ("pipe", "no file")):
        with pytest.raises(UserError, match=f"cannot write .*{name}, which is {kind}"), replacing(tmp_path / name):
            pass
    with pytest.raises(UserError, match="which is a folder"), replacing(tmp_path.__class__(".")):
        pass
    assert (tmp_path / "pipe").is_fifo() and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_file_of_a_run_is_no_place_for_what_other_commands_write(tmp_path):
    for name in ("config.yaml", "lock", "metrics.jsonl", "report.html"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"out=.*metrics.jsonl is a file of the run in .*; choose another out="):
        check_result(tmp_path / "metrics.jsonl")
    for name in ("report.html", "new.jsonl", "all.parquet"):
        check_result(tmp_path / name)
    (tmp_path / "lock").unlink()  # a folder of somebody's with a config.yaml in it
    check_result(tmp_path / "metrics.jsonl")


def test_lines_are_read_up_to_a_torn_one(tmp_path):
    path = tmp_path / "x.jsonl"
    for end in ('{"a": 3', "\0\0\0", '{"a": 3\n\n', ""):
        path.write_text(f'{{"a": 1}}\r\n\n{{"a": 2}}\n{end}')
        assert list(read_lines(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"x.jsonl line 2 is not JSON .*; remove that line"):
        list(read_lines(path))
