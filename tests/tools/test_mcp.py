"""Tools of an MCP server, made with the same package, over HTTP."""

import asyncio
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from retool_jax.errors import UserError
from retool_jax.tokens.grammar import ToolCall
from retool_jax.tools import Output
from retool_jax.tools.config import check_tools
from retool_jax.tools.toolbox import Toolbox, ToolStates, load_tools

WAIT_S = 60


@contextmanager
def running(server: object) -> Iterator[str]:
    """The URL of a server that runs in a thread."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = server.streamable_http_app()
        web = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"
        finally:
            web.should_exit = True
            thread.join(WAIT_S)


@pytest.fixture(scope="module")
def mcp_server() -> object:
    pytest.importorskip("mcp", reason="tools of MCP servers need mcp: pip install 'retool_jax[mcp]'")
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import EmbeddedResource, ImageContent, ResourceLink, TextContent, TextResourceContents

    server = MCPServer("test", log_level="CRITICAL")

    @server.tool()
    def add(a: int, b: int = 3) -> int:
        """Add two numbers."""
        return a + b

    @server.tool()
    def refuse(name: str | None = None) -> str:
        raise ToolError(f"no {name} here")

    @server.tool()
    async def wait() -> str:
        await asyncio.sleep(WAIT_S)
        return "late"

    @server.tool(structured_output=False)
    def read() -> list:
        found = TextResourceContents(uri="note://1", text="a = 3")
        linked = ResourceLink(name="more", uri="note://2")
        image = ImageContent(data="", mime_type="image/png")
        return [TextContent(text=""), EmbeddedResource(resource=found), linked, image]

    return server


@pytest.fixture(scope="module")
def url(mcp_server) -> Iterator[str]:
    with running(mcp_server) as address:
        yield address


def run(tools: Toolbox, *calls: ToolCall) -> list[Output]:
    async def main() -> list[Output]:
        states = ToolStates()
        outputs = [await tools.run(call, states) for call in calls]
        await states.close()
        return outputs

    return asyncio.run(main())


def test_names_and_schemas_are_listed_and_calls_are_answered(url):
    async def load() -> Toolbox:  # as a run does, on its event loop
        return load_tools(["calculator", f"mcp:{url}"])

    tools = asyncio.run(load())
    assert tools.names == ("calculator", "add", "refuse", "wait", "read")
    add = tools.schemas[1]["function"]
    assert add["description"] == "Add two numbers." and add["parameters"]["required"] == ["a"]
    calls = [("add", {"a": 4}), ("add", {"a": 4, "b": -4, "c": 5}), ("add", {"a": "four"}), ("add", {"b": 1})]
    outputs = run(tools, *(ToolCall(*call) for call in [*calls, ("refuse", {"name": "fish"}), ("subtract", {})]))
    assert [output.fault for output in outputs] == ["none", "none", *["program"] * 4]
    assert [output.text for output in outputs[:2]] == ["7", "0"]
    assert outputs[2].text == 'malformed call: arguments must be {"a": 0, "b"?: 0}; a must be a whole number'
    assert outputs[4].text.endswith("no fish here") and outputs[5].text.startswith("unknown tool 'subtract'")


def test_each_part_of_an_answer_is_a_line(url):
    (output,) = run(load_tools(f"mcp:{url}"), ToolCall("read", {}))
    assert output.text.split("\n") == ["", "a = 3", "note://2", "[image, which is no text]"]


def test_a_call_that_takes_too_long_is_ended_as_any_other(url):
    tools = load_tools(f"mcp:{url}")
    tools.tools["wait"].limit_s = 0.3
    (output,) = run(tools, ToolCall("wait", {}))
    assert (output.status, output.text) == ("timeout", "[stopped: wait took more than 0.3 s]")


def test_a_server_that_went_away_is_the_machinerys_fault_and_found_when_it_is_back(mcp_server, url):
    from mcp.server import MCPServer

    server = MCPServer("other", log_level="CRITICAL")
    server.tool(name="add")(lambda: "")
    with running(server) as address:
        tools = load_tools(f"mcp:{address}")
    add = tools.tools["add"]
    add.retries = 0
    (output,) = run(tools, ToolCall("add", {}))
    assert output.fault == "machinery" and output.text.startswith("add: ")
    add.url = url  # another server, whose tool needs arguments
    refused, answered = run(tools, ToolCall("add", {}), ToolCall("add", {"a": 1}))
    assert refused.fault == "program" and "error" in refused.text.lower()
    assert (answered.fault, answered.text) == ("none", "4")


def test_a_server_that_does_not_answer_is_told_with_its_url(url, mcp_server):
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/mcp"
    for address in (closed, url.replace("/mcp", "/elsewhere")):
        with pytest.raises(UserError) as caught:
            load_tools(["python", f"mcp:{address}"])
        assert f"tools=mcp:{address} lists no tools (" in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_without_tools_and_one_with_strange_schemas_are_told(mcp_server, monkeypatch):
    from mcp.server import MCPServer
    from mcp_types import Tool

    from retool_jax.tools import mcp

    with (
        running(MCPServer("empty", log_level="CRITICAL")) as address,
        pytest.raises(UserError, match="offers no tools"),
    ):
        load_tools(f"mcp:{address}")

    def listing(schema: object) -> None:
        async def listed(_: str) -> list[Tool]:
            return [Tool(name="odd", input_schema=schema)]

        monkeypatch.setattr(mcp, "list_tools", listed)

    inside = ({"type": "money"}, {"type": [1]}, {"enum": 3}, True, {"items": [1]}, {"minimum": "1"})
    for odd in ({"properties": []}, *({"type": "object", "properties": {"x": one}} for one in inside)):
        listing(odd)
        with pytest.raises(UserError, match="has a tool 'odd' whose arguments have no schema that can be read"):
            mcp.tools_at("http://x")
    listing({"type": "object", "properties": {"x": {"anyOf": [{"type": "null"}]}, "y": {"type": ["string", "null"]}}})
    assert [tool.name for tool in mcp.tools_at("http://x")] == ["odd"]


def test_words_that_name_no_server_are_told():
    check_tools(["python", "mcp:http://localhost:8000/mcp", "mcp:https://example.org"], "hermes")
    for word in ("mcp:", "mcp:localhost:8000", "mcp:ftp://x", "mcp:http:///x", "mcp:tools"):
        with pytest.raises(UserError, match=rf"tools={word} names no server; write mcp:http://HOST:PORT/PATH"):
            check_tools(word, "hermes")
    with pytest.raises(UserError, match="the grammar retool has one tool"):
        check_tools("mcp:http://x", "retool")


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "retool_jax.tools.mcp", raising=False)
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UserError, match=r"needs mcp; pip install 'retool_jax\[mcp\]'"):
        load_tools("mcp:http://x")
