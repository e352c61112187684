"""Programs that more than one file of tests runs."""

import time

SLEEP = "import time\ntime.sleep(30)"
"""For a program that the test ends itself."""


def nap(seconds: float) -> str:
    """A program that prints "ok" so long after this call, whenever and however often it is begun.

    A test that kills its worker has all that time for it, and the next try is not as long again.
    """
    return f"import time\ntime.sleep(max({time.time() + seconds} - time.time(), 0))\nprint('ok')"
