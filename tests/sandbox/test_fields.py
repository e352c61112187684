"""Every field that a caller can set, with every kind of value: a wrong value is reported and reaches no worker."""

import asyncio
import base64
import json
from typing import Any

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.types import KINDS, is_a

PROCESS = SandboxConfig(backend=("process",), slots=1, probe_s=0)
HUGE = 10**400
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, HUGE, -HUGE, 0.5, 512.0, 1.5, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "1", "10", "python", "\ud800", "a\0b", "*", "x" * 100_000, base64.b64encode(b"x").decode()),
    *([], [1], [None], [["a"]], ["a", 1.5], ["\ud800"], ["math"], [float("nan")], ["math", "os"]),
    *({}, {"a": 1}, {"a": None}, {"a": "*"}, {"a": []}, {"a": {}}, {"": ""}, {"\ud800": ""}, {"a": "eA=="}),
]
LIMITS = ("wall_s", "memory_mb", "output_bytes", "raw_output_bytes", "processes", "file_mb")
# Route -> its fields, each as its path of names.
FIELDS = {
    "/run_code": [
        *((name,) for name in ("code", "stdin", "language", "files", "fetch_files", "retool")),
        *((name,) for name in ("run_timeout", "compile_timeout", "memory_limit_MB")),
        *(("retool", name) for name in ("limits", "show_last_expression", "allowed_modules")),
        *(("retool", "limits", name) for name in (*LIMITS, "unknown")),
    ],
    "/execute": [(name,) for name in ("code", "stdin", "generated_code", "std_input", "timeout", "language")],
}
WHOLE = {"memory_limit_MB", *LIMITS[1:]}
KIND = dict.fromkeys(("code", "stdin", "generated_code", "std_input", "language"), str) | {
    **dict.fromkeys(("files", "retool", "limits"), dict),
    **dict.fromkeys(("fetch_files", "allowed_modules"), list),
    **dict.fromkeys(("run_timeout", "compile_timeout", "timeout", "wall_s"), float),
    **dict.fromkeys(WHOLE, int),
    "show_last_expression": bool,
}


def fits(name: str, value: Any) -> bool:
    """Whether a value has the type of its field. Null counts as absent, except for the code and the limits."""
    if value is None:
        return name not in ("code", "generated_code", "unknown", *LIMITS)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return False
    if name in WHOLE and isinstance(value, float):
        return value.is_integer()
    if name == "unknown" or not is_a(value, KIND[name]):
        return False
    if isinstance(value, list):
        return all(isinstance(each, str) for each in value)
    if name == "files":
        return all(each is None or each in ("", "eA==") for each in value.values())
    return name != "limits" or not value


def body_with(route: str, path: tuple[str, ...], value: Any) -> dict:
    newer = {"generated_code", "std_input"} & set(path)
    body: dict[str, Any] = {"generated_code" if newer else "code": "print(1)"}
    inner = body
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    return body


def test_every_value_of_every_field_is_served_or_named_and_no_worker_is_lost(serve):
    aiohttp = pytest.importorskip("aiohttp", reason="this test needs aiohttp: pip install 'retool_jax[sandbox]'")
    cases = [(route, path, value) for route, paths in FIELDS.items() for path in paths for value in VALUES]
    wrong: list[str] = []

    async def check(session: Any, route: str, path: tuple[str, ...], value: Any) -> None:
        body = body_with(route, path, value)
        async with session.post(route, data=json.dumps(body)) as response:
            said = await response.text()
        name, case = path[-1], f"{route} {'.'.join(path)}={value!r:.60}: {response.status} {said[:200]}"
        # A value of the right type may still be out of range, which is also a 422, or an unknown language.
        if response.status not in (200, 400, 408, 422) or (response.status != 422 and not fits(name, value)):
            wrong.append(case)
        if response.status == 422:
            (detail,) = json.loads(said)["detail"]
            where, message = detail["loc"], detail["msg"]
            named = len(where) > 1 and where == ["body", *path][: len(where)] and name in message
            if not named or "\n" in message or len(message) > 300:
                wrong.append(case)
            if fits(name, value) and name not in LIMITS:
                wrong.append(case)

    async def main() -> tuple[dict, dict, str]:
        async with serve() as (url, box), aiohttp.ClientSession(url) as session:
            left = iter(cases)

            async def ask() -> None:
                for route, path, value in left:
                    await check(session, route, path, value)

            await asyncio.gather(*(ask() for _ in range(8)))
            async with session.post("/run_code", json={"code": "print(2 + 2)"}) as response:
                return box.metrics.restarts, box.metrics.faults, await response.text()

    restarts, faults, after = asyncio.run(main())
    assert not wrong, "\n".join(wrong)
    assert (restarts, faults) == ({}, {})
    assert json.loads(after)["run_result"]["stdout"] == "4\n"


@pytest.mark.parametrize(
    ("route", "body", "field", "message"),
    [
        (
            "/run_code",
            {"code": "1", "retool": {"limits": {"memory_mb": 512.5}}},
            ["retool", "limits"],
            "limits.memory_mb is 512.5; it must be a whole number",
        ),
        ("/run_code", {"code": None}, ["code"], "code is None; it must be a string"),
        ("/run_code", {"code": "1", "files": {"a": "*"}}, ["files"], "files['a'] is '*'; it must be base64 text"),
        (
            "/run_code",
            {"code": "1", "retool": {"allowed_modules": [1]}},
            ["retool", "allowed_modules"],
            "an entry of retool.allowed_modules is 1; it must be a string",
        ),
        ("/execute", {"generated_code": 1}, ["generated_code"], "generated_code is 1; it must be a string"),
        ("/execute", {"code": "1", "timeout": "2"}, ["timeout"], "timeout is '2'; it must be a number"),
    ],
)
def test_what_is_wrong_is_said_by_its_own_name(serve, route: str, body: dict, field: list[str], message: str):
    aiohttp = pytest.importorskip("aiohttp", reason="this test needs aiohttp: pip install 'retool_jax[sandbox]'")

    async def main() -> tuple[int, dict]:
        async with (
            serve() as (url, _),
            aiohttp.ClientSession(url) as session,
            session.post(route, json=body) as response,
        ):
            return response.status, await response.json()

    status, said = asyncio.run(main())
    assert (status, said["detail"][0]["loc"], said["detail"][0]["msg"]) == (422, ["body", *field], message)


# ---------------------------------------------------------------------------------------------------------------------
# In process
# ---------------------------------------------------------------------------------------------------------------------


def mistyped() -> list[tuple[str, Any]]:
    """(argument of `Sandbox.run`, value that it must refuse)."""
    odd = [None, True, 1, 1.5, HUGE, "text", b"bytes", [1], [b"x"], {1: b"x"}, {"a": "text"}, {"a": 1}, {"a": None}]
    odd += [object(), float("nan"), ("a", 1), {"b"}, 10**5000, iter(["a"])]
    found = []
    for value in odd:
        absent = value is None
        is_list = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
        found += [("code", value)] * (not isinstance(value, str))
        found += [("stdin", value)] * (not isinstance(value, str))
        found += [("files", value)] * (not absent)
        found += [("fetch", value)] * (not is_list)
        found += [("limits", value)] * (not absent)
        found += [("show_last_expression", value)] * (not absent and not isinstance(value, bool))
        found += [("allowed_modules", value)] * (not absent and not is_list)
    return found


def test_arguments_of_another_type_are_rejected_by_name_and_no_worker_is_lost():
    cases = mistyped()
    assert len(cases) > 100

    async def main(box: Sandbox) -> list[ToolResult]:
        async with box.session() as session:
            results = []
            for name, value in cases:
                results.append(await box.run(**({"code": "print(1)"} | {name: value})))
                if name in ("code", "stdin", "files", "fetch", "limits"):
                    results.append(await session.run(**({"code": "print(1)"} | {name: value})))
            return [*results, await session.run("print(2 + 2)"), await box.run("print(2 + 2)")]

    async def opened() -> tuple[list[ToolResult], dict, dict]:
        async with open_sandbox(PROCESS) as box:
            return await main(box), box.metrics.restarts, box.metrics.faults

    (*rejected, cell, call), restarts, faults = asyncio.run(opened())
    assert {(r.status, r.attempts) for r in rejected} == {("rejected", 0)}
    assert all("; it must be " in r.message and "\n" not in r.message and len(r.message) < 200 for r in rejected)
    assert (cell.stdout, call.stdout, restarts, faults) == ("4\n", "4\n", {"session end": 1}, {})


ODD = [None, True, 1.5, "1", b"1", [], [1], {}, float("nan"), float("inf"), HUGE, 10**5000, -1, object(), Limits]


@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{value!r:.20}" if value is not ODD[11] else "huge")
def test_limits_and_configurations_hold_numbers_only_and_say_what_is_wrong(value: Any):
    for cls, section, kept in ((Limits, "limits", {}), (SandboxConfig, "sandbox", {})):
        for field in cls.__dataclass_fields__.values():
            if field.type not in KINDS or (is_a(value, field.type) and field.type in (str, bool)):
                continue
            if field.type is float and is_a(value, float) and value == 1.5:
                continue
            with pytest.raises(UserError) as caught:
                cls(**(kept | {field.name: value}))
            message = str(caught.value)
            assert message.startswith(f"{section}.{field.name} is ") and "; it must " in message
            assert "\n" not in message and len(message) < 200


def test_lists_of_a_configuration_hold_strings_only():
    for name in ("backend", "allowed_modules", "urls"):
        for value in (1, None, [1], [None], {"a": 1}, [b"x"]):
            with pytest.raises(UserError, match=f"sandbox.{name} is .*; it must be a list of strings"):
                SandboxConfig(**{name: value})
    with pytest.raises(UserError, match=r"sandbox\.limits is \{'wall_s': 1\}; it must be a Limits"):
        SandboxConfig(limits={"wall_s": 1})
