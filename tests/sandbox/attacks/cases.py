"""All attacks that are data, without sessions and faults."""

from .case import Case
from .files import FILES
from .memory import MEMORY, RESOURCES
from .network import NETWORK
from .output import ENCODING, OUTPUT, TIME
from .processes import PROCESSES
from .protocol import PROTOCOL
from .python import PYTHON
from .signals import SIGNALS
from .state import STATE
from .transfer import TRANSFER

CASES = [
    *(FILES + NETWORK + PROCESSES + SIGNALS + MEMORY + RESOURCES + TIME + OUTPUT + ENCODING),
    *(STATE + PYTHON + PROTOCOL + TRANSFER),
]


def named(case: Case) -> str:
    """The case's part of a test's name."""
    return f"{case.category}: {case.name}".replace(" ", "-")
