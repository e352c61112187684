"""Our server, called by the SDK that other trainers use and by the standard library's HTTP client."""

import asyncio
import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

fusion = pytest.importorskip("sandbox_fusion", reason="the SDK is not installed: pip install sandbox-fusion==0.3.7")


def with_server(serve, talk: Callable[[str], Any]) -> Any:
    async def main() -> Any:
        async with serve() as (url, _):
            return await asyncio.to_thread(talk, url)

    return asyncio.run(main())


def test_the_sdk_runs_code(serve):
    def talk(url: str) -> list:
        def ask(**fields: object):
            return fusion.run_code(fusion.RunCodeRequest(language="python", **fields), endpoint=url, client_timeout=30)

        return [
            ask(code="print(input())", stdin="hello"),
            ask(code="print(1)\nwhile True: pass", run_timeout=0.3),
            ask(code="raise ValueError(7)"),
            ask(
                code="open('b', 'w').write(open('a').read() * 2)",
                files={"a": base64.b64encode(b"xy").decode()},
                fetch_files=["b"],
            ),
        ]

    done, late, failed, files = with_server(serve, talk)
    assert (done.status, done.run_result.stdout) == (fusion.RunStatus.Success, "hello\n")
    mapping = fusion.SummaryMapping(Success="ok", Failed="failed", RunTimeout="late", RunFailed="error")
    summaries = [fusion.summary_run_code_result(result, mapping) for result in (done, late, failed, files)]
    assert summaries == ["ok", "late", "error", "ok"]
    assert late.run_result.stdout == "1\n"
    assert "ValueError: 7" in failed.run_result.stderr
    assert base64.b64decode(files.files["b"]) == b"xyxy"


def test_the_sdk_is_told_of_languages_that_are_not_served(serve):
    def talk(url: str) -> str:
        request = fusion.RunCodeRequest(language="cpp", code="int main() {}")
        with pytest.raises(Exception, match="language 'cpp' is not served") as caught:
            fusion.run_code(request, endpoint=url, max_attempts=1)
        return str(caught.value)

    assert "Sandbox responded with error" in with_server(serve, talk)


def test_the_async_sdk_runs_many_at_once(serve):
    async def main() -> list:
        async with serve() as (url, _):
            request = fusion.RunCodeRequest(language="python", code="print(6 * 7)")
            return await asyncio.gather(*(fusion.run_code_async(request, endpoint=url) for _ in range(20)))

    assert [result.run_result.stdout for result in asyncio.run(main())] == ["42\n"] * 20


def test_a_plain_http_client_is_enough(serve):
    def talk(url: str) -> tuple[dict, int]:
        body = json.dumps({"code": "print(2 ** 10)", "language": "python"}).encode()
        with urllib.request.urlopen(f"{url}/run_code", body, timeout=30) as response:
            done = json.load(response)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/run_code", b"nonsense", timeout=30)
        return done, refused.value.code

    done, code = with_server(serve, talk)
    assert (done["run_result"]["stdout"], code) == ("1024\n", 422)
