"""The tools of a run: loading them by name, showing them in prompts, and answering every call with text."""

import asyncio
import errno
import logging
import math
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib import import_module
from typing import Any

from retool_jax.errors import UserError
from retool_jax.sandbox import Sandbox, SandboxConfig, open_sandbox
from retool_jax.sandbox.types import shown
from retool_jax.tokens.grammar import ToolCall
from retool_jax.tools.arguments import declared, fault_of
from retool_jax.tools.calculator import Calculator
from retool_jax.tools.config import MCP, words_of
from retool_jax.tools.python import Python
from retool_jax.tools.tool import Output, Tool, as_tool

logger = logging.getLogger(__name__)

INVALID = "invalid_call"  # the status of a call of an unknown tool, or with arguments that do not fit
PAUSES_S = (0.5, 2.0)  # before each retry of a call that the machinery lost; later retries wait for the last one
CLOSE_S = 60.0  # limit for closing the states of one trajectory or call; then closing is given up
# Errors about a path, which the policy may have written. Other `OSError`s are faults of the machinery.
_PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_PATH_CODES = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTEMPTY, errno.EROFS)
_BUILT_IN: dict[str, Callable[[], Tool]] = {
    "python": Python,
    "python_session": partial(Python, lifetime="trajectory"),
    "calculator": Calculator,
}


class ToolStates:
    """The tools' states of one trajectory or one call. A tool's first call opens its state; all are closed together."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._states: dict[str, Any] = {}
        self._lock = asyncio.Lock()  # so that a cancelled call ends before its state is closed
        self._closing: asyncio.Task | None = None

    async def call(self, tool: Tool, arguments: dict[str, Any]) -> Output:
        async with self._lock:
            if tool.name not in self._states:
                self._states[tool.name] = await _open(tool, self._stack)
            return await _call(tool, arguments, self._states[tool.name])

    def begin_to_close(self) -> None:
        """Start closing the states in the background, since other trajectories may wait for them."""
        if self._states and self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())

    async def close(self) -> None:
        """Close the states and wait for it. Errors are only logged."""
        await (self._closing or self._close())

    async def _close(self) -> None:
        async with self._lock:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._stack.aclose()
            except Exception as error:  # from a tool's own code; the calls were answered before
                logger.warning("a tool's state could not be closed (%r)", error)


class Toolbox:
    """Tools by the names with which a policy calls them.

    Args:
        tools: in the order in which prompts show them.

    Raises:
        UserError: two of them have the same name.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools = {}
        self._run_states: dict[str, Any] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise UserError(f"two tools are called {tool.name}; leave one out, or rename it")
            self.tools[tool.name] = tool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tools)

    @property
    def schemas(self) -> list[dict]:
        """The tools' schemas, as prompts show them."""
        return [tool.schema for tool in self.tools.values()]

    @property
    def sandbox(self) -> Sandbox | None:
        """The open sandbox in which tools run programs; None if there is none."""
        return next((tool.box for tool in self.tools.values() if tool.box is not None), None)

    @property
    def at_once(self) -> int:
        """How many calls may run at the same time; 0 for any number."""
        return min((tool.at_once for tool in self.tools.values() if tool.at_once), default=0)

    def subset(self, names: Sequence[str] | None, where: str) -> "Toolbox":
        """The tools that a problem names, in its order, with the states of this run; all tools for None.

        Raises:
            UserError: there is no such tool; `where` says who named it.
        """
        if names is None:
            return self
        words = {word: make().name for word, make in _BUILT_IN.items()} | {name: name for name in self.tools}
        if unknown := [name for name in names if words.get(name) not in self.tools]:
            raise UserError(
                f"{where} names the tool {unknown[0]!r}, and this run has {', '.join(self.tools)}; add it to tools, or"
                " leave it out there"
            )
        chosen = Toolbox(self.tools[words[name]] for name in dict.fromkeys(names))
        chosen._run_states = self._run_states
        return chosen

    @asynccontextmanager
    async def open(self, sandbox: SandboxConfig) -> AsyncIterator["Toolbox"]:
        """Open what lives as long as the run: the sandbox, if a tool needs it, and the tools' own states.

        Raises:
            UserError: no sandbox works here, it has no persistent interpreters although a tool needs them, or a tool
                cannot be opened.
        """
        async with AsyncExitStack() as stack:
            users = [tool for tool in self.tools.values() if tool.uses_sandbox and tool.box is None]
            if users:
                box = await stack.enter_async_context(open_sandbox(sandbox))
                for tool in users:
                    tool.box = box
                    if isinstance(tool, Python):
                        tool.open()  # raises now if the sandbox cannot keep interpreters
            for tool in self.tools.values():
                if tool.lifetime == "run":
                    try:
                        self._run_states[tool.name] = await _open(tool, stack)
                    except ConnectionError as error:
                        raise UserError(
                            f"the tool {tool.name} {error}; see to that, or leave it out of tools"
                        ) from error
            try:
                yield self
            finally:
                self._run_states.clear()
                for tool in users:
                    tool.box = None

    async def run(self, call: ToolCall, states: ToolStates) -> Output:
        """Answer a call, whatever the policy wrote. A call that the machinery lost is retried."""
        if call.error:
            return Output(call.error, "program", kind=INVALID)
        tool = self.tools.get(call.name) if isinstance(call.name, str) else None
        if tool is None:
            return Output(f"unknown tool {shown(call.name)}; {self._known_names()}", "program", kind=INVALID)
        if fault := fault_of(call.arguments, tool.parameters):
            return Output(fault, "program", kind=INVALID)
        arguments = declared(call.arguments, tool.parameters)
        output = await self._try(tool, arguments, states)
        for attempt in range(tool.retries if tool.lifetime != "trajectory" else 0):
            if output.fault != "machinery":
                break
            await asyncio.sleep(PAUSES_S[min(attempt, len(PAUSES_S) - 1)])
            output = await self._try(tool, arguments, states)
        return output

    def _known_names(self) -> str:
        if len(self.tools) == 1:
            return f"the only tool is {self.names[0]}"
        return f"the tools are {', '.join(self.tools)}" if self.tools else "there are no tools here"

    async def _try(self, tool: Tool, arguments: dict[str, Any], states: ToolStates) -> Output:
        """One attempt. An exception of the tool becomes an `Output`."""
        own = ToolStates() if tool.lifetime == "call" else states
        try:
            if tool.lifetime == "run":
                return await _call(tool, arguments, self._run_states.get(tool.name))
            return await own.call(tool, arguments)
        except (Exception, SystemExit) as error:
            about_a_path = isinstance(error, _PATH_ERRORS) or getattr(error, "errno", None) in _PATH_CODES
            if isinstance(error, OSError) and not about_a_path:
                return Output(f"{tool.name}: {_raised(error)}", "machinery")
            return Output(_raised(error), "program")
        finally:
            if own is not states:
                await own.close()


async def _call(tool: Tool, arguments: dict[str, Any], state: Any) -> Output:
    """One attempt with an open state, stopped after the tool's `limit_s`."""
    try:
        async with asyncio.timeout(tool.limit_s) as clock:
            output = await tool.call(arguments, state)
    except Exception:  # a tool may turn the time-out into an error of its own
        if not clock.expired():
            raise
        return Output(f"[stopped: {tool.name} took more than {tool.limit_s:g} s]", "program", kind="timeout")
    if not (isinstance(output, Output) and isinstance(output.text, str)):
        raise TypeError(f"{tool.name} returned no Output with a text")
    return output


async def _open(tool: Tool, stack: AsyncExitStack) -> Any:
    """The state of a tool. If it cannot be opened in time, that is the machinery's fault (a `ConnectionError`)."""
    try:
        async with asyncio.timeout(tool.limit_s) as clock:
            state = await stack.enter_async_context(tool.open())
        if clock.expired() or asyncio.get_running_loop().time() > (clock.when() or math.inf):
            raise TimeoutError  # it blocked the event loop, or it suppressed the time-out
        return state
    except Exception as error:  # from a tool's own code
        raise ConnectionError(f"cannot be opened: {error!r}") from error


def load_tools(tools: str | Sequence[str]) -> Toolbox | None:
    """The tools that a config names, not opened yet; None for a run without tools.

    Raises:
        UserError: a module cannot be imported or has no such tool, or a server does not list its tools.
    """
    words = words_of(tools)
    return Toolbox([tool for word in words for tool in _tools_named(word)]) if words else None


def _tools_named(word: str) -> Sequence[Tool]:
    """The tools that one entry of `tools` names: one tool, or all tools of a server."""
    if word.startswith(MCP):
        return import_module("retool_jax.tools.mcp").tools_at(word.removeprefix(MCP))
    return [_BUILT_IN[word]() if word in _BUILT_IN else as_tool(imported(word, "tools"), f"tools={word}")]


def imported(word: str, key: str) -> Any:
    """The object that `my_package.my_module:my_name` names; `key` is the config's, for the error.

    Raises:
        UserError: the module cannot be imported, or has no such name.
    """
    module, _, name = word.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # importing a user's code may raise anything
        raise UserError(
            f"{key}={word} cannot be loaded ({_raised(error)}); see that {module} can be imported from here and has"
            f" {name}"
        ) from error


def _raised(error: BaseException) -> str:
    """An exception as Python shows it, without the traceback."""
    return "".join(traceback.format_exception_only(error)).strip()
