"""Sandbox Fusion's `/run_code` protocol: requests and results as JSON, in both directions.

The protocol knows fewer ends than `ToolResult`; what it cannot say is added under the key `retool`, which clients and
servers of others ignore.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from retool_jax.errors import UserError
from retool_jax.sandbox.request import Request
from retool_jax.sandbox.types import Limits, Status, ToolResult

EXTRA = "retool"
# Everything that the standard fields do not say, or say in another form.
_EXTRA_FIELDS = (
    *("status", "message", "return_code", "signal", "stdout_bytes", "stderr_bytes", "stdout_truncated"),
    *("stderr_truncated", "wall_s", "queue_s", "cpu_s", "peak_rss_mb", "backend", "attempts"),
)


class Malformed(Exception):
    """A body that is no request; `field` is the one at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def detail(self) -> dict:
        """The body of the answer, as FastAPI writes it."""
        return {"detail": [{"loc": ["body", self.field], "msg": str(self), "type": "value_error"}]}


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


def write_request(request: Request) -> dict:
    """The body of a request to any Sandbox Fusion server."""
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


def _get(body: Mapping[str, Any], name: str, kinds: type | tuple[type, ...], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise Malformed(name, f"a {type(value).__name__} is no value for it")
    return value


def number(body: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of the body. Raises Malformed."""
    value = float(_get(body, name, (int, float), default))
    if not math.isfinite(value):
        raise Malformed(name, f"{value} is no value for it")
    return value


def _below(limits: Limits, ceiling: Limits) -> Limits:
    return Limits(**{f.name: min(getattr(limits, f.name), getattr(ceiling, f.name)) for f in fields(Limits)})


def read_request(body: Mapping[str, Any], default: Limits, ceiling: Limits) -> Request:
    """The request that a body describes; what it asks for beyond `ceiling` is cut down to that.

    A script's last value is not printed unless the body's `retool` part asks for it. Raises Malformed.
    """
    if not isinstance(body.get("code"), str):
        raise Malformed("code", "it must be a string")
    wall_s, memory_mb = number(body, "run_timeout", default.wall_s), number(body, "memory_limit_MB", -1)
    files = {}
    for path, data in _get(body, "files", dict, {}).items():
        try:
            files[path] = base64.b64decode(data or "", validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise Malformed("files", f"the content of {path[:80]!r} is not base64") from None
    fetch = _get(body, "fetch_files", list, [])
    if not all(isinstance(path, str) for path in fetch):
        raise Malformed("fetch_files", "it must be a list of strings")
    extra = _get(body, EXTRA, dict, {})
    asked = {"wall_s": min(max(wall_s, 0.05), ceiling.wall_s)}
    if memory_mb > 0:  # -1 is the protocol's word for no limit
        asked["memory_mb"] = min(max(int(memory_mb), 16), ceiling.memory_mb)
    try:
        limits = Limits(**asdict(default) | asked | _get(extra, "limits", dict, {}))
    except (TypeError, UserError) as error:
        raise Malformed("limits", str(error)) from None
    allowed = _get(extra, "allowed_modules", list, [])
    return Request(
        body["code"],
        _get(body, "stdin", str, ""),
        files,
        fetch,
        _below(limits, ceiling),
        _get(extra, "show_last_expression", bool, False),
        tuple(map(str, allowed)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def fault_response(message: str) -> dict:
    """The body that says that nothing was run."""
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
    """What is kept of a whole stream, its bytes, and whether it was cut (a server of others keeps everything)."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text, len(data), False
    head, tail = data[: limit // 2], data[len(data) - limit // 2 :]
    marker = f"\n[... {len(data) - len(head) - len(tail)} bytes removed ...]\n"
    return head.decode("utf-8", "replace") + marker + tail.decode("utf-8", "replace"), len(data), True


def read_result(body: Mapping[str, Any], limits: Limits) -> ToolResult:
    """The result that an answer describes, in full if the server is one of ours.

    A server of others says less: an end by SIGKILL after a MemoryError is `oom`, any other return code that is not
    zero a `user_error`, and `SandboxError` an `infra_error`. Raises ValueError if it is no answer.
    """
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
