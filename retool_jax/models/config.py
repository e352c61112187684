"""The config of a Qwen2, Qwen3 or Llama decoder, and its conversion from and to a checkpoint's `config.json`."""

import json
import math
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError, one_line
from retool_jax.fields import CHECKED, Above0, Count, NotNegative, Positive, complaint, hints_of

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)
Width = Annotated[int, Field(ge=1, le=1 << 20)]  # published models have at most a sixth of it
Heads = Annotated[int, Field(ge=1, le=4096)]

# The differences of the families; R1-Distill-Qwen is a qwen2. Their files may repeat `qkv_bias` as `attention_bias`:
# false in a qwen2 would contradict its three biases, and true in the others would add one to the output projection.
FAMILIES = {
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "qk_norm": False},
}

# The fields of `ModelConfig` that determine the computation, and so must agree with a checkpoint's.
ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rope_theta", "yarn_factor", "yarn_original_length", "yarn_beta_fast", "yarn_beta_slow", "yarn_attention_factor"),
    *("llama3_factor", "llama3_original_length", "llama3_low_factor", "llama3_high_factor"),
    *("rms_norm_eps", "tie_embeddings", "qkv_bias", "qk_norm"),
)

_ORIGINAL = "original_max_position_embeddings"
# The names of our sizes in config.json, and those of each rotary scaling, whose fields here begin with its kind.
SIZES = {
    **{name: name for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
    **{"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"},
    "max_positions": "max_position_embeddings",
}
_STRETCH = {"factor": "factor", "original_length": _ORIGINAL}
SCALINGS = {
    "yarn": _STRETCH | {"beta_fast": "beta_fast", "beta_slow": "beta_slow"},
    "llama3": _STRETCH | {"low_factor": "low_freq_factor", "high_factor": "high_freq_factor"},
}
READ = {
    *("model_type", *SIZES.values(), _ORIGINAL),
    *("rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
}
# Fields without effect on the forward pass: how a model was initialised, stored, prompted, or sampled from.
IRRELEVANT = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
    *("decoder_start_token_id", "pretraining_tp", "is_llama_config", "transformers.js_config"),
    *("dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range", "tokenizer_class", "prefix"),
    *("sliding_window", "max_window_layers"),  # only read with use_sliding_window
    *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "task_specific_params", "finetuning_task", "name_or_path", "model_name"),
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "repetition_penalty", "length_penalty", "num_return_sequences"),
    *("early_stopping", "no_repeat_ngram_size", "max_new_tokens", "unsloth_version", "unsloth_fixed"),
}


@dataclass(frozen=True, config=CHECKED)
class ModelConfig:
    """Dimensions and numerics of a decoder; hashable, so that it can be a static argument of jit.

    Letters of dimensions, in names and comments everywhere: B batch, T query length, S cache length,
    D model, N query heads, K key/value heads, G = N / K, H head, F feed-forward, V vocabulary, L layers.
    """

    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)] = 384  # V
    hidden_size: Width = 128  # D
    intermediate_size: Width = 256  # F
    num_layers: Annotated[int, Field(ge=1, le=4096)] = 2  # L
    num_heads: Heads = 4  # N
    num_kv_heads: Heads = 2  # K
    head_dim: Annotated[int, Field(le=4096)] = 32  # H
    rope_theta: Annotated[float, Field(ge=100, le=1e12)] = 10_000.0
    """Base of the rotary embedding: the slowest pair of a head turns about this many times more slowly than the
    fastest, which takes 6 tokens for a turn. Below 100 all pairs turn within a few hundred tokens, so that distant
    positions look like near ones."""
    yarn_factor: NotNegative = 0.0  # YaRN (arXiv 2309.00071): context length as a multiple of the trained one; 0 is off
    yarn_original_length: Count = 0  # the trained context length
    yarn_beta_fast: Above0 = 32.0  # frequencies with more turns over that length are kept
    yarn_beta_slow: Above0 = 1.0  # frequencies with fewer turns over it are divided by the factor
    yarn_attention_factor: NotNegative = 0.0  # factor on cos and sin; 0: 0.1 ln(factor) + 1
    llama3_factor: NotNegative = 0.0  # Llama 3's scaling: context length as a multiple of the trained one; 0 is off
    llama3_original_length: Count = 0  # the trained context length
    llama3_low_factor: float = 1.0  # frequencies with fewer turns over that length are divided by the factor
    llama3_high_factor: float = 4.0  # frequencies with more turns over it are kept
    max_positions: Positive = 32_768  # the checkpoint's own limit; only copied, nothing here is limited by it
    rms_norm_eps: Annotated[float, Field(ge=1e-12, le=0.1)] = 1e-6  # added to the mean square before its root
    tie_embeddings: bool = True
    qkv_bias: bool = True  # only Qwen2 has it
    qk_norm: bool = False  # only Qwen3 has it: RMS norm over each query and key head, before rotation
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    cache_dtype: Dtype = "float32"
    real_vocab: int = 0  # ids from here on have no token and are never drawn; 0: every id has one
    attention_kernel: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Kernel for packed rows: auto, xla, splash (TPU) or cudnn (GPU); models/attention.py."""
    cache_kernel: Literal["auto", "xla", "ragged", "triton"] = "auto"
    """Kernel for tokens with a cache: auto, xla, ragged (TPU) or triton (GPU); auto is ragged if exact, else xla."""
    head_chunk: Positive = 1024  # tokens of a device that have logits at the same time in training; models/head.py
    remat: Literal["none", "full", "dots", "offload"] = "dots"
    """What the backward pass recomputes: none, full (whole layers), dots (all but matrix products and attention),
    offload (whole layers, with their inputs in the host's memory). Storing cheap values takes longer than recomputing
    them."""
    fp32_head: bool = False  # keep the output matrix and its product in fp32, in the engine as in training

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
        for kind in SCALINGS:
            factor, length = getattr(self, f"{kind}_factor"), getattr(self, f"{kind}_original_length")
            if factor and (factor < 1 or length < 1):
                raise UserError(
                    f"model.{kind}_factor={factor} with model.{kind}_original_length={length}: this scaling needs a"
                    " factor of at least 1 and the length it starts from; a factor of 0 switches it off"
                )
            parts = [name for name in hints_of(ModelConfig) if name.startswith(f"{kind}_") and not factor]
            if odd := [name for name in parts if getattr(self, name) != getattr(ModelConfig, name)]:
                raise UserError(
                    f"model.{odd[0]}={getattr(self, odd[0])} is not read with model.{kind}_factor=0, which switches"
                    " that scaling off; leave it out, or set the factor"
                )
        if self.yarn_factor and self.llama3_factor:
            raise UserError("model.yarn_factor and model.llama3_factor scale the same rotation; set one of them to 0")
        if self.yarn_factor and self.yarn_beta_slow >= self.yarn_beta_fast:
            raise UserError(
                f"model.yarn_beta_slow={self.yarn_beta_slow} must be below model.yarn_beta_fast={self.yarn_beta_fast}"
            )
        if not 0 < self.llama3_low_factor < self.llama3_high_factor:
            raise UserError(
                f"model.llama3_low_factor={self.llama3_low_factor} must be above 0 and below"
                f" model.llama3_high_factor={self.llama3_high_factor}"
            )


def config_from_hf(folder: str | Path, **numerics: str | bool) -> ModelConfig:
    """Read a checkpoint folder's `config.json`, as transformers 4 and 5 write it.

    `numerics` sets fields that the file does not determine, such as dtypes. A field of the file is implemented, or
    known to have no effect on the forward pass, or refused.

    Raises:
        UserError: there is no such file, or it describes a model that this decoder cannot compute.
    """
    path = Path(folder) / "config.json"
    hf = _read_json(path, folder)
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{path} has model_type={family!r}; only {', '.join(FAMILIES)} are supported")
    try:
        _refuse_others(path, hf)
        heads, hidden = (_whole(path, hf, key) for key in ("num_attention_heads", "hidden_size"))
        fallbacks = {
            "num_key_value_heads": heads,
            "head_dim": 128 if family == "qwen3" else hidden // max(heads, 1),  # the default of transformers
            "max_position_embeddings": ModelConfig.max_positions,
        }
        there = hf | {key: value for key, value in fallbacks.items() if hf.get(key) is None}
        sizes = {ours: _whole(path, there, key) for ours, key in SIZES.items()}
        return ModelConfig(
            **sizes,
            **_rope(path, hf, sizes["max_positions"]),
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            **FAMILIES[family],
            **numerics,
        )
    except ValidationError as error:
        said = complaint(error, ModelConfig, "model.")
        raise UserError(f"{path} describes a model that cannot be computed here: {said}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # rms_norm_eps: null, and the like
        raise UserError(f"{path} has a value that is none for its key ({one_line(error)}); copy it again") from error


def config_to_hf(config: ModelConfig) -> dict:
    """The `config.json` of these weights, in the layout of the published Qwen files, which transformers 4 and 5 read.

    Raises:
        UserError: no family of Hugging Face has this combination of biases and head norms.
    """
    c = config
    traits = {"qkv_bias": c.qkv_bias, "qk_norm": c.qk_norm}
    family = next((name for name in FAMILIES if FAMILIES[name] == traits), None)
    if family is None:
        raise UserError(
            f"model.qkv_bias={c.qkv_bias} with model.qk_norm={c.qk_norm} is neither Qwen2 (bias, no norm) nor Qwen3"
            " (norm, no bias) nor Llama (neither); train one of these to write a Hugging Face checkpoint"
        )
    if family == "llama" and c.hidden_size % c.num_heads:
        raise UserError(
            f"model.hidden_size={c.hidden_size} is not a multiple of model.num_heads={c.num_heads}, which transformers"
            " asks of a Llama; train another shape to write a Hugging Face checkpoint"
        )
    hf = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        **{key: getattr(c, ours) for ours, key in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "torch_dtype": c.param_dtype,
    }
    hf |= {"attention_bias": False, "mlp_bias": False} if family == "llama" else {"use_sliding_window": False}
    if family == "qwen3":
        hf["attention_bias"] = False
    for kind, names in SCALINGS.items():
        if getattr(c, f"{kind}_factor"):
            there = {key: getattr(c, f"{kind}_{name}") for name, key in names.items()}
            hf["rope_scaling"] = {"rope_type": kind, **there}
    if c.yarn_factor and c.yarn_attention_factor:
        hf["rope_scaling"]["attention_factor"] = c.yarn_attention_factor
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
    """Raise a `UserError` with the first field that this decoder does not support."""
    demands = {  # the only supported value of each field
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
        # An unknown field that is off (false, 0 or empty) has no effect.
        elif value and key not in READ and key not in IRRELEVANT and not key.startswith("_"):
            raise UserError(
                f"{path} has {key}={_json(value)}, which is not supported; if the model computes the same without it,"
                " remove it from that file"
            )


def _json(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _rope(path: Path, hf: dict, max_positions: int) -> dict[str, float | int]:
    """Our rotary fields, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    rope = _given(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind in SCALINGS:
        known |= set(SCALINGS[kind].values())
    elif kind != "default":
        raise UserError(
            f"{path} scales its rotary embedding with {kind!r} ({_json(rope)}); only yarn and llama3 are supported"
        )
    if kind == "yarn":
        known |= {"attention_factor", "mscale", "mscale_all_dim", "truncate"}
    elif lacking := known - rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL}:
        raise UserError(f"{path} has no {min(lacking)} in its {kind} rotary embedding; copy it again")
    if other := rope.keys() - known:
        name = min(other)
        raise UserError(f"{path} has {name}={_json(rope[name])} in its {kind} rotary embedding, which is not supported")
    for key in ("partial_rotary_factor", "truncate"):
        if rope.get(key, 1) != 1:
            raise UserError(f"{path} has {key}={_json(rope[key])}, which is not supported")
    theta = {"rope_theta": float(rope.get("rope_theta", hf.get("rope_theta") or 10_000.0))}
    if kind == "default":
        return theta
    original = hf.get(_ORIGINAL) or rope.get(_ORIGINAL, max_positions)
    given = {"factor": max_positions / original} | rope | {_ORIGINAL: original}
    fields = {f"{kind}_{name}": given[key] for name, key in SCALINGS[kind].items() if key in given}
    if kind == "yarn" and "attention_factor" in rope:
        fields["yarn_attention_factor"] = float(rope["attention_factor"])
        if fields["yarn_attention_factor"] <= 0:
            raise UserError(
                f"{path} has attention_factor={rope['attention_factor']} in its yarn rotary embedding;"
                " it must be above 0"
            )
    elif kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = [0.1 * rope[key] * math.log(given["factor"]) + 1.0 for key in ("mscale", "mscale_all_dim")]
        fields["yarn_attention_factor"] = scales[0] / scales[1]
    return theta | fields
