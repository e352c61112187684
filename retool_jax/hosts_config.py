"""The processes of one job: what a run may set of them."""

from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED, Positive


@dataclass(frozen=True, config=CHECKED)
class HostsConfig:
    """Several hosts train or evaluate together where the environment says so, each with the same command (docs/tpu.md).

    On Cloud TPU they find each other. Elsewhere each has JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    start_s: Positive = 300  # seconds to wait for all hosts at the start
    silent_s: Positive = 30  # seconds after which a host that says nothing counts as dead, which ends the others too
