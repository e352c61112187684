"""What a run may set of its optimiser."""

from typing import Literal

from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED, Count, NotNegative, Share

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, config=CHECKED)
class OptimizerConfig:
    """AdamW behind a clip of the global gradient norm."""

    learning_rate: NotNegative = 1e-4
    warmup_steps: Count = 0
    decay_steps: Count = 0  # cosine from the end of the warm-up over this many steps; 0 keeps the rate constant
    final_fraction: Share = 0.1  # of the learning rate, where the cosine ends
    b1: Share = 0.9
    b2: Share = 0.98
    weight_decay: NotNegative = 0.01
    max_grad_norm: NotNegative = 1.0
    gradient_dtype: Dtype = "float32"  # in which micro-batches' gradients are added up, or bfloat16: half the memory
    moment_dtype: Dtype = "float32"  # in which Adam's moments are kept from step to step, or bfloat16: half the memory
