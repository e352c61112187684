"""`python -m retool_jax.plan config=NAME mesh=NAME`: see `plan/command.py`."""

from retool_jax.errors import run_command
from retool_jax.plan.command import main

if __name__ == "__main__":
    run_command(main)
