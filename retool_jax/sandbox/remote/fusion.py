"""Sandbox Fusion's `/run_code` protocol: requests and results as JSON, in both directions.

The protocol has fewer statuses than `ToolResult`. The key `retool` holds what it cannot express; clients and servers of
other projects ignore it.
"""

import base64
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, get_args

from retool_jax.errors import UserError
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.types import KINDS, Limits, Status, ToolResult, is_a, shown

EXTRA = "retool"
CUT = "\n[... bytes removed ...]\n"  # the same text as in a worker
# What the standard fields do not hold, or hold in another form.
_EXTRA_FIELDS = tuple(f.name for f in fields(ToolResult) if f.name not in ("stdout", "stderr", "files"))


class Malformed(Exception):
    """A body that is not a valid request; `field` is the path of the wrong field, with dots between names."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def detail(self) -> dict:
        """The body of the answer, in the format of FastAPI."""
        loc = ["body", *filter(None, self.field.split("."))]
        return {"detail": [{"loc": loc, "msg": str(self), "type": "value_error"}]}


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


def write_request(request: Request) -> dict:
    """The body of a request to a Sandbox Fusion server of any project."""
    limits = request.limits
    extra = {
        "limits": asdict(limits),
        "show_last_expression": request.show_last_expression,
        "allowed_modules": list(request.allowed_modules),
    }
    return {
        "compile_timeout": limits.wall_s,
        "run_timeout": limits.wall_s,
        "memory_limit_MB": limits.memory_mb,
        "code": request.code,
        "stdin": request.stdin,
        "language": "python",
        "files": {path: base64.b64encode(data).decode() for path, data in request.files.items()},
        "fetch_files": list(request.fetch),
        EXTRA: extra,
    }


_NAMES = KINDS | {dict: "an object", list: "a list"}


def _wrong(name: str, value: object, expected: str) -> Malformed:
    return Malformed(name, f"{name} is {shown(value)}; it must be {expected}")


def _get(body: Mapping[str, Any], name: str, kind: type, default: Any = None, within: str = "") -> Any:
    """A field of type `kind`, or the default if it is null or absent. Raises Malformed, also without a default."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not is_a(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(within + name, value, _NAMES[kind])
    return value


def text(body: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A string of the body. Raises Malformed."""
    return _get(body, name, str, default)


def number(body: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of the body. Raises Malformed."""
    return _get(body, name, float, default)


def _whole(value: object) -> object:
    """The whole number for a float like 512.0: JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _strings(body: Mapping[str, Any], name: str, within: str = "") -> list[str]:
    values = _get(body, name, list, [], within)
    for value in values:
        if not isinstance(value, str):
            raise Malformed(within + name, f"an entry of {within}{name} is {shown(value)}; it must be {KINDS[str]}")
    return values


def _files(body: Mapping[str, Any]) -> dict[str, bytes]:
    files = {}
    for path, data in _get(body, "files", dict, {}).items():
        try:
            files[path] = b"" if data is None else base64.b64decode(data, validate=True)
        except (TypeError, ValueError):
            raise Malformed("files", f"files[{shown(path)}] is {shown(data)}; it must be base64 text") from None
    return files


def _below(limits: Limits, ceiling: Limits) -> Limits:
    return Limits(**{f.name: min(getattr(limits, f.name), getattr(ceiling, f.name)) for f in fields(Limits)})


def read_request(body: Mapping[str, Any], default: Limits, ceiling: Limits) -> Request:
    """The request in a body; limits above `ceiling` are lowered to it.

    The value of a script's last expression is printed only if the body's `retool` part asks for it. Raises Malformed.
    """
    wall_s, memory_mb = number(body, "run_timeout", default.wall_s), _whole(number(body, "memory_limit_MB", -1))
    if not is_a(memory_mb, int):
        raise _wrong("memory_limit_MB", memory_mb, KINDS[int])
    asked: dict[str, Any] = {"wall_s": min(max(wall_s, 0.05), ceiling.wall_s)}
    if memory_mb > 0:  # -1 means no limit in the protocol
        asked["memory_mb"] = min(max(memory_mb, 16), ceiling.memory_mb)
    extra = _get(body, EXTRA, dict, {})
    exact = _get(extra, "limits", dict, {}, f"{EXTRA}.")
    names = [f.name for f in fields(Limits)]
    if unknown := [name for name in exact if name not in names]:
        raise Malformed(f"{EXTRA}.limits", f"limits.{unknown[0][:80]!r} is unknown; there is {', '.join(names)}")
    try:
        limits = Limits(**asdict(default) | asked | {name: _whole(value) for name, value in exact.items()})
    except UserError as error:
        raise Malformed(f"{EXTRA}.limits", str(error)) from None
    return Request(
        text(body, "code"),
        text(body, "stdin", ""),
        _files(body),
        _strings(body, "fetch_files"),
        _below(limits, ceiling),
        _get(extra, "show_last_expression", bool, False, f"{EXTRA}."),
        tuple(_strings(extra, "allowed_modules", f"{EXTRA}.")),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def fault_response(message: str) -> dict:
    """The body of an answer when nothing was run."""
    return {"status": "SandboxError", "message": message, "compile_result": None, "run_result": None, "files": {}}


def write_result(result: ToolResult) -> dict:
    """The body of the answer to a request."""
    extra = {name: getattr(result, name) for name in _EXTRA_FIELDS}
    if result.status in ("infra_error", "cancelled"):
        return fault_response(result.message) | {EXTRA: extra}
    added, return_code = "", result.return_code
    if result.status == "timeout":
        return_code = None
    elif result.status == "rejected":
        added, return_code = f"not run: {result.message}\n", 1
    elif result.status == "oom":
        added, return_code = f"MemoryError: {result.message}\n", -9
    elif result.status == "output_limit":
        added, return_code = f"{result.message}\n", -9
    elif result.signal:
        added = f"{result.message}\n"
    extra["added"] = added
    late = result.status == "timeout"
    return {
        "status": "Success" if result.status == "success" else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": {
            "status": "TimeLimitExceeded" if late else "Finished",
            "execution_time": result.wall_s,
            "cpu_time": result.cpu_s,
            "return_code": return_code,
            "stdout": result.stdout,
            "stderr": result.stderr + added,
        },
        "executor_pod_name": None,
        "files": {path: base64.b64encode(data).decode() for path, data in result.files.items()},
        EXTRA: extra,
    }


def _clip(text: str, limit: int) -> tuple[str, int, bool]:
    """The kept part of a stream, its size in bytes, and whether it was cut (other projects' servers cut nothing)."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text, len(data), False
    head, tail = data[: limit // 2], data[len(data) - limit // 2 :]
    return head.decode("utf-8", "replace") + CUT + tail.decode("utf-8", "replace"), len(data), True


def read_result(body: Mapping[str, Any], limits: Limits) -> ToolResult:
    """The result in an answer; complete if the server is one of ours.

    Other projects' servers say less: an end by SIGKILL after a MemoryError is `oom`, any other return code but zero is
    `user_error`, and `SandboxError` is `infra_error`. Raises ValueError if the answer cannot be read.
    """
    result = _read_result(body, limits)
    for f in fields(result):
        value = getattr(result, f.name)
        if f.name == "status":
            right = value in get_args(Status)
        elif f.name == "files":
            continue
        elif f.type in KINDS:
            right = is_a(value, f.type) and (f.type is not float or math.isfinite(value))
        else:
            right = value is None or is_a(value, int)
        if not right:
            raise ValueError(f"an answer whose {f.name} is {shown(value)}")
    return result


def _read_result(body: Mapping[str, Any], limits: Limits) -> ToolResult:
    """`read_result`, without checks of types and ranges."""
    try:
        files = {path: base64.b64decode(data) for path, data in (body.get("files") or {}).items()}
        if isinstance(extra := body.get(EXTRA), dict):
            run = body["run_result"] or {"stdout": "", "stderr": ""}
            known = {name: extra[name] for name in _EXTRA_FIELDS}
            stderr = run["stderr"].removesuffix(extra.get("added", ""))
            return ToolResult(**known, stdout=run["stdout"], stderr=stderr, files=files)
        if body["status"] not in ("Success", "Failed"):
            return ToolResult("infra_error", message=f"the server: {body.get('message') or body['status']}")
        run = body.get("run_result") or body["compile_result"]
        if run["status"] not in ("Finished", "TimeLimitExceeded"):
            return ToolResult("infra_error", message=f"the server could not run it: {run.get('stderr')}")
        return replace(_foreign_result(run, limits), files=files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"an answer without {error!r}") from None


def _foreign_result(run: Mapping[str, Any], limits: Limits) -> ToolResult:
    code = run.get("return_code")
    stdout, stdout_bytes, stdout_cut = _clip(run.get("stdout") or "", limits.output_bytes)
    stderr, stderr_bytes, stderr_cut = _clip(run.get("stderr") or "", limits.output_bytes)
    status: Status
    if run["status"] == "TimeLimitExceeded":
        status, message = "timeout", f"time limit of {limits.wall_s:g} s reached"
    elif code == 0:
        status, message = "success", ""
    elif code == -9 and "MemoryError" in stderr.rstrip().rpartition("\n")[2]:
        status, message = "oom", f"memory limit of {limits.memory_mb} MB exceeded"
    else:
        status, message = "user_error", f"killed by signal {-code}" if (code or 0) < 0 else f"exit code {code}"
    return ToolResult(
        status,
        stdout=stdout,
        stderr=stderr,
        stdout_bytes=stdout_bytes,
        stderr_bytes=stderr_bytes,
        stdout_truncated=stdout_cut,
        stderr_truncated=stderr_cut,
        return_code=code,
        signal=-code if (code or 0) < 0 else None,
        wall_s=run.get("execution_time") or 0.0,
        attempts=1,
        message=message,
    )
