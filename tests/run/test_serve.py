"""How a server ends: open requests are finished, new ones are refused."""

import asyncio
import os
import signal
import socket

import pytest

from retool_jax.engine.scheduler import Service
from retool_jax.rollout.config import RolloutConfig
from retool_jax.sandbox import SandboxConfig
from retool_jax.serving.config import ServeConfig
from retool_jax.tokens.grammar import policy_turn_text
from retool_jax.tools.toolbox import load_tools


def test_a_signal_ends_a_server_when_its_answers_have_ended(scripted_engine, tokenizer):
    pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'retool_jax[serve]'")
    aiohttp = pytest.importorskip("aiohttp", reason="the client needs aiohttp: pip install 'retool_jax[sandbox]'")
    from retool_jax.run.serve import serve_until_stopped
    from retool_jax.serving.server import Server

    function = {"name": "code_interpreter", "arguments": {"code": "import time\ntime.sleep(1)\nprint(6)"}}
    turns = [policy_turn_text({"tool_calls": [{"function": function}]}), "So 6.<|im_end|>"]
    script = {7: [tokenizer.encode(turn) for turn in turns]}
    engine = scripted_engine(tokenizer.stop_ids, script, max_length=2000, tool_lag=-1)
    rollout = RolloutConfig(max_prompt_tokens=1000)

    async def main() -> str:
        tools = load_tools("python")
        async with tools.open(SandboxConfig(backend=("process",), slots=1, probe_s=0)), Service(engine) as service:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                server = Server(service, tokenizer, tools, rollout, ServeConfig(), "tiny")
                serving = asyncio.create_task(serve_until_stopped(server, listener))
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
                async with aiohttp.ClientSession() as session:
                    asked = {"messages": [{"role": "user", "content": "6?"}], "seed": 7}
                    answer = asyncio.create_task(session.post(url, json=asked).__aenter__())
                    async with asyncio.timeout(120):
                        while not tools.sandbox.gauges()["slots_busy"]:
                            await asyncio.sleep(0.005)
                    os.kill(os.getpid(), signal.SIGTERM)
                    while not server.closing:
                        await asyncio.sleep(0.005)
                    try:
                        async with session.post(url, json=asked) as refused:
                            assert refused.status == 503
                    except aiohttp.ClientConnectionError:
                        pass  # it does not listen any more
                    response = await answer
                    said = (await response.json())["choices"][0]["message"]["content"]
                    response.release()
                await serving
                return said

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert asyncio.run(main()) == "So 6."
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
