"""One self-contained HTML page of a run, or of several side by side: `python -m retool_jax.report run=DIR`."""

from retool_jax.report.page import main

__all__ = ["main"]
