"""What a run may set of its optimiser."""

from dataclasses import dataclass


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
