"""What a run may set of its optimiser."""

from dataclasses import dataclass

from retool_jax.errors import UserError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW behind a clip of the global gradient norm."""

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay_steps: int = 0  # cosine from the end of the warm-up over this many steps; 0 keeps the rate constant
    final_fraction: float = 0.1  # of the learning rate, where the cosine ends
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    gradient_dtype: str = "float32"  # in which micro-batches' gradients are added up, or bfloat16: half the memory
    moment_dtype: str = "float32"  # in which Adam's moments are kept from step to step, or bfloat16: half the memory

    def __post_init__(self) -> None:
        for name in ("gradient_dtype", "moment_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is not one of: {', '.join(DTYPES)}")
