"""What a run may set of its optimiser."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, NotNegative, Share

Dtype = Literal["float32", "bfloat16"]
Decay = Annotated[float, Field(ge=0, le=0.999999)]  # of a mean; one that forgets nothing, as 1 in fp32, divides by 0


@dataclass(frozen=True, config=CHECKED)
class OptimizerConfig:
    """AdamW behind a clip of the global gradient norm."""

    learning_rate: Annotated[float, Field(ge=0, le=10)] = 1e-4  # by about so much AdamW moves each weight at a step
    warmup_steps: Count = 0
    decay_steps: Count = 0  # cosine from the end of the warm-up over this many steps; 0 keeps the rate constant
    final_fraction: Share = 0.1  # of the learning rate, where the cosine ends
    b1: Decay = 0.9
    b2: Decay = 0.98
    weight_decay: NotNegative = 0.01
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e12)] = 1.0  # to which a larger gradient is cut; 1e9 cuts none
    gradient_dtype: Dtype = "float32"  # in which micro-batches' gradients are added up, or bfloat16: half the memory
    moment_dtype: Dtype = "float32"  # in which Adam's moments are kept from step to step, or bfloat16: half the memory

    def __post_init__(self) -> None:
        if self.learning_rate * self.weight_decay > 1:
            raise UserError(
                f"learning_rate={self.learning_rate} x weight_decay={self.weight_decay} takes more from a weight at"
                " each step than all of it; lower one of them"
            )


def check_schedule(optimizer: OptimizerConfig, key: str) -> None:
    """Refuse the end of a cosine that there is none of; `key` is the section's."""
    if optimizer.final_fraction != OptimizerConfig.final_fraction and not optimizer.decay_steps:
        raise UserError(
            f"{key}.final_fraction={optimizer.final_fraction} is where a cosine ends, and with {key}.decay_steps=0 the"
            " rate is constant; set decay_steps above 0, or leave final_fraction out"
        )
