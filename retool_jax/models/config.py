"""The shape of a Qwen2 decoder."""

import json
from dataclasses import dataclass
from pathlib import Path

from retool_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and numerics of a decoder; hashable, so that it can be a static argument of jit.

    Glossary of dimensions, used in names and comments everywhere: B batch, T query length, S cache length,
    D model, N query heads, K key/value heads, G = N / K, H head, F feed-forward, V vocabulary, L layers.
    """

    vocab_size: int = 384  # V
    hidden_size: int = 128  # D
    intermediate_size: int = 256  # F
    num_layers: int = 2  # L
    num_heads: int = 4  # N
    num_kv_heads: int = 2  # K
    head_dim: int = 32  # H
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True  # Qwen2; Qwen3 has none
    qk_norm: bool = False  # Qwen3: RMS norm over each query and key head, before rotation
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    cache_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("param_dtype", "compute_dtype", "cache_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(f"model.{name}={getattr(self, name)} is not one of: {', '.join(DTYPES)}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even and at least 2: rotary embeddings turn pairs")


def config_from_hf(folder: str | Path, **numerics: str | bool) -> ModelConfig:
    """Read a checkpoint folder's `config.json`; `numerics` sets dtypes and remat, which that file does not decide.

    Raises:
        UserError: no such file, or it describes a model that this decoder is not.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"no model at {folder}: expected config.json there")
    hf = json.loads(path.read_text())
    if hf.get("model_type") != "qwen2":
        raise UserError(f"{path} has model_type={hf.get('model_type')!r}; only qwen2 is supported")
    if hf.get("use_sliding_window"):
        raise UserError(f"{path} has use_sliding_window=true, which is not supported")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{path} scales its rotary embedding ({rope}), which is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path} has hidden_act={hf['hidden_act']!r}; only silu is supported")
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
        rms_norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **numerics,
    )
