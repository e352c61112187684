"""The client, with our own server and with servers that misbehave in every way that ours does not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import Limits, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.remote.fusion import write_result

from ..programs import SLEEP

pytest.importorskip("aiohttp", reason="the remote back-end needs aiohttp: pip install 'retool_jax[sandbox]'")

PROCESS = SandboxConfig(backend=("process",), slots=2, probe_s=0)


def remote(*urls: str, **config) -> SandboxConfig:
    return SandboxConfig(backend=("remote",), urls=urls, **config)


def answer(body: object, status: str = "200 OK", head: str = "") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\n{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def foreign(stdout: str, status: str = "Success", code: int = 0) -> dict:
    run = {"status": "Finished", "execution_time": 0.1, "return_code": code, "stdout": stdout, "stderr": ""}
    return {"status": status, "message": "", "compile_result": None, "run_result": run, "files": {}}


OURS = write_result(ToolResult("success", stdout="x"))


@asynccontextmanager
async def fake_server(reply: Callable[[dict, int], bytes | None]) -> AsyncIterator[tuple[str, list[dict]]]:
    """Another project's Sandbox Fusion server: `reply(request, number)` makes each answer; None: it never answers."""
    seen: list[dict] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if head.startswith(b"GET /v1/ping"):
                    writer.write(answer("pong"))
                    continue
                length = next(int(l.split(b":")[1]) for l in head.split(b"\r\n") if l.lower().startswith(b"content-le"))
                body = json.loads(await reader.readexactly(length))
                first = body["code"] == "print(2 + 2)"  # the client's own test of the server
                if not first:
                    seen.append(body)
                data = answer(foreign("4\n")) if first else reply(body, len(seen))
                if data is None:
                    await asyncio.sleep(3600)
                writer.write(data)
                if b"CUT" in data:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()


def against(*replies: Callable[[dict, int], bytes | None], calls: int = 1, **config):
    """The results of some calls, and the requests that each fake server got."""

    async def main() -> tuple[list[ToolResult], list[list[dict]]]:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(fake_server(reply)) for reply in replies]
            box = await stack.enter_async_context(open_sandbox(remote(*(url for url, _ in servers), **config)))
            results = [await box.run(f"print({i})") for i in range(calls)]
            return results, [seen for _, seen in servers]

    return asyncio.run(main())


def works(body: dict, number: int) -> bytes:
    return answer(foreign("fine\n"))


def test_our_own_server_gives_the_very_results_of_the_sandbox_behind_it(serve):
    programs = [
        ("print(2 + 2)\n6 * 7", {}),
        ("1 / 0", {}),
        ("print('a', flush=True)\nwhile True: pass", {"limits": Limits(wall_s=0.5)}),
        ("x = bytearray(800 << 20)", {"limits": Limits(memory_mb=256)}),
        ("while True: print('x' * 1000)", {"limits": Limits(raw_output_bytes=100_000)}),
        ("print('y' * 5000)", {"limits": Limits(output_bytes=1000)}),
        ("import os\nos.kill(os.getpid(), 11)", {}),
        ("import sys\nopen('o', 'wb').write(open('i', 'rb').read() + sys.stdin.buffer.read())",
         {"stdin": "é", "files": {"i": b"\xff"}, "fetch": ["o", "no"]}),
        ("print('\ud800')", {}),
        ("\0", {}),
    ]  # fmt: skip

    async def main() -> list[tuple[ToolResult, ToolResult]]:
        async with serve(PROCESS) as (url, box), open_sandbox(remote(url)) as client:
            return [(await box.run(code, **given), await client.run(code, **given)) for code, given in programs]

    for here, there in asyncio.run(main()):
        assert there.backend in ("remote/process", "remote")
        clock = {"wall_s": 0, "cpu_s": 0, "queue_s": 0, "peak_rss_mb": 0, "backend": ""}
        if here.status == "output_limit":  # how much was written before the stop is random
            clock |= {"stdout": "", "stdout_bytes": 0}
        assert replace(there, **clock) == replace(here, **clock)


def test_calls_are_spread_and_cancelling_one_kills_its_program(serve, descendants, alive):
    async def main() -> tuple[dict, set[int]]:
        async with serve(PROCESS) as (one, first), serve(PROCESS) as (two, second):
            async with open_sandbox(remote(one, two)) as client:
                results = await asyncio.gather(*(client.run("import time\ntime.sleep(0.2)") for _ in range(8)))
                assert all(r.status == "success" for r in results)
                served = {box: box.metrics.calls["success"] for box in (first, second)}
                call = asyncio.create_task(client.run(SLEEP))
                while not (first.crew._lent or second.crew._lent):
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                (member,) = first.crew._lent or second.crew._lent
                tree = {member.launched.pid} | descendants(member.launched.pid)
                call.cancel()
                await asyncio.wait([call])
                left = await asyncio.to_thread(alive, tree)
            return served, left

    served, left = asyncio.run(main())
    assert min(served.values()) >= 4
    assert not left


def test_servers_of_others_are_asked_in_their_own_words():
    (result,), ((request,),) = against(works)
    assert (result.status, result.stdout, result.attempts, result.backend) == ("success", "fine\n", 1, "remote")
    assert (request["language"], request["run_timeout"], request["memory_limit_MB"]) == ("python", 10.0, 1024)


@pytest.mark.parametrize(
    "wrong",
    [
        answer("no", "502 Bad Gateway"),
        answer("no", "504 Gateway Timeout"),
        answer("no", "500 Internal Server Error"),
        answer({"status": "SandboxError", "message": "docker"}),
        answer(b"not json"),
        answer({}),
        answer(b"[" * 100_000),
        answer(foreign("x", code="0")),
        answer(foreign(["x"])),
        answer(OURS | {"retool": OURS["retool"] | {"status": "fine"}}),
        answer(OURS | {"retool": OURS["retool"] | {"wall_s": "1"}}),
        answer(OURS | {"retool": OURS["retool"] | {"queue_s": float("nan")}}),
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nCUT",
    ],
)
def test_faults_of_a_server_are_retried_and_then_raised(wrong: bytes):
    (result,), _ = against(lambda _, number: wrong if number == 1 else works(_, number))
    assert (result.status, result.stdout, result.attempts) == ("success", "fine\n", 2)
    (result,), ((*requests,),) = against(lambda *_: wrong, retries=1)
    assert (result.status, result.attempts, len(requests)) == ("infra_error", 2, 2)


def test_faults_of_a_program_are_never_retried():
    (result,), (requests,) = against(lambda *_: answer(foreign("", "Failed", 1)))
    assert (result.status, result.attempts, len(requests)) == ("user_error", 1, 1)


def test_a_refused_token_is_told_at_once():
    (result,), (requests,) = against(lambda *_: answer({"detail": "token"}, "401 Unauthorized"))
    assert (result.status, len(requests)) == ("infra_error", 1)
    assert "HTTP 401" in result.message


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Content Too Large", "422 Unprocessable Content"])
def test_what_a_server_refuses_for_what_it_holds_is_rejected(status: str):
    """The server worked before; a policy that could make it refuse could choose to be dropped."""
    (result,), (requests,) = against(lambda *_: answer({"detail": "a lone\nsurrogate"}, status))
    assert (result.status, result.backend, len(requests)) == ("rejected", "remote", 1)
    assert f"HTTP {status[:3]}" in result.message and "\n" not in result.message


def test_a_full_server_is_asked_again_until_the_queue_time_is_over():
    full = answer({}, "503 Service Unavailable", "Retry-After: 0\r\n")
    (result,), (requests,) = against(lambda _, number: full if number < 6 else works(_, number), retries=0)
    assert (result.status, result.attempts, len(requests)) == ("success", 1, 6)
    (result,), _ = against(lambda *_: full, retries=0, queue_s=0.3)
    assert result.status == "infra_error" and result.message.startswith("overloaded")
    assert 0.3 <= result.queue_s < 5


def test_a_broken_server_is_left_alone():
    results, (broken, good) = against(lambda *_: answer("no", "500 Internal Server Error"), works, calls=20)
    assert all(r.status == "success" for r in results)
    assert len(broken) <= 4 and len(good) == 20


def test_calls_at_a_server_that_fell_silent_go_elsewhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.remote.client.PING_S", 0.1)
    silent = False

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A machine that accepts everything and, after it is gone, answers nothing."""
        while data := await reader.read(65536):
            if not silent and data.startswith(b"GET"):
                writer.write(answer("pong"))
            elif b"print(2 + 2)" in data:
                writer.write(answer(foreign("4\n")))
        writer.close()

    async def main() -> ToolResult:
        nonlocal silent
        server = await asyncio.start_server(swallow, "127.0.0.1", 0)
        gone = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with fake_server(works) as (url, _), open_sandbox(remote(url, gone)) as box:
            bad, good = box._endpoints[1], box._endpoints[0]
            good.busy_until = time.monotonic() + 1  # so that the call begins at the other server
            bad.failures = 0
            call = asyncio.create_task(box.run("print(1)"))
            await asyncio.sleep(0.2)
            assert bad.calls
            silent = True
            result = await asyncio.wait_for(call, 10)
        server.close()
        return result

    result = asyncio.run(main())
    assert (result.status, result.stdout, result.attempts) == ("success", "fine\n", 2)


def test_nobody_there_and_no_urls_are_said():
    async def main(config: SandboxConfig) -> None:
        async with open_sandbox(config):
            pass

    with pytest.raises(UserError, match=r"none of http://127.0.0.1:1 answers .*retool_jax.sandbox.server"):
        asyncio.run(main(remote("http://127.0.0.1:1")))
    with pytest.raises(UserError, match=r"set sandbox\.urls"):
        asyncio.run(main(remote()))


def test_closing_answers_open_calls():
    async def main() -> ToolResult:
        async with fake_server(lambda *_: None) as (url, seen):
            async with open_sandbox(remote(url)) as box:
                call = asyncio.create_task(box.run("print(1)"))
                while not seen:
                    await asyncio.sleep(0.01)
                with pytest.raises(UserError, match="sessions need"):
                    box.session()
            return await call

    assert asyncio.run(main()).status == "cancelled"
