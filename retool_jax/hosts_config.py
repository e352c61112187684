"""The hosts section of a run."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED

Seconds = Annotated[int, Field(ge=1, le=86_400)]


@dataclass(frozen=True, config=CHECKED)
class HostsConfig:
    """Several hosts train or evaluate together if the environment says so, all with the same command (docs/tpu.md).

    On Cloud TPU they find each other. Elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    start_s: Seconds = 300  # seconds to wait for all hosts at the start
    silent_s: Seconds = 30  # seconds without a heartbeat after which a host counts as dead, which ends all others
