"""The interface of a tool: a name, a JSON schema of its arguments, and one `async` function.

    class Reverse(Tool):
        name, description = "reverse", "Return a text backwards."
        parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

        async def call(self, arguments, state):
            return Output(arguments["text"][::-1])

A plain function is a tool too: `as_tool` reads its schema from the annotations.
"""

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from retool_jax.errors import UserError
from retool_jax.sandbox import Sandbox
from retool_jax.sandbox.text import Count, cut, writable

Fault = Literal["none", "program", "machinery"]
Lifetime = Literal["call", "trajectory", "run"]
_STATUS = {"none": "success", "program": "user_error", "machinery": "infra_error"}


@dataclass(frozen=True)
class Output:
    """How a call ended.

    Attributes:
        text: what the policy is told; of a fault of the machinery, what the log is told.
        fault: whose fault it was: nobody's; the program's, which is anything that the policy wrote; or the machinery's,
            which says nothing about the policy. Such a call is repeated, and then its trajectory is dropped.
        metrics: numbers about the call, for its record. `wall_s` and `queue_s` are the seconds of its work and of its
            wait for it.
        kind: the status in the record, where that is finer than the fault.
        fit: the text for a room, in the unit of a count, where the tool knows better than to cut the middle.
    """

    text: str
    fault: Fault = "none"
    metrics: Mapping[str, float] = field(default_factory=dict)
    kind: str = ""
    fit: Callable[[int, Count], str] | None = None

    @property
    def status(self) -> str:
        return self.kind or _STATUS[self.fault]

    def told(self, room: int, count: Count) -> str:
        """What the policy is told: `count` of it is at most `room`."""
        return self.fit(room, count) if self.fit else cut(writable(self.text), room, count)


class Tool(ABC):
    """Something that a policy can call.

    Attributes:
        name: by which the policy calls it.
        description: for the policy, in the prompt.
        parameters: JSON schema of the arguments, an object.
        lifetime: how long a state lives that `open` gives: for one call, for the calls of a trajectory, or for the run.
        limit_s: seconds after which a call is ended, which is the program's fault; None where the tool ends it itself.
        retries: how often a call is repeated after a fault of the machinery. A state of a trajectory may have been
            changed by a call that failed, so there nothing is repeated.
        at_once: calls of a step that may be at work together, 0 for any number.
        box: the run's sandbox, for a tool that sets `uses_sandbox`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    lifetime: Lifetime = "call"
    limit_s: float | None = 60.0
    retries: int = 2
    at_once: int = 0
    uses_sandbox: ClassVar[bool] = False
    box: Sandbox | None = None

    def open(self) -> AbstractAsyncContextManager[Any]:
        """What the tool keeps for one lifetime; `call` is given it as `state`, and it is closed at the end."""
        return nullcontext()

    @abstractmethod
    async def call(self, arguments: dict[str, Any], state: Any) -> Output:
        """Do it. The arguments have the schema's types. An exception is told to the policy as the program's fault; an
        `OSError` that is not about a path, a lost connection for example, is the machinery's."""

    @property
    def schema(self) -> dict:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class FunctionTool(Tool):
    """A function with annotated arguments; what it returns is told as text, if it is no `Output`.

    A function that is not `async` must be quick, whatever it is given: everything else waits for it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        self.description = inspect.getdoc(function) or ""
        self.parameters = _parameters_of(function)
        self._function = function

    async def call(self, arguments: dict[str, Any], state: Any) -> Output:
        result = self._function(**arguments)
        result = await result if inspect.isawaitable(result) else result
        return result if isinstance(result, Output) else Output(str(result))


def _parameters_of(function: Callable[..., Any]) -> dict:
    """The JSON schema of a function's arguments.

    Raises:
        UserError: an argument without an annotation, or with one that is no type of JSON.
    """
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _KINDS.get(typing.get_origin(hints.get(name)) or hints.get(name))
        if kind is None or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"the tool {function.__name__} has an argument {name} that JSON has no type for; annotate it as one of"
                f" {', '.join(t.__name__ for t in _KINDS)}, or write a class with `parameters` of its own"
            )
        properties[name] = {"type": kind}
        if parameter.default is parameter.empty:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def as_tool(thing: object, where: str) -> Tool:
    """A tool from a `Tool`, a class of them that takes no arguments, or a function; `where` is for the error.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(thing, Tool):
        return thing
    if inspect.isclass(thing) and issubclass(thing, Tool):
        return thing()
    if inspect.isfunction(thing):
        return FunctionTool(thing)
    raise UserError(f"{where} is no tool; it must be a subclass of retool_jax.tools.Tool, or a function")
