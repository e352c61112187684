"""Plan a training run for chips that are not here: `python -m retool_jax.plan config=NAME mesh=NAME`."""

from retool_jax.plan.command import main

__all__ = ["main"]
