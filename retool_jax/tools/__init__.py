"""What a policy may call: one interface, the tools of a run by name, and every call answered in words."""

from retool_jax.tools.tool import Output, Tool

__all__ = ["Output", "Tool"]
