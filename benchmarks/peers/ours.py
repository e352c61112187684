"""The same work by retool_jax, with the default settings of its classes: `python ours.py WORK`.

Memory is kept from step to step as by `retool_jax.train`, which has to be said before jax begins its threads.
"""

import sys

from retool_jax.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    from our_works import run

    run(sys.argv[1])
