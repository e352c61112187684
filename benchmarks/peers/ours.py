"""Measure retool_jax with the default settings of its classes: `python ours.py WORK`.

As in `retool_jax.train`, freed memory is kept from step to step. This has to be set before jax starts its threads.
"""

import sys

from retool_jax.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    from our_works import run

    run(sys.argv[1])
