"""The config of the optimiser."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, NotNegative, Share

Dtype = Literal["float32", "bfloat16"]
Decay = Annotated[float, Field(ge=0, le=0.999999)]  # of a running mean; a value that fp32 rounds to 1 divides by 0


@dataclass(frozen=True, config=CHECKED)
class OptimizerConfig:
    """AdamW or Muon, on gradients whose global norm is clipped."""

    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-4  # about the size of a weight's change per step
    name: Literal["adamw", "muon"] = "adamw"  # or muon, which orthogonalises the momentum of layers' matrices
    warmup_steps: Count = 0
    decay_steps: Count = 0  # cosine from the end of the warm-up over this many steps; 0 keeps the rate constant
    final_fraction: Share = 0.1  # of the learning rate, at the end of the cosine
    b1: Decay = 0.9
    b2: Decay = 0.98
    weight_decay: NotNegative = 0.01
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e12)] = 1.0  # larger gradients are scaled down; 1e9 clips none
    gradient_dtype: Dtype = "float32"  # of the sum of micro-batches' gradients; bfloat16 needs half the memory
    moment_dtype: Dtype = "float32"  # of moments between steps; bfloat16 needs half the memory

    def __post_init__(self) -> None:
        if self.learning_rate * self.weight_decay > 1:
            raise UserError(
                f"learning_rate={self.learning_rate} x weight_decay={self.weight_decay} takes more from a weight at"
                " each step than all of it; lower one of them"
            )


def check_schedule(optimizer: OptimizerConfig, key: str) -> None:
    """Refuse a `final_fraction` without a cosine; `key` is the section's key.

    Raises:
        UserError: `final_fraction` is set and `decay_steps` is 0.
    """
    if optimizer.final_fraction != OptimizerConfig.final_fraction and not optimizer.decay_steps:
        raise UserError(
            f"{key}.final_fraction={optimizer.final_fraction} is where a cosine ends, and with {key}.decay_steps=0 the"
            " rate is constant; set decay_steps above 0, or leave final_fraction out"
        )
