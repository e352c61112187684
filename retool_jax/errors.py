"""The one exception that a user's own input can raise, and how an entry point shows it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the thing, the limit and the way out, in one line."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run an entry point on the command line's words; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(130)
