"""One self-contained HTML page of a run, or of several side by side: `python -m retool_jax.report run=DIR`."""
