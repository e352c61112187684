"""`python -m retool_jax.export run=DIR out=FILE`: write trajectories in a format of another program."""

from retool_jax.errors import run_command
from retool_jax.export.command import main

if __name__ == "__main__":
    run_command(main)
