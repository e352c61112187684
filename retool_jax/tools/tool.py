"""The interface of a tool: a name, a description, a JSON schema of its arguments, and one `async` function.

    class Reverse(Tool):
        name, description = "reverse", "Return a text backwards."
        parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

        async def call(self, arguments, state):
            return Output(arguments["text"][::-1])

A plain function can be a tool, too: `as_tool` reads its schema from the annotations.
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
from retool_jax.sandbox.text import Count, cut, encodable

Fault = Literal["none", "program", "machinery"]
Lifetime = Literal["call", "trajectory", "run"]
_STATUS = {"none": "success", "program": "user_error", "machinery": "infra_error"}


@dataclass(frozen=True)
class Output:
    """How a call ended.

    `fault` says whose fault a failure was: `program` for anything that the policy wrote, `machinery` for what says
    nothing about the policy. A call that the machinery lost is retried, and if that fails its trajectory is dropped.
    """

    text: str  # the policy reads it; for a fault of the machinery, only the log has it
    fault: Fault = "none"
    # Numbers for the call's record. `wall_s` is the time of the call's work in seconds, `queue_s` the time before it.
    metrics: Mapping[str, float] = field(default_factory=dict)
    kind: str = ""  # the status in the record, if it is more precise than the fault
    fit: Callable[[int, Count], str] | None = None  # shortens the text, if a cut in the middle is not the best way

    @property
    def status(self) -> str:
        return self.kind or _STATUS[self.fault]

    def shortened(self, room: int, count: Count) -> str:
        """The text for the policy, shortened so that its `count` is at most `room`."""
        return self.fit(room, count) if self.fit else cut(encodable(self.text), room, count)


class Tool(ABC):
    """Something that a policy can call."""

    name: str  # the policy calls the tool by it
    description: str  # for the policy, in the prompt
    parameters: Mapping[str, Any]  # JSON schema of the arguments, an object
    lifetime: Lifetime = "call"  # of the state that `open` returns: one call, the calls of a trajectory, or the run
    limit_s: float | None = 60.0  # a longer call is stopped, as the program's fault; None: the tool has its own limit
    # How often a call is retried after a fault of the machinery. A failed call may have changed its state, so nothing
    # is retried if the state lives for a trajectory.
    retries: int = 2
    at_once: int = 0  # how many calls of a step may run at the same time; 0: any number
    uses_sandbox: ClassVar[bool] = False  # whether it runs programs in `box`
    box: Sandbox | None = None  # the run's sandbox

    def open(self) -> AbstractAsyncContextManager[Any]:
        """The state that the tool keeps for one lifetime. `call` gets it as `state`; it is closed at the end."""
        return nullcontext()

    @abstractmethod
    async def call(self, arguments: dict[str, Any], state: Any) -> Output:
        """Answer one call. The arguments have the schema's types. The policy reads an exception as the program's fault;
        an `OSError` that is not about a path, for example a lost connection, is the machinery's fault."""

    @property
    def schema(self) -> dict:
        """The tool as chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class FunctionTool(Tool):
    """A function with annotated arguments. It returns an `Output`, or something that is converted to text.

    A function that is not `async` must be quick for any arguments, because everything else waits for it.
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
        UserError: an argument has no annotation, or one that is not a JSON type.
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
    """A tool from a `Tool`, a subclass of it that takes no arguments, or a function; `where` is for the error.

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
