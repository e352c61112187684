"""The processes of one job: what a run may set of them."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED

Seconds = Annotated[int, Field(ge=1, le=86_400)]


@dataclass(frozen=True, config=CHECKED)
class HostsConfig:
    """Several hosts train or evaluate together where the environment says so, each with the same command (docs/tpu.md).

    On Cloud TPU they find each other. Elsewhere each has JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    start_s: Seconds = 300  # seconds to wait for all hosts at the start
    silent_s: Seconds = 30  # seconds after which a host that says nothing counts as dead, which ends the others too
