"""Tools as a user would write them, in a separate module."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from retool_jax.tools import Output, Tool


def shout(text: str) -> str:
    """Return a text in capital letters."""
    return text.upper()


class Reverse(Tool):
    name, description = "reverse", "Return a text backwards."
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}  # noqa: RUF012

    async def call(self, arguments: dict, state: None) -> Output:
        return Output(arguments["text"][::-1])


class Count(Tool):
    """Counts the calls of its lifetime, and keeps what was opened and closed."""

    name, description = "count", "How often this was called."
    parameters = {"type": "object", "properties": {}}  # noqa: RUF012

    def __init__(self, lifetime: str = "trajectory") -> None:
        self.lifetime = lifetime
        self.opened = self.closed = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[list[int]]:
        self.opened += 1
        yield []
        self.closed += 1

    async def call(self, arguments: dict, state: list[int]) -> Output:
        state.append(1)
        return Output(str(len(state)), metrics={"calls": len(state)})


NOTHING = 5
