"""Runs Python that a model wrote, isolated from everything else, and says whose fault a failure was.

async with open_sandbox(SandboxConfig(backend=("gvisor",), slots=2)) as box:
    result = await box.run("print(2 + 2)", limits=Limits(wall_s=5))
    print(tool_text(result, 2000))
"""

from retool_jax.sandbox.backends import open_sandbox
from retool_jax.sandbox.host.pool import Sandbox
from retool_jax.sandbox.host.session import Session
from retool_jax.sandbox.text import tool_text
from retool_jax.sandbox.types import Limits, SandboxConfig, ToolResult

__all__ = ["Limits", "Sandbox", "SandboxConfig", "Session", "ToolResult", "open_sandbox", "tool_text"]
