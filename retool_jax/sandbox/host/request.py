"""A call on its way to a worker and back: checks, the request's frame, and how the answer is read."""

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from retool_jax.sandbox.types import (
    KINDS,
    MAX_CODE_BYTES,
    MAX_STDIN_BYTES,
    Limits,
    SandboxConfig,
    ToolResult,
    is_a,
    shown,
)

MAX_FILE_BYTES = 16 << 20
MAX_FILES_BYTES = 32 << 20
MAX_FILES = 256
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 1024
MAX_FRAME_BYTES = 64 << 20

# Only the first part of a program is searched, for words and without parsing: a hostile program must not cost the host
# anything, and a wrong guess costs only time.
_TIER_CHARS = 65536
_IMPORT = re.compile(r"(?:^|[\n;:])[ \t]*(?:import|from)[ \t]+([^\n;#]*)")
_WORD = re.compile(r"[A-Za-z_]\w*")
_TIERS = (  # a program that imports from several gets the first one
    ("scipy", {"scipy"}),
    ("sympy", {"sympy", "mpmath"}),
    ("numpy", {"numpy", "pandas"}),
)


class UnreadableResponse(ValueError):
    """A worker's response cannot be read."""


def tier_of(code: str) -> str:
    """The fork server that has already imported what a program imports: base, numpy, sympy or scipy."""
    named: set[str] = set()
    for match in _IMPORT.finditer(code, 0, _TIER_CHARS):
        named.update(_WORD.findall(match.group(1)))
    return next((tier for tier, modules in _TIERS if named & modules), "base")


def _path_fault(path: str) -> str:
    """Why a path is refused; empty if it is not."""
    if "\0" in path:
        return "it contains a NUL character"
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    parts = path.split("/")
    if path.startswith("/"):
        return "it is absolute"
    if ".." in parts:
        return "it has '..' in it"
    if any(part in ("", ".") for part in parts):
        return "a part of it is empty"
    if size > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return "it is too long"
    return ""


def _files_fault(files: Mapping[str, bytes], fetch: Sequence[str]) -> str:
    if len(files) > MAX_FILES or len(fetch) > MAX_FILES:
        return f"{max(len(files), len(fetch))} files, the limit is {MAX_FILES}"
    for kind, paths in (("upload", files), ("fetch", fetch)):
        for path in paths:
            if fault := _path_fault(path):
                return f"cannot {kind} {path[:80]!r}: {fault}; name a file beneath the working directory"
    for path, data in files.items():
        if len(data) > MAX_FILE_BYTES:
            return f"the file {path[:80]!r} has {len(data)} bytes, the limit is {MAX_FILE_BYTES}"
        folders = path.split("/")[:-1]
        if any("/".join(folders[: i + 1]) in files for i in range(len(folders))):
            return f"cannot upload {path[:80]!r}: a folder of it is a file too"
    if (total := sum(map(len, files.values()))) > MAX_FILES_BYTES:
        return f"the files have {total} bytes together, the limit is {MAX_FILES_BYTES}"
    return ""


@dataclass(frozen=True)
class Request:
    """One program, with everything that determines what it does."""

    code: str
    stdin: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    fetch: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    show_last_expression: bool = True
    allowed_modules: Sequence[str] = ()
    op: str = "run"  # or "cell": run in the interpreter that the worker keeps

    @classmethod
    def of(
        cls,
        config: SandboxConfig,
        code: str,
        stdin: str,
        files: Mapping[str, bytes] | None,
        fetch: Sequence[str],
        limits: Limits | None,
        show_last_expression: bool | None = None,
        allowed_modules: Sequence[str] | None = None,
        op: str = "run",
    ) -> Self:
        """A request that takes limits and options from the configuration where they are None."""
        return cls(
            code,
            stdin,
            {} if files is None else files,
            fetch,
            config.limits if limits is None else limits,
            config.show_last_expression if show_last_expression is None else show_last_expression,
            config.allowed_modules if allowed_modules is None else allowed_modules,
            op,
        )

    def _mistyped(self) -> Iterator[tuple[str, object, str]]:
        """Fields of a wrong type, with their values and what they must be. (`Limits` checks its own.)"""
        for name, kind in (("code", str), ("stdin", str), ("show_last_expression", bool)):
            if not is_a(getattr(self, name), kind):
                yield name, getattr(self, name), KINDS[kind]
        if not isinstance(self.limits, Limits):
            yield "limits", self.limits, "a Limits"
        for name in ("fetch", "allowed_modules"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
                yield name, value, "a list of strings"
            else:
                yield from ((f"an entry of {name}", each, "a string") for each in value if not isinstance(each, str))
        if not isinstance(self.files, Mapping):
            yield "files", self.files, "bytes by path"
            return
        for path, data in self.files.items():
            if not isinstance(path, str):
                yield "a path of files", path, "a string"
            if not isinstance(data, bytes | bytearray):
                yield f"files[{shown(path)}]", data, "bytes"

    def fault(self) -> str:
        """Why the request is refused; empty if it is not."""
        for name, value, expected in self._mistyped():
            return f"{name} is {shown(value)}; it must be {expected}"
        if "\0" in self.code:
            return "the code contains a NUL character"
        for name, text, limit in (("code", self.code, MAX_CODE_BYTES), ("stdin", self.stdin, MAX_STDIN_BYTES)):
            if (size := len(text.encode("utf-8", "surrogatepass"))) > limit:
                return f"the {name} has {size} bytes, the limit is {limit}"
        if fault := _files_fault(self.files, self.fetch):
            return fault
        return f"the request is larger than {MAX_FRAME_BYTES} bytes" if len(self.frame) > MAX_FRAME_BYTES else ""

    @cached_property
    def tier(self) -> str:
        """The fork server that runs it."""
        return tier_of(self.code)

    @cached_property
    def frame(self) -> bytes:
        """The payload of its frame."""
        message = {
            "op": self.op,
            "code": self.code,
            "stdin": base64.b64encode(self.stdin.encode("utf-8", "surrogatepass")).decode(),
            "limits": vars(self.limits),
            "show_last_expression": self.show_last_expression,
            "allowed_modules": list(self.allowed_modules),
            "files": {path: base64.b64encode(data).decode() for path, data in self.files.items()},
            "fetch": list(self.fetch),
            "tier": self.tier,
        }
        return json.dumps(message).encode()


def to_result(response: dict) -> ToolResult:
    """A worker's response as a result. Raises UnreadableResponse if it cannot be read."""
    try:
        streams = {}
        for name, stream in zip(("stdout", "stderr"), response["streams"], strict=True):
            streams[name] = base64.b64decode(stream["data"], validate=True).decode("utf-8", "replace")
            streams[f"{name}_bytes"] = stream["bytes"]
            streams[f"{name}_truncated"] = stream["truncated"]
        files = {path: base64.b64decode(data) for path, data in response["files"].items()}
        return ToolResult(**response["result"], **streams, files=files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableResponse(f"{error!r}") from None
