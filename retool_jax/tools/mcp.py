"""Tools of a server that speaks the Model Context Protocol: `tools=[python,mcp:URL]`, with the package `mcp`.

Names, descriptions and schemas are listed once, when the run is made. Each call is a session of its own, as each
program has a fresh interpreter: no call depends on an earlier one, and a server that was started again is found again.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from retool_jax.errors import UserError, one_line
from retool_jax.tools.arguments import TYPES
from retool_jax.tools.tool import Output, Tool

try:
    from mcp import Client, MCPError
    from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR, PARSE_ERROR, REQUEST_TIMEOUT, CallToolResult
    from mcp_types import Tool as Listed
except ModuleNotFoundError as missing:
    raise UserError(
        f"tools=mcp:... needs {missing.name}; pip install 'retool_jax[mcp]', or leave it out of tools"
    ) from None

CONNECT_S = 30.0  # to find a server, and to begin a session
# Errors that say that the server, or the way to it, is broken. Other errors are answers to what was asked.
_LOST = (CONNECTION_CLOSED, INTERNAL_ERROR, PARSE_ERROR, REQUEST_TIMEOUT)


class MCPTool(Tool):
    """One tool of a server. What it answers, refusals among them, is told to the policy; a server that cannot be
    reached, breaks off or fails by itself is a fault of the machinery."""

    def __init__(self, url: str, listed: Listed) -> None:
        self.url, self.name = url, listed.name
        self.description, self.parameters = listed.description or "", listed.input_schema

    async def call(self, arguments: dict[str, Any], state: None) -> Output:
        result = None
        try:
            async with asyncio.timeout(CONNECT_S) as clock, Client(self.url) as client:
                clock.reschedule(None)  # from here on it is the call's time, which the toolbox has
                result = await client.call_tool(self.name, arguments)
        except Exception as error:  # of the network, of HTTP or of the server, often in a group
            cause = _innermost(error)
            if result is None:  # the rest is a session that did not end well
                answered = isinstance(cause, MCPError) and cause.code not in _LOST
                reason = one_line(str(cause) or repr(cause))
                return Output(f"{self.name}: {reason}", "program" if answered else "machinery")
        return Output(_text_of(result), "program" if result.is_error else "none")


def tools_at(url: str) -> list[Tool]:
    """The tools that a server offers now.

    Raises:
        UserError: it cannot be reached, offers none, or one whose schema cannot be read; with the URL.
    """
    with ThreadPoolExecutor(1) as thread:  # whoever asks may be on an event loop
        try:
            listed = thread.submit(asyncio.run, _listed(url)).result()
        except Exception as error:  # as in a call
            cause = _innermost(error)
            reason = f"no answer in {CONNECT_S:g} s" if isinstance(cause, TimeoutError) else str(cause) or repr(cause)
            raise UserError(
                f"tools=mcp:{url} lists no tools ({one_line(reason)}); see that an MCP server answers there by"
                " streamable HTTP, or leave it out of tools"
            ) from None
    if unreadable := [tool.name for tool in listed if not _readable(tool.input_schema)]:
        raise UserError(
            f"tools=mcp:{url} has a tool {unreadable[0]!r} whose arguments have no schema that can be read; mend it"
            " there, or leave the server out of tools"
        )
    if not listed:
        raise UserError(f"tools=mcp:{url} offers no tools; leave it out of tools")
    return [MCPTool(url, tool) for tool in listed]


async def _listed(url: str) -> list[Listed]:
    async with asyncio.timeout(CONNECT_S), Client(url) as client:
        page = await client.list_tools()
        found = [*page.tools]
        while page.next_cursor:
            page = await client.list_tools(cursor=page.next_cursor)
            found += page.tools
        return found


def _text_of(result: CallToolResult) -> str:
    """What a policy can read of an answer: its texts, or the data that stand for them."""
    parts = [getattr(part, "text", None) or f"[{part.type}, which is no text]" for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _readable(schema: object) -> bool:
    """Whether arguments can be compared with a schema (`arguments.fault_of`)."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    forms = {"enum": list, "required": list, "properties": dict, "minimum": int | float, "maximum": int | float}
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
        return False
    if not all(isinstance(schema[key], form) for key, form in forms.items() if key in schema):
        return False
    inside = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return all(map(_readable, inside))


def _innermost(error: BaseException) -> BaseException:
    """The first error of a group, which is how the package's tasks tell theirs."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
