"""Stand-ins for the devices that a run is planned for."""

import importlib.util
import os

from retool_jax.errors import UserError
from retool_jax.slices import Slice

LIBTPU = "pip install --no-deps 'libtpu==0.0.42.*'"  # the version for Python 3.11's jax


def prepare(wanted: Slice) -> None:
    """Set the environment variables that jax reads at import. Call it before jax is imported.

    Raises:
        UserError: the slice has TPUs, and their compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if wanted.chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"mesh={wanted.name} is planned with the TPU's compiler, which is not installed here (it needs no TPU);"
                f" {LIBTPU}"
            )
        # No cache: the compiler dumps no text for a program that comes from it.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
        }
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        count = f"--xla_force_host_platform_device_count={wanted.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()


def devices_of(wanted: Slice) -> list:
    """The slice's devices to compile for; CPU devices stand in for those of a slice without TPUs."""
    import jax
    from jax.experimental import topologies

    if wanted.chip.platform != "tpu":
        return jax.devices()[: wanted.devices]
    # Without wrap-around an all-gather over a whole torus is lowered to padding and an all-reduce.
    flat = wanted.shape[2] == 1
    whole = tuple(side >= 16 if flat else min(wanted.shape) >= 4 for side in wanted.shape)
    host = (2, 2, 1) if wanted.hosts > 1 else wanted.shape
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=wanted.topology,
        wrap=whole,
        chips_per_host_bounds=host,
        chip_config_name="megacore" if wanted.topology.startswith("v5p") else "default",
    )
    return list(description.devices)
