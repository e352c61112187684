"""`python -m retool_jax.report run=DIR`: write the page."""

from retool_jax.errors import run_command
from retool_jax.report.page import main

if __name__ == "__main__":
    run_command(main)
