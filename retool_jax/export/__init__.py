"""Export a run's trajectories in formats of other programs: `python -m retool_jax.export run=DIR out=FILE`."""

from retool_jax.export.command import main

__all__ = ["main"]
