"""Sandbox Fusion's protocol: our own results arrive unchanged, and other projects' answers are understood."""

from dataclasses import replace

import pytest

from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.remote.fusion import Malformed, read_request, read_result, write_request, write_result
from retool_jax.sandbox.types import Limits, ToolResult

LIMITS = Limits(wall_s=5, memory_mb=512)
CEILING = Limits(wall_s=60, memory_mb=2048)

RESULTS = {
    "success": ToolResult("success", "4\n", "", 2, 0, return_code=0, wall_s=0.5, attempts=1, backend="gvisor"),
    "user_error": ToolResult("user_error", "", "E: x\n", 0, 5, return_code=3, attempts=1, message="exit code 3"),
    "signal": ToolResult("user_error", return_code=-11, signal=11, attempts=1, message="killed by signal SIGSEGV"),
    "timeout": ToolResult("timeout", "a\n", "", 2, 0, return_code=-9, signal=9, attempts=1, message="time limit"),
    "oom": ToolResult("oom", stderr="half a line", stderr_bytes=11, return_code=1, attempts=1, message="memory limit"),
    "output_limit": ToolResult("output_limit", "x", "", 9 << 20, 0, True, return_code=-9, attempts=1, message="m"),
    "rejected": ToolResult("rejected", message="the code contains a NUL character"),
    "files": ToolResult("success", return_code=0, attempts=2, queue_s=1.5, files={"a/b": b"\xff\0"}),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_survive_the_way_there_and_back(name: str):
    assert read_result(write_result(RESULTS[name]), LIMITS) == RESULTS[name]


@pytest.mark.parametrize(
    ("name", "status", "run_status", "return_code", "stderr"),
    [
        ("success", "Success", "Finished", 0, ""),
        ("user_error", "Failed", "Finished", 3, "E: x\n"),
        ("signal", "Failed", "Finished", -11, "killed by signal SIGSEGV\n"),
        ("timeout", "Failed", "TimeLimitExceeded", None, ""),
        ("oom", "Failed", "Finished", -9, "half a lineMemoryError: memory limit\n"),
        ("output_limit", "Failed", "Finished", -9, "m\n"),
        ("rejected", "Failed", "Finished", 1, "not run: the code contains a NUL character\n"),
    ],
)
def test_results_as_the_protocol_has_them(name: str, status: str, run_status: str, return_code: int, stderr: str):
    body = write_result(RESULTS[name])
    run = body["run_result"]
    said = (body["status"], run["status"], run["return_code"], run["stderr"], run["stdout"])
    assert said == (status, run_status, return_code, stderr, RESULTS[name].stdout)


@pytest.mark.parametrize("status", ["infra_error", "cancelled"])
def test_faults_of_the_machinery_are_sandbox_errors(status: str):
    body = write_result(ToolResult(status, message="the worker died"))
    assert (body["status"], body["message"], body["run_result"]) == ("SandboxError", "the worker died", None)


def foreign(status: str, code: int | None, stderr: str = "", stdout: str = "out") -> ToolResult:
    run = {"status": status, "execution_time": 0.25, "return_code": code, "stdout": stdout, "stderr": stderr}
    return read_result({"status": "Failed", "message": "", "compile_result": None, "run_result": run}, LIMITS)


def test_answers_of_other_servers_are_understood():
    done = foreign("Finished", 0)
    assert (done.status, done.stdout, done.stdout_bytes, done.wall_s) == ("success", "out", 3, 0.25)
    late = foreign("TimeLimitExceeded", None)
    assert (late.status, late.message, late.stdout) == ("timeout", "time limit of 5 s reached", "out")
    failed = foreign("Finished", 2, "E: x")
    assert (failed.status, failed.return_code, failed.message) == ("user_error", 2, "exit code 2")
    killed = foreign("Finished", -9)
    assert (killed.status, killed.signal) == ("user_error", 9)
    assert foreign("Finished", -9, "MemoryError: 512 MB\n").status == "oom"
    assert foreign("Error", None).status == "infra_error"
    assert read_result({"status": "SandboxError", "message": "no"}, LIMITS).message == "the server: no"
    long = foreign("Finished", 0, stdout="a" * 50_000 + "b" * 50_000)
    assert long.stdout_truncated and long.stdout_bytes == 100_000 and "[... bytes removed ...]" in long.stdout
    assert long.stdout.startswith("aaa") and long.stdout.endswith("bbb")


@pytest.mark.parametrize("body", [{}, {"status": "Success"}, {"status": "Failed", "run_result": []}])
def test_what_is_no_answer_is_said(body: dict):
    with pytest.raises(ValueError, match="an answer without"):
        read_result(body, LIMITS)


def test_requests_survive_the_way_there():
    request = Request("x = '\ud800'", "in", {"a/b": b"\xff"}, ["c"], LIMITS, True, ("math",))
    assert read_request(write_request(request), Limits(), CEILING) == request


def test_requests_of_others_get_the_defaults_and_the_ceiling():
    request = read_request({"code": "1", "language": "python", "stdin": None, "files": {"a": None}}, LIMITS, CEILING)
    assert (request.limits, request.stdin, request.files) == (LIMITS, "", {"a": b""})
    assert not request.show_last_expression, "a script prints nothing by itself"
    asked = read_request({"code": "1", "run_timeout": 1000, "memory_limit_MB": 1 << 19}, LIMITS, CEILING).limits
    assert asked == replace(LIMITS, wall_s=60, memory_mb=2048)
    assert read_request({"code": "1", "run_timeout": 0, "memory_limit_MB": -1}, LIMITS, CEILING).limits.wall_s == 0.05


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("code", {}),
        ("code", {"code": 1}),
        ("run_timeout", {"run_timeout": "10"}),
        ("run_timeout", {"run_timeout": float("nan")}),
        ("run_timeout", {"run_timeout": True}),
        ("memory_limit_MB", {"memory_limit_MB": []}),
        ("stdin", {"stdin": 1}),
        ("files", {"files": ["a"]}),
        ("files", {"files": {"a": "*"}}),
        ("files", {"files": {"a": 1}}),
        ("fetch_files", {"fetch_files": "a"}),
        ("fetch_files", {"fetch_files": [1]}),
        ("retool", {"retool": 1}),
        ("retool.limits", {"retool": {"limits": {"wal_s": 1}}}),
        ("retool.limits", {"retool": {"limits": {"wall_s": "1"}}}),
    ],
)
def test_malformed_requests_name_the_field(field: str, body: dict):
    with pytest.raises(Malformed) as caught:
        read_request({"code": "1"} | body if field != "code" else body, LIMITS, CEILING)
    assert caught.value.field == field
    assert caught.value.detail()["detail"][0]["loc"] == ["body", *field.split(".")]
