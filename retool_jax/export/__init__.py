"""Trajectories of a run in the formats of others: `python -m retool_jax.export run=DIR out=FILE`."""

from retool_jax.export.command import main

__all__ = ["main"]
