"""The server, over real connections."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields, replace

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import Limits, SandboxConfig, open_sandbox
from retool_jax.sandbox.types import TOKEN_VARIABLE
from retool_jax.sandbox.words import read_words

from .programs import SLEEP, nap

aiohttp = pytest.importorskip("aiohttp", reason="these tests need aiohttp: pip install 'retool_jax[sandbox]'")
server = pytest.importorskip("retool_jax.sandbox.server", reason="the server needs retool_jax[sandbox]")

PROCESS = SandboxConfig(backend=("process",), slots=1, probe_s=0)


def with_client(serve, talk, *args, **kwargs):
    """The result of `talk(client, box)` with a server of these settings; answers are (status, body, headers)."""

    async def main():
        async with serve(*args, **kwargs) as (url, box), aiohttp.ClientSession(url) as session:

            async def client(path: str, body: object = None, headers: dict | None = None):
                data = json.dumps(body).encode() if isinstance(body, dict | list) else body
                method = "GET" if body is None else "POST"
                async with session.request(method, path, data=data, headers=headers) as response:
                    text = await response.text()
                    is_json = response.content_type == "application/json"
                    return response.status, json.loads(text) if is_json else text, response.headers

            return await talk(client, box)

    return asyncio.run(main())


def test_an_answer_is_not_held_back_until_its_head_is_acknowledged():
    with server.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_host_that_has_no_address_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"^cannot listen on 256\.0\.0\.1 port 0 \(.*\); choose another$") as caught:
        server.listen("256.0.0.1", 0)
    assert "Unknown error" not in str(caught.value)


def test_run_code_answers_as_sandbox_fusion_does(serve):
    async def talk(client, box):
        everything = {
            "compile_timeout": 5,
            "run_timeout": 0.5,
            "memory_limit_MB": 256,
            "code": "import sys\nopen('out', 'w').write(open('in/a').read() + sys.stdin.read())\nprint('done')\n3",
            "stdin": "+stdin",
            "language": "python",
            "files": {"in/a": base64.b64encode(b"file").decode(), "empty": None},
            "fetch_files": ["out", "missing"],
        }
        late = {"code": "print(1)\nwhile True: pass", "run_timeout": 0.3}
        bomb = {"code": "x = bytearray(300 << 20)", "memory_limit_MB": 100}
        large = {"code": "x = bytearray(300 << 20)", "memory_limit_MB": 1 << 20, "run_timeout": 1e9}
        bodies = [everything, late, {"code": "1 / 0"}, bomb, large, {"code": "print('\ud800')"}, {"code": "\0"}]
        return [await client("/run_code", {"language": "python"} | body) for body in bodies]

    answers = with_client(serve, talk)
    assert [status for status, _, _ in answers] == [200] * 7
    done, late, failed, bomb, large, surrogate, refused = (body for _, body, _ in answers)
    assert (done["status"], done["message"], done["compile_result"]) == ("Success", "", None)
    assert done["run_result"]["status"] == "Finished" and done["run_result"]["stdout"] == "done\n"
    assert done["files"] == {"out": base64.b64encode(b"file+stdin").decode()}
    run = late["run_result"]
    assert (late["status"], run["status"], run["return_code"], run["stdout"]) == (
        *("Failed", "TimeLimitExceeded", None, "1\n"),
    )
    assert (failed["status"], failed["run_result"]["return_code"]) == ("Failed", 1)
    assert failed["run_result"]["stderr"].endswith("ZeroDivisionError: division by zero\n")
    assert bomb["run_result"]["return_code"] == -9 and "MemoryError" in bomb["run_result"]["stderr"]
    assert large["status"] == "Success", "what is asked for beyond the ceiling is cut down to it"
    assert surrogate["status"] == "Failed" and "UnicodeEncodeError" in surrogate["run_result"]["stderr"]
    assert refused["status"] == "Failed" and "NUL" in refused["run_result"]["stderr"]


def test_malformed_bodies_are_422_and_too_large_ones_413(serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.remote.app.MAX_FRAME_BYTES", 1000)

    async def talk(client, box):
        bodies = [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 900, {"code": 1}, {"code": "1", "files": {"a": "*"}}]
        malformed = [await client("/run_code", body) for body in bodies]
        large = await client("/run_code", {"code": "#" * 1000})
        language = await client("/run_code", {"code": "1", "language": "cpp"})
        return malformed, large, language, await client("/run_code"), await client("/nowhere")

    malformed, large, language, get, nowhere = with_client(serve, talk)
    assert [status for status, _, _ in malformed] == [422] * 7
    assert all(body["detail"][0]["loc"][0] == "body" for _, body, _ in malformed)
    assert (large[0], get[0], nowhere[0]) == (413, 405, 404)
    assert (language[0], language[1]["status"], language[1]["run_result"]) == (200, "SandboxError", None)


def test_execute_answers_both_kinds_of_simple_servers(serve):
    async def talk(client, box):
        late = "print(1)\nwhile True: pass"
        return [
            await client("/execute", {"code": "print(2 + 2)", "language": "python"}),
            await client("/execute", {"code": late, "timeout": 0.3}),
            await client("/execute", {"generated_code": "print(input())", "std_input": "hi", "timeout": 5}),
            await client("/execute", {"generated_code": late, "timeout": 0.3}),
            await client("/execute", {"code": "1", "language": "bash"}),
            await client("/execute", {}),
        ]

    done, late, newer, newer_late, language, empty = with_client(serve, talk)
    assert (done[0], done[1]) == (200, {"stdout": "4\n", "stderr": "", "returncode": 0, "process_status": "completed"})
    assert (late[0], late[1]["error"], late[1]["stdout"]) == (408, "Timeout", "1\n")
    assert (newer[0], newer[1]["stdout"], newer[1]["process_status"]) == (200, "hi\n", "completed")
    assert (newer_late[0], newer_late[1]["process_status"]) == (200, "timeout")
    assert (language[0], empty[0]) == (400, 422)


def test_full_queue_is_503_with_retry_after_and_ping_and_metrics_still_answer(serve):
    async def talk(client, box):
        sleep = {"code": nap(1.5)}
        first, second = (asyncio.create_task(client("/run_code", sleep)) for _ in range(2))
        while box.gauges()["queue_length"] < 1:
            await asyncio.sleep(0.01)
        full, ping, metrics = await client("/run_code", sleep), await client("/v1/ping"), await client("/metrics")
        return full, ping, metrics, await first, await second

    full, ping, metrics, first, second = with_client(serve, talk, replace(PROCESS, queue_limit=1))
    assert (full[0], full[2]["Retry-After"], full[1]["status"]) == (503, "1", "SandboxError")
    assert (ping[0], ping[1]) == (200, "pong")
    assert metrics[0] == 200 and "retool_sandbox_slots_busy 1" in metrics[1]
    assert "retool_sandbox_queue_length 1" in metrics[1]
    assert first[0] == second[0] == 200


def test_a_client_that_leaves_takes_its_program_along(serve, descendants, alive):
    async def main() -> tuple[set[int], float]:
        async with serve() as (url, box):
            async with aiohttp.ClientSession() as session:
                call = asyncio.create_task(session.post(f"{url}/run_code", json={"code": SLEEP}))
                while not box.crew._lent:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                (member,) = box.crew._lent
                tree = {member.launched.pid} | descendants(member.launched.pid)
                call.cancel()
                await asyncio.wait([call])
            began = time.monotonic()
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{url}/run_code", json={"code": "print(1)"}) as after,
            ):
                assert (await after.json())["run_result"]["stdout"] == "1\n"
            return await asyncio.to_thread(alive, tree), time.monotonic() - began

    left, waited_s = asyncio.run(main())
    assert not left
    assert waited_s < 20


def test_a_token_keeps_others_out(serve):
    async def talk(client, box):
        body = {"code": "print(1)"}
        wrong = [None, {"Authorization": "Bearer"}, {"Authorization": "Bearer x"}, {"Authorization": "secret"}]
        refused = [await client("/run_code", body, headers) for headers in wrong]
        refused.append(await client("/execute", body))
        granted = await client("/run_code", body, {"Authorization": "Bearer secret"})
        return refused, granted, await client("/v1/ping")

    refused, granted, ping = with_client(serve, talk, token="secret")
    assert [status for status, _, _ in refused] == [401] * 5
    assert (granted[0], ping[0]) == (200, 200)


def test_pages_of_other_sites_run_nothing(serve):
    """A browser sends such a request without asking if its body is plain text."""

    async def talk(client, box):
        sites = ("cross-site", "same-site", "same-origin", "none")
        found = [await client("/run_code", {"code": "print(1)"}, {"Sec-Fetch-Site": site}) for site in sites]
        return [status for status, _, _ in found]

    assert with_client(serve, talk) == [403, 403, 200, 200]


def test_a_trainer_may_have_the_token_from_its_environment(serve, monkeypatch):
    async def main():
        async with serve(token="secret") as (url, _):
            config = SandboxConfig(backend=("remote",), urls=(url,), retries=0)
            with pytest.raises(UserError, match="no sandbox back-end"):
                async with open_sandbox(config):
                    pass
            monkeypatch.setenv(TOKEN_VARIABLE, "secret")
            async with open_sandbox(config) as box:
                return await box.run("print(1)")

    assert asyncio.run(main()).stdout == "1\n"


def test_forbidden_modules_cannot_be_allowed_by_a_request(serve):
    async def talk(client, box):
        asks = [[], ["math", "os"], ["os"]]
        bodies = [{"code": "import os", "retool": {"allowed_modules": ask}} for ask in asks]
        bodies.append({"code": "import math\nprint(math.gcd(4, 6))", "retool": {"allowed_modules": []}})
        return [await client("/run_code", body) for body in bodies]

    *refused, allowed = with_client(serve, talk, replace(PROCESS, allowed_modules=("math",)))
    assert [body["status"] for _, body, _ in refused] == ["Failed"] * 3
    assert allowed[1]["run_result"]["stdout"] == "2\n"


def start_server(*words: str, **environment: str) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "retool_jax.sandbox.server", "backend=process", "port=0", *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    for line in child.stdout:
        if line.startswith("serving on "):
            return child, line.split()[-1]
    raise AssertionError(f"the server ended with {child.wait()}")


def test_the_command_serves_drains_on_sigterm_and_leaves_nothing(descendants, alive):
    child, url = start_server("slots=1", RETOOL_SANDBOX_TOKEN="secret")
    try:
        assert url.startswith("http://127.0.0.1:")
        tree = descendants(child.pid)
        headers = {"Authorization": "Bearer secret"}
        body = json.dumps({"code": "import time\ntime.sleep(1)\nprint('done')"}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /run_code HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            time.sleep(0.4)
            child.send_signal(signal.SIGTERM)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert b"200 OK" in answer and b'"stdout":"done\\n"' in answer, "what ran when the signal came is answered"
        assert child.wait(20) == 0
        with pytest.raises(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{url}/v1/ping", headers=headers), timeout=2)
        assert not alive(tree)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def settings_of(*words: str):
    return server.settings(read_words(words, server.Options))


def test_the_command_line_becomes_the_configuration():
    words = "backend=gvisor,bubblewrap slots=2 slots=3 memory_mb=512 wall_s=5 modules=math,re"
    config, ceiling = settings_of(*words.split())
    assert (config.backend, config.slot_count, config.allowed_modules) == (("gvisor", "bubblewrap"), 3, ("math", "re"))
    assert (config.limits.memory_mb, config.limits.wall_s) == (512, 5)
    assert (ceiling.wall_s, ceiling.memory_mb) == (60, 512)
    assert settings_of()[0].limits == Limits()
    assert settings_of("host=", "token=a=b")[0].limits == Limits()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["max_wall_s=1"], "max_wall_s=1 is below wall_s=10; raise it"),
        (["max_wall_s=nan"], "limits.wall_s is nan; it must lie between"),
        (["slot=2"], "cannot read 'slot=2'; did you mean slots=...?"),
        (["--backend", "auto"], "cannot read '--backend'; did you mean backend=...?"),
        (["--drain-s=3"], "cannot read '--drain-s=3'; did you mean drain_s=...?"),
        (["zzz"], "cannot read 'zzz'; it takes backend, host, port, "),
        (["port"], "cannot read 'port'; did you mean port=...?"),
        (["port=http"], "port is 'http'; it must be a whole number"),
        (["port=70000"], "port is 70000; it must lie between 0 and 65535"),
        (["memory_mb=1.5"], "memory_mb is '1.5'; it must be a whole number"),
        (["wall_s="], "wall_s is ''; it must be a number"),
        (["drain_s=-1"], "drain_s is -1; it must lie between 0"),
        (["slots=-1"], "sandbox.slots is -1; it must lie between 0"),
    ],
)
def test_words_that_have_no_meaning_are_named(words: list[str], said: str):
    with pytest.raises(UserError) as caught:
        settings_of(*words)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_help_names_every_key_with_its_default(capsys: pytest.CaptureFixture[str]):
    server.main(["--help"])
    text = capsys.readouterr().out
    for words in ("/run_code", "backend=auto ", "host=127.0.0.1 ", "port=8080 ", "token= ", "RETOOL_SANDBOX_TOKEN"):
        assert words in text
    keys = [line.split("=")[0].strip() for line in text.splitlines() if line.startswith("    ") and "=" in line]
    assert keys == [field.name for field in fields(server.Options)]
    assert max(map(len, text.splitlines())) <= 110


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "retool_jax.sandbox.server", "backend=process", f"port={port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1 port {port} (Address already in use); ")
