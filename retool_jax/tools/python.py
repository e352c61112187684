"""The Python interpreter as a tool: a fresh one for each program, or a persistent one for each trajectory."""

from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal

from retool_jax.sandbox import Sandbox, Session, tool_text
from retool_jax.tokens.grammar import CODE_TOOL
from retool_jax.tools.tool import Output, Tool

STAYS = " Variables, imports and files stay from one call to the next."


class Python(Tool):
    """Runs a program and returns what it prints.

    The sandbox has its own limits, retries failures that were not the program's fault, and refuses calls when its queue
    is full.

    Args:
        box: where programs run; None until the run has opened its sandbox.
        lifetime: `call` for a fresh interpreter each time, `trajectory` for one that keeps what programs defined.
    """

    name = CODE_TOOL
    parameters: ClassVar[dict] = {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The program to run."}},
        "required": ["code"],
    }
    limit_s = None
    retries = 0
    uses_sandbox = True

    def __init__(self, box: Sandbox | None = None, lifetime: Literal["call", "trajectory"] = "call") -> None:
        self.box, self.lifetime = box, lifetime
        self.description = "Run a Python program and return what it prints." + (STAYS if lifetime != "call" else "")

    @property
    def at_once(self) -> int:
        """As many as the sandbox lets wait. With persistent interpreters any number: calls that wait for one must not
        block calls that already have one."""
        return 0 if self.lifetime != "call" else self.box.config.max_waiting

    def open(self) -> AbstractAsyncContextManager[Sandbox | Session]:
        return nullcontext(self.box) if self.lifetime == "call" else self.box.session()

    async def call(self, arguments: dict[str, Any], state: Sandbox | Session) -> Output:
        try:
            result = await state.run(arguments["code"])
        except Exception as error:  # not of the program: its errors are in the result
            return Output(f"the sandbox failed: {error!r}", "machinery")
        metrics = {"wall_s": result.wall_s, "queue_s": result.queue_s}
        if result.status in ("infra_error", "cancelled"):
            return Output(result.message, "machinery", metrics, result.status)
        fault = "none" if result.status == "success" else "program"
        return Output(result.stdout, fault, metrics, result.status, partial(tool_text, result))
