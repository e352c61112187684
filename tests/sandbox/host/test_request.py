"""Which requests are refused, and which fork server a program gets."""

import pytest

from retool_jax.sandbox.host.request import MAX_FILE_BYTES, MAX_FILES, Request, UnreadableResponse, tier_of, to_result

STREAM = {"data": "", "bytes": 0, "truncated": False}
RESULT = {"status": "success", "message": "", "return_code": 0, "signal": None}
RESPONSE = {"result": RESULT, "streams": [STREAM, STREAM], "files": {}, "clean": True}


@pytest.mark.parametrize(
    ("code", "tier"),
    [
        ("print(1)", "base"),
        ("import math, os", "base"),
        ("import numpy as np", "numpy"),
        ("x = 1; import math, numpy", "numpy"),
        ("import pandas", "numpy"),
        ("if True:\n    from numpy.linalg import det", "numpy"),
        ("import numpy\nfrom sympy import solve", "sympy"),
        ("def f(): import mpmath", "sympy"),
        ("import sympy, scipy.stats", "scipy"),
        ("print('numpy is not imported')", "base"),
        ("import mynumpy, numpy_x", "base"),
        ("# import numpy", "base"),
        ("", "base"),
    ],
)
def test_tier_follows_the_imports(code: str, tier: str):
    assert tier_of(code) == tier


@pytest.mark.parametrize(
    "code", ["(" * 100_000, "\n" * 1_000_000, "import " * 300_000, ";" * 1_000_000, " " * 2_000_000]
)
def test_tier_of_a_hostile_text_is_found_all_the_same(code: str):
    assert tier_of(code) == "base"


def test_sizes_and_nul_are_refused():
    assert "2097152" in Request("#" * ((2 << 20) + 1)).fault()
    assert "2097152" in Request("é" * (1 << 20) + "#").fault()  # bytes count, not characters
    assert "8388608" in Request("", stdin="x" * ((8 << 20) + 1)).fault()
    assert "NUL" in Request("print('a\0b')").fault()
    assert Request("#" * (2 << 20)).fault() == Request("x = '\ud800'", stdin="\ud800").fault() == ""


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/passwd", "it is absolute"),
        ("../x", "'..'"),
        ("a/../../x", "'..'"),
        ("", "empty"),
        ("a//b", "empty"),
        ("./a", "empty"),
        ("a/", "empty"),
        ("a\0b", "NUL character"),
        ("\ud800", "not valid Unicode"),
        ("x" * 256, "too long"),
        ("/".join(["xxxxxxxx"] * 120), "too long"),
    ],
)
def test_paths_out_of_the_working_directory_are_refused(path: str, why: str):
    assert why in Request("", files={path: b""}).fault()
    assert why in Request("", fetch=[path]).fault()


def test_files_have_limits():
    assert Request("", files={"a/b.txt": b"x", "a/..c": b"", "ü": b""}, fetch=["...", "a/b"]).fault() == ""
    assert "16777216" in Request("", files={"a": bytes(MAX_FILE_BYTES + 1)}).fault()
    assert "33554432" in Request("", files={name: bytes(11 << 20) for name in "abc"}).fault()
    assert str(MAX_FILES) in Request("", fetch=["a"] * (MAX_FILES + 1)).fault()
    assert "a folder of it is a file" in Request("", files={"a": b"", "a/b": b""}).fault()


def test_responses_are_read_strictly():
    assert to_result(RESPONSE).status == "success"
    wrong = [{}, RESPONSE | {"streams": [STREAM]}, RESPONSE | {"files": []}, RESPONSE | {"result": {"statu": 1}}]
    for response in [*wrong, RESPONSE | {"streams": [STREAM, STREAM | {"data": "*"}]}]:
        with pytest.raises(UnreadableResponse):
            to_result(response)
