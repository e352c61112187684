"""A server in the test's event loop, and a client of it."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from retool_jax.engine.scheduler import Service
from retool_jax.rollout.config import RolloutConfig
from retool_jax.sandbox import Limits, SandboxConfig
from retool_jax.serving.config import ServeConfig
from retool_jax.tokens.grammar import GRAMMARS, policy_turn_text
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox, load_tools

WAIT_S = 120
LIMITS = RolloutConfig(max_prompt_tokens=2000, max_turns=4)


class Client:
    """An open server with a client: `server` is the object behind it."""

    def __init__(self, session: Any, server: Any, port: int) -> None:
        self.session, self.server, self.port = session, server, port

    async def ask(self, body: dict, path: str = "/v1/chat/completions", status: int = 200, **options: Any) -> dict:
        """The answer to a request that does not stream."""
        async with self.session.post(path, json=body, **options) as response:
            answer = await response.json(content_type=None)
            assert response.status == status, answer
            return answer

    async def get(self, path: str, status: int = 200) -> Any:
        async with self.session.get(path) as response:
            assert response.status == status, await response.text()
            return await (response.json() if "json" in response.content_type else response.text())

    async def stream(self, body: dict, path: str = "/v1/chat/completions") -> list[dict]:
        """The events of a streamed request, up to the last, which must be [DONE]."""
        async with self.session.post(path, json=body | {"stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            lines = (await response.text()).split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        events = [dict(line.split(": ", 1) for line in text.split("\n")) for text in lines[:-2]]
        assert all(json.loads(each["data"]).get("type", "") == each.get("event", "") for each in events)
        return [json.loads(each["data"]) for each in events]

    async def becomes(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.005)


@pytest.fixture
def serve(tokenizer):
    """`async with serve(engine, tools=["python"], rollout=..., token="", **config) as client`."""
    uvicorn = pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'retool_jax[serve]'")
    aiohttp = pytest.importorskip("aiohttp", reason="the client needs aiohttp: pip install 'retool_jax[sandbox]'")
    from retool_jax.serving.app import build_app
    from retool_jax.serving.server import Server

    @asynccontextmanager
    async def start(
        engine: Any,
        tools: list[str] | Toolbox | None = None,
        rollout: RolloutConfig = LIMITS,
        token: str = "",
        words: Tokenizer = tokenizer,
        **config: Any,
    ) -> AsyncIterator[Client]:
        box = load_tools(tools) if isinstance(tools, list) else tools
        async with contextlib.AsyncExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            if box:
                # A program that nobody stops outlives what a test waits for.
                limits = Limits(wall_s=2.0 * WAIT_S)
                sandbox = SandboxConfig(backend=("process",), slots=1, probe_s=0, limits=limits)
                await stack.enter_async_context(box.open(sandbox))
            service = await stack.enter_async_context(Service(engine))
            server = Server(service, words, box, rollout, ServeConfig(**config), "tiny")
            web = uvicorn.Server(uvicorn.Config(build_app(server, token), log_level="warning", lifespan="off"))
            serving = asyncio.create_task(web.serve(sockets=[listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            try:
                connector = aiohttp.TCPConnector(limit=0)
                async with aiohttp.ClientSession(url, connector=connector) as session:
                    yield Client(session, server, listener.getsockname()[1])
            finally:
                web.should_exit = True
                await serving

    return start


@pytest.fixture
def scripted(scripted_engine, tokenizer):
    """`scripted({seed: [turns]}, grammar="hermes")`: an engine that draws these texts, some tokens at a time."""

    def make(script: dict[int, list[str]], grammar: str = "hermes", **sizes: Any) -> Any:
        ids = {request: [tokenizer.encode(turn) for turn in turns] for request, turns in script.items()}
        sizes = {"slots": 4, "max_length": 4000, "decode_steps": 3, "tool_lag": -1} | sizes
        return scripted_engine(GRAMMARS[grammar].stop_ids(tokenizer), ids, **sizes)

    return make


def call_turn(*calls: tuple[str, dict], content: str = "Let me see.") -> str:
    """The text of a turn that calls tools."""
    listed = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return policy_turn_text({"content": content, "tool_calls": listed})


def python(code: str) -> str:
    """The text of a turn that runs a program."""
    return call_turn(("code_interpreter", {"code": code}))
