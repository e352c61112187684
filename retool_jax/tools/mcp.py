"""Tools of a server that speaks the Model Context Protocol: `tools=[python,mcp:URL]`, with the package `mcp`.

Names, descriptions and schemas are listed once, when the run is made. Each call has its own session, as each program
has a fresh interpreter. So no call depends on an earlier one, and a server may be restarted between calls.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from retool_jax.errors import UserError, one_line
from retool_jax.tools.arguments import is_readable
from retool_jax.tools.tool import Output, Tool

try:
    from mcp import Client, MCPError
    from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR, PARSE_ERROR, REQUEST_TIMEOUT, CallToolResult, ContentBlock
    from mcp_types import Tool as Listed
except ModuleNotFoundError as missing:
    raise UserError(
        f"tools=mcp:... needs {missing.name}; pip install 'retool_jax[mcp]', or leave it out of tools"
    ) from None

CONNECT_S = 30.0  # limit for connecting to a server and starting a session
# Errors that mean that the server or the connection is broken. Other errors are answers to the request.
_LOST = (CONNECTION_CLOSED, INTERNAL_ERROR, PARSE_ERROR, REQUEST_TIMEOUT)


class MCPTool(Tool):
    """One tool of a server. The policy reads all its answers, including refusals. If the server cannot be reached,
    closes the connection or fails itself, that is the machinery's fault."""

    def __init__(self, url: str, listed: Listed) -> None:
        self.url, self.name = url, listed.name
        self.description, self.parameters = listed.description or "", listed.input_schema

    async def call(self, arguments: dict[str, Any], state: None) -> Output:
        result = None
        try:
            async with asyncio.timeout(CONNECT_S) as clock, Client(self.url) as client:
                clock.reschedule(None)  # from here on the toolbox limits the time
                result = await client.call_tool(self.name, arguments)
        except Exception as error:  # of the network, of HTTP or of the server, often in a group
            cause = _first_error(error)
            if result is None:  # otherwise only the end of the session failed
                answered = isinstance(cause, MCPError) and cause.code not in _LOST
                reason = one_line(str(cause) or repr(cause))
                return Output(f"{self.name}: {reason}", "program" if answered else "machinery")
        return Output(_text_of(result), "program" if result.is_error else "none")


def tools_at(url: str) -> list[Tool]:
    """The tools that a server offers now.

    Raises:
        UserError: it cannot be reached, offers no tools, or has one with an unreadable schema; with the URL.
    """
    with ThreadPoolExecutor(1) as thread:  # the caller's thread may already run an event loop
        try:
            listed = thread.submit(asyncio.run, list_tools(url)).result()
        except Exception as error:  # as in a call
            cause = _first_error(error)
            reason = f"no answer in {CONNECT_S:g} s" if isinstance(cause, TimeoutError) else str(cause) or repr(cause)
            raise UserError(
                f"tools=mcp:{url} lists no tools ({one_line(reason)}); see that an MCP server answers there by"
                " streamable HTTP, or leave it out of tools"
            ) from None
    if unreadable := [tool.name for tool in listed if not is_readable(tool.input_schema)]:
        raise UserError(
            f"tools=mcp:{url} has a tool {unreadable[0]!r} whose arguments have no schema that can be read; mend it"
            " there, or leave the server out of tools"
        )
    if not listed:
        raise UserError(f"tools=mcp:{url} offers no tools; leave it out of tools")
    return [MCPTool(url, tool) for tool in listed]


async def list_tools(url: str) -> list[Listed]:
    """All pages of a server's list."""
    async with asyncio.timeout(CONNECT_S), Client(url) as client:
        page = await client.list_tools()
        found = [*page.tools]
        while page.next_cursor:
            page = await client.list_tools(cursor=page.next_cursor)
            found += page.tools
        return found


def _text_of(result: CallToolResult) -> str:
    """The text of a result, or its structured content as JSON if it has no parts."""
    parts = [_text_of_part(part) for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _text_of_part(part: ContentBlock) -> str:
    """The text of a part, or of the resource that it holds; the address of a linked one; else what it is."""
    text = getattr(getattr(part, "resource", part), "text", None)
    if text is None and part.type == "resource_link":
        text = str(part.uri)
    return f"[{part.type}, which is no text]" if text is None else text


def _first_error(error: BaseException) -> BaseException:
    """The first error in a group, also of nested groups; the package raises its errors in such groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
