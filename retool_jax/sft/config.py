"""What a run may set of its cold start."""

from dataclasses import dataclass, field

from retool_jax.learn.config import OptimizerConfig


@dataclass(frozen=True)
class SFTConfig:
    """The cold start: imitation of demonstrations."""

    data: str = "arithmetic"  # or a JSONL or parquet file, or a hub id, with rows of `messages`
    steps: int = 1000  # 0 where epochs are set
    epochs: int = 0  # passes over `data`; each leaves out the rows that do not fill its last step
    batch_tokens: int = 2048  # tokens of demonstrations per step, on average
    batch_size: int = 0  # demonstrations per step; 0: as many as hold batch_tokens on average
    row_length: int = 192  # T of a packed row
    overlong: str = "error"  # for rows of `data` longer than row_length: error, or drop
    warmup_fraction: float = 0.0  # of all steps, and the cosine over the rest; 0: the optimizer's own steps
    rows_per_micro: int = 4  # B of a micro-batch
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
