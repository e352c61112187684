"""The shape of a Qwen2 or Qwen3 decoder, from and to a checkpoint's `config.json`."""

import json
import math
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Positive, complaint

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)

# What tells the families apart; R1-Distill-Qwen is a qwen2. Their files may repeat `qkv_bias` as `attention_bias`:
# false in a qwen2 would contradict its three biases, and true in a qwen3 puts one on the output projection too.
FAMILIES = {
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}

# The fields of `ModelConfig` that say what is computed, and so have to agree with a checkpoint's.
ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rope_theta", "yarn_factor", "yarn_original_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_attention_factor"),
    *("rms_norm_eps", "tie_embeddings", "qkv_bias", "qk_norm"),
)

READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
}
# Fields that say nothing about the forward pass of a decoder: how it was initialised, stored, prompted, sampled from.
IRRELEVANT = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "tokenizer_class", "prefix"),
    *("sliding_window", "max_window_layers"),  # of the window that use_sliding_window switches on
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "task_specific_params", "finetuning_task", "name_or_path", "model_name"),
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("early_stopping", "no_repeat_ngram_size", "max_new_tokens", "unsloth_version", "unsloth_fixed"),
}


@dataclass(frozen=True, config=CHECKED)
class ModelConfig:
    """Dimensions and numerics of a decoder; hashable, so that it can be a static argument of jit.

    Glossary of dimensions, used in names and comments everywhere: B batch, T query length, S cache length,
    D model, N query heads, K key/value heads, G = N / K, H head, F feed-forward, V vocabulary, L layers.
    """

    vocab_size: Positive = 384  # V
    hidden_size: Positive = 128  # D
    intermediate_size: Positive = 256  # F
    num_layers: Positive = 2  # L
    num_heads: Positive = 4  # N
    num_kv_heads: Positive = 2  # K
    head_dim: int = 32  # H
    rope_theta: float = 10_000.0
    yarn_factor: float = 0.0  # YaRN (arXiv 2309.00071): how many times longer than trained; 0 is off
    yarn_original_length: int = 0  # of the training before it
    yarn_beta_fast: float = 32.0  # turns over that length above which a frequency is kept
    yarn_beta_slow: float = 1.0  # and below which it is divided by the factor
    yarn_attention_factor: float = 0.0  # of cos and sin; 0: 0.1 ln(factor) + 1
    max_positions: int = 32_768  # what the checkpoint says it is made for; nothing here is limited by it
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True  # Qwen2; Qwen3 has none
    qk_norm: bool = False  # Qwen3: RMS norm over each query and key head, before rotation
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    cache_dtype: Dtype = "float32"
    real_vocab: int = 0  # ids from here on have no token and are never drawn; 0: every id has one
    attention_kernel: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Of packed rows: auto, xla, splash (TPU) or cudnn (GPU); models/attention.py."""
    head_chunk: Positive = 1024  # tokens of a device that have logits at the same time in training; models/head.py
    remat: Literal["none", "full", "dots"] = "none"
    """What backward computes again: none, full (whole layers), dots (all but matrix products)."""

    def __post_init__(self) -> None:
        if not 0 <= self.real_vocab <= self.vocab_size:
            raise UserError(
                f"model.real_vocab={self.real_vocab} must be between 0 (every id is real) and"
                f" model.vocab_size={self.vocab_size}"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} must be a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even and at least 2: rotary embeddings turn pairs")
        if self.yarn_factor and (self.yarn_factor < 1 or self.yarn_original_length < 1):
            raise UserError(
                f"model.yarn_factor={self.yarn_factor} with model.yarn_original_length={self.yarn_original_length}:"
                " YaRN needs a factor of at least 1 and the length it starts from; a factor of 0 switches it off"
            )


def config_from_hf(folder: str | Path, **numerics: str | bool) -> ModelConfig:
    """Read a checkpoint folder's `config.json`, as transformers 4 and 5 write it.

    `numerics` sets dtypes and the like, which that file does not decide. A field is implemented, known to change
    nothing in the forward pass, or refused.

    Raises:
        UserError: no such file, or it describes a model that this decoder is not.
    """
    path = Path(folder) / "config.json"
    hf = _read_json(path, folder)
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path} has model_type={family!r}; only {' and '.join(FAMILIES)} are supported")
    _refuse_others(path, hf)
    heads = _whole(path, hf, "num_attention_heads")
    # transformers' own fallbacks: Qwen3 has a head size of its own.
    head_dim = 128 if family == "qwen3" else _whole(path, hf, "hidden_size") // heads
    given = _given(hf)
    max_positions = _whole(
        path, {"max_position_embeddings": ModelConfig.max_positions} | given, "max_position_embeddings"
    )
    try:
        return ModelConfig(
            vocab_size=_whole(path, hf, "vocab_size"),
            hidden_size=_whole(path, hf, "hidden_size"),
            intermediate_size=_whole(path, hf, "intermediate_size"),
            num_layers=_whole(path, hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_whole(path, {"num_key_value_heads": heads} | given, "num_key_value_heads"),
            head_dim=_whole(path, {"head_dim": head_dim} | given, "head_dim"),
            **_rope(path, hf, max_positions),
            max_positions=max_positions,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=FAMILIES[family]["qkv_bias"],
            qk_norm=FAMILIES[family]["qk_norm"],
            **numerics,
        )
    except ValidationError as error:
        said = complaint(error, ModelConfig, "model.")
        raise UserError(f"{path} describes a model that cannot be computed here: {said}") from None


def config_to_hf(config: ModelConfig) -> dict:
    """The `config.json` of these weights, in the layout of the published Qwen files, which transformers 4 and 5 read.

    Raises:
        UserError: no family of Hugging Face's has this pair of biases and head norms.
    """
    c = config
    traits = {"qkv_bias": c.qkv_bias, "qk_norm": c.qk_norm}
    family = next((name for name in FAMILIES if FAMILIES[name] == traits), None)
    if family is None:
        raise UserError(
            f"model.qkv_bias={c.qkv_bias} with model.qk_norm={c.qk_norm} is neither Qwen2 (bias, no norm) nor Qwen3"
            " (norm, no bias); train one of these to write a Hugging Face checkpoint"
        )
    hf = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "torch_dtype": c.param_dtype,
    }
    if family == "qwen3":
        hf["attention_bias"] = False
    if c.yarn_factor:
        hf["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": c.yarn_factor,
            "original_max_position_embeddings": c.yarn_original_length,
            "beta_fast": c.yarn_beta_fast,
            "beta_slow": c.yarn_beta_slow,
        } | ({"attention_factor": c.yarn_attention_factor} if c.yarn_attention_factor else {})
    return hf


def _read_json(path: Path, folder: str | Path) -> dict:
    if not path.is_file():
        raise UserError(f"no model at {folder}: expected config.json there")
    try:
        hf = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())}); copy it again") from error
    if not isinstance(hf, dict):
        raise UserError(f"{path} is not a table of keys and values; copy it again")
    return hf


def _given(hf: dict) -> dict:
    return {key: value for key, value in hf.items() if value is not None}


def _whole(path: Path, hf: dict, key: str) -> int:
    value = hf.get(key)
    if type(value) is not int:
        said = f"has {key}={value!r}" if key in hf else f"has no {key}"
        raise UserError(f"{path} {said}; expected a whole number there")
    return value


def _refuse_others(path: Path, hf: dict) -> None:
    """A `UserError` that names the first field that asks for what this decoder does not compute."""
    demands = {  # field: the value that means what we do
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_dropout": 0,
        "attention_bias": FAMILIES[hf["model_type"]]["qkv_bias"],
        "partial_rotary_factor": 1,
    }
    for key, value in _given(hf).items():
        if key in demands:
            if value != demands[key]:
                raise UserError(f"{path} has {key}={_json(value)}; only {key}={_json(demands[key])} is supported")
        elif key == "layer_types":
            if other := set(value) - {"full_attention"}:
                raise UserError(f"{path} has layer_types with {min(other)!r}; only full_attention is supported")
        # A field that is off asks for nothing.
        elif value and key not in READ and key not in IRRELEVANT and not key.startswith("_"):
            raise UserError(
                f"{path} has {key}={_json(value)}, which is not supported; if the model computes the same without it,"
                " remove it from that file"
            )


def _json(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _rope(path: Path, hf: dict, max_positions: int) -> dict[str, float | int]:
    """The fields of the rotation, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = _given(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "yarn":
        known |= {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        known |= {"mscale", "mscale_all_dim", "truncate"}
    elif kind != "default":
        raise UserError(f"{path} scales its rotary embedding with {kind!r} ({_json(rope)}); only yarn is supported")
    if other := rope.keys() - known:
        name = min(other)
        raise UserError(f"{path} has {name}={_json(rope[name])} in its {kind} rotary embedding, which is not supported")
    for key in ("partial_rotary_factor", "truncate"):
        if rope.get(key, 1) != 1:
            raise UserError(f"{path} has {key}={_json(rope[key])}, which is not supported")
    fields = {"rope_theta": float(rope.get("rope_theta", hf.get("rope_theta") or 10_000.0))}
    if kind == "default":
        return fields
    original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", max_positions)
    factor = float(rope.get("factor", max_positions / original))
    attention = float(rope.get("attention_factor", 0.0))
    if "attention_factor" not in rope and rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = [0.1 * rope[key] * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim")]
        attention = scales[0] / scales[1]
    elif "attention_factor" in rope and attention <= 0:
        raise UserError(f"{path} has attention_factor={attention} in its yarn rotary embedding; it must be above 0")
    return fields | {
        "yarn_factor": factor,
        "yarn_original_length": original,
        "yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        "yarn_attention_factor": attention,
    }
