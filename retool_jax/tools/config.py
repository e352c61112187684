"""Check the tools that a run names, without loading them."""

import re
from collections.abc import Sequence

from retool_jax.errors import UserError

NONE = "none"  # a run without tools: calls are plain text
INTERPRETERS = ("python", "python_session")
BUILT_IN = (*INTERPRETERS, "calculator")
MCP = "mcp:"  # before the URL of a server
_URL = re.compile(r"https?://[^\s/]+\S*")
_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")  # my_package.my_module:MyTool


def words_of(tools: str | Sequence[str]) -> tuple[str, ...]:
    """The entries of a config's `tools`, in order; empty for a run without tools."""
    words = (tools,) if isinstance(tools, str) else tuple(tools)
    return () if words == (NONE,) else words


def check_tools(tools: str | Sequence[str], grammar: str) -> None:
    """Refuse entries that cannot name a tool, and tools that the grammar cannot call.

    Raises:
        UserError: with the entry and possible fixes.
    """
    words = words_of(tools)
    if not words and tools != NONE and list(tools) != [NONE]:
        raise UserError(f"tools is empty; name at least one, for example tools=[python], or tools={NONE}")
    for word in words:
        if word.startswith(MCP):
            if not _URL.fullmatch(word.removeprefix(MCP)):
                raise UserError(f"tools={word} names no server; write {MCP}http://HOST:PORT/PATH")
        elif word not in BUILT_IN and not _OWN.fullmatch(word):
            known = ", ".join(dict.fromkeys(["python", NONE, *BUILT_IN]))
            alone = f"; {NONE} stands alone" if word == NONE else ""
            raise UserError(f"tools={word} is not one of: {known}, or my_package.my_module:MyTool{alone}")
    if len(set(words)) < len(words) or set(INTERPRETERS) <= set(words):
        raise UserError(f"tools=[{','.join(words)}] names a tool twice; leave one out")
    if grammar == "retool" and (others := [word for word in words if word not in INTERPRETERS]):
        raise UserError(
            f"the grammar retool has one tool, the interpreter, and tools names {', '.join(others)}; set the grammar to"
            " hermes, or tools=python"
        )
