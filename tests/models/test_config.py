"""Model shapes are read from a checkpoint's own config.json, and unsupported fields are refused by name."""

import json
import math
import re
from pathlib import Path

import pytest
import transformers  # what needs PyTorch is imported when a test asks for it, since that takes seconds

from retool_jax.errors import UserError
from retool_jax.models.attention import rotary_frequencies
from retool_jax.models.config import ModelConfig, config_from_hf, config_to_hf

HF = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def write(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(HF | changes))
    return folder


def test_reads_the_published_layout(tmp_path):
    config = config_from_hf(write(tmp_path), compute_dtype="bfloat16", remat="full")
    assert config == ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        compute_dtype="bfloat16",
        remat="full",
    )


def test_reads_what_todays_transformers_writes(tmp_path):
    theirs = {key: value for key, value in HF.items() if key not in ("model_type", "rope_theta")}
    transformers.Qwen2Config(**theirs, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(
        tmp_path
    )
    config = config_from_hf(tmp_path)
    assert (config.rope_theta, config.num_layers, config.head_dim, config.tie_embeddings) == (5e5, 3, 8, False)


def test_head_dim_and_heads_of_the_file_win(tmp_path):
    assert config_from_hf(write(tmp_path, head_dim=16)).head_dim == 16
    assert config_from_hf(write(tmp_path, num_key_value_heads=4)).num_kv_heads == 4
    assert config_from_hf(write(tmp_path, num_key_value_heads=None)).num_kv_heads == 4


def test_qwen3_has_head_norms_no_biases_and_heads_of_its_own(tmp_path):
    config = config_from_hf(write(tmp_path, model_type="qwen3", attention_bias=False, head_dim=24))
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (True, False, 24)
    theirs = {key: value for key, value in HF.items() if key not in ("model_type", "rope_theta")}
    transformers.Qwen3Config(**theirs).save_pretrained(tmp_path)
    assert config_from_hf(tmp_path).head_dim == transformers.Qwen3Config().head_dim == 128
    config = config_from_hf(write(tmp_path))
    assert (config.qk_norm, config.qkv_bias) == (False, True)


LLAMA = {"model_type": "llama", "use_sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize("style", ["rope_scaling", "type", "rope_parameters"])
def test_yarn_is_read_as_each_transformers_writes_it(tmp_path, style):
    rope = dict(YARN)
    if style == "type":
        rope["type"] = rope.pop("rope_type")
    if style == "rope_parameters":
        write(tmp_path, rope_parameters=rope | {"rope_theta": 5e6}, rope_theta=None)
    else:
        write(tmp_path, rope_scaling=rope, rope_theta=5e6)
    config = config_from_hf(tmp_path)
    assert (config.rope_theta, config.yarn_factor, config.yarn_original_length) == (5e6, 4.0, 32_768)
    assert (config.yarn_beta_fast, config.yarn_beta_slow, config.yarn_attention_factor) == (32.0, 1.0, 0.0)


def theirs_of(folder: Path, kind: str = "yarn") -> list[float]:
    """The frequencies of transformers, followed by its factor on cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](transformers.AutoConfig.from_pretrained(folder), "cpu")
    return [*frequencies.tolist(), factor]


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0},
        {"mscale": 1.5, "mscale_all_dim": 0.5},
        {"original_max_position_embeddings": None},
        {"beta_fast": None, "truncate": True, "mscale": 2.0},
    ],
)
def test_yarn_means_to_us_what_it_means_to_transformers(tmp_path, changes):
    rope = {key: value for key, value in (YARN | changes).items() if value is not None}
    config = config_from_hf(write(tmp_path, rope_scaling=rope, max_position_embeddings=65_536, head_dim=64))
    theirs = theirs_of(tmp_path)
    attention = config.yarn_attention_factor or 0.1 * math.log(config.yarn_factor) + 1.0
    assert attention == pytest.approx(theirs[-1], rel=1e-12)
    # Written back, the fields must give transformers the same frequencies.
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert theirs_of(tmp_path) == pytest.approx(theirs, rel=1e-12)
    assert config_from_hf(tmp_path) == config


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("style", ["rope_scaling", "type", "rope_parameters"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 32.0},
        {"low_freq_factor": 2.0, "high_freq_factor": 3.5},
        {"original_max_position_embeddings": 64},
        {"factor": 1.0, "original_max_position_embeddings": 40_960},
    ],
)
def test_llama3_means_to_us_what_it_means_to_transformers(tmp_path, changes, style):
    rope, top = LLAMA3 | changes, {"max_position_embeddings": 131_072, "head_dim": 64, "rope_theta": 5e5}
    if style == "type":
        rope["type"] = rope.pop("rope_type")
    if style == "rope_parameters":
        write(tmp_path, **LLAMA, **top | {"rope_theta": None}, rope_parameters=rope | {"rope_theta": 5e5})
    else:
        write(tmp_path, **LLAMA, **top, rope_scaling=rope)
    config = config_from_hf(tmp_path)
    assert (config.rope_theta, config.llama3_factor, config.yarn_factor) == (5e5, rope["factor"], 0.0)
    theirs = theirs_of(tmp_path, "llama3")
    frequencies, factor = rotary_frequencies(config)
    assert [*frequencies, factor] == pytest.approx(theirs, rel=2e-7)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert theirs_of(tmp_path, "llama3") == theirs
    assert config_from_hf(tmp_path) == config


# What config.json holds of models that were published, beside the sizes.
SMOLLM2 = {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "pretraining_tp": 1}
SMOLLM2 |= {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "mlp_bias": False, "rope_theta": 100000}
LLAMA32 = {"eos_token_id": [128001, 128008], "head_dim": 8, "rope_scaling": LLAMA3 | {"factor": 32.0}}
TINYLLAMA = {"pretraining_tp": 1, "rope_scaling": None, "max_position_embeddings": 2048, "rope_theta": None}


@pytest.mark.parametrize("fields", [SMOLLM2, LLAMA32, TINYLLAMA])
def test_published_llamas_have_neither_biases_nor_head_norms(tmp_path, fields):
    config = config_from_hf(write(tmp_path, **LLAMA, **fields, attention_bias=False))
    assert (config.qk_norm, config.qkv_bias, config.head_dim) == (False, False, 8)
    assert config.rope_theta == (fields.get("rope_theta", 1e6) or 1e4)
    assert config.llama3_factor == (32.0 if fields is LLAMA32 else 0.0)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(qkv_bias=False, rope_theta=1e5, max_positions=8192),
        ModelConfig(qkv_bias=False, llama3_factor=8.0, llama3_original_length=8192, llama3_low_factor=0.5),
        ModelConfig(qkv_bias=False, tie_embeddings=False, yarn_factor=2.0, yarn_original_length=4096),
        ModelConfig(tie_embeddings=False, head_dim=20, rope_theta=5e6, rms_norm_eps=1e-5, max_positions=131_072),
        ModelConfig(qkv_bias=False, qk_norm=True, head_dim=48),
        ModelConfig(qkv_bias=False, qk_norm=True, yarn_factor=2.5, yarn_original_length=100, yarn_beta_fast=8.0),
        ModelConfig(yarn_factor=4.0, yarn_original_length=32_768, yarn_beta_slow=3.0, yarn_attention_factor=1.1),
    ],
)
def test_written_configs_are_read_by_us_and_by_transformers(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    assert config_from_hf(tmp_path) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    family = "Qwen3" if config.qk_norm else "Qwen2" if config.qkv_bias else "Llama"
    assert type(theirs).__name__ == f"{family}Config"
    theirs.save_pretrained(tmp_path / "theirs")
    assert config_from_hf(tmp_path / "theirs") == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        (LLAMA | {"attention_bias": True}, "attention_bias=true"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=true"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "only yarn and llama3 are supported"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "has no low_freq_factor in its llama3"),
        (
            LLAMA | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "llama3_low_factor=4.0 must be above 0 and below",
        ),
        (LLAMA | {"rope_scaling": LLAMA3 | {"factor": 0.5}}, "llama3_factor=0.5"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"attention_factor": 1.1}}, "attention_factor=1.1 in its llama3"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        ({"num_experts": 64}, "num_experts=64"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate=false"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor=0.0"),
        ({"rope_scaling": YARN | {"short_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "yarn_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"attention_bias": False}, "attention_bias=false"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"use_mrope": True}, "use_mrope=true"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map="),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
        ({"head_dim": 8.5}, "head_dim=8.5"),
        ({"num_attention_heads": 0}, "num_heads"),
    ],
)
def test_refuses_by_name_what_it_would_compute_wrongly(tmp_path, changes, named):
    with pytest.raises(UserError, match=re.escape(named)):
        config_from_hf(write(tmp_path, **changes))


def test_fields_that_are_off_or_do_not_affect_the_model_are_accepted(tmp_path):
    harmless = {"use_mrope": False, "quantization_config": None, "pretraining_tp": 0, "attention_dropout": 0.0}
    stored = {"architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16", "max_window_layers": 3, "_name": "x"}
    assert config_from_hf(write(tmp_path, **harmless, **stored)) == config_from_hf(write(tmp_path))


def test_every_published_model_goes_out_and_comes_back(tmp_path, published_configs):
    for name, model in published_configs.items():
        fields = {key: value for key, value in model.items() if key in HF or key in ("head_dim", "model_type")}
        (tmp_path / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 40_960}))
        config = config_from_hf(tmp_path)
        assert (config.qkv_bias, config.qk_norm) == (model["attention_qkv_bias"], model["qk_norm"]), name
        assert (config.rms_norm_eps, config.rope_theta) == (model["rms_norm_eps"], model["rope_theta"]), name
        written = config_to_hf(config)
        assert {key: written[key] for key in fields} == fields, name


def test_a_file_that_is_no_config_is_named(tmp_path):
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is not"):
            config_from_hf(tmp_path)


def test_a_pair_that_no_family_has_is_not_written():
    with pytest.raises(UserError, match=r"neither Qwen2 .* nor Llama"):
        config_to_hf(ModelConfig(qkv_bias=True, qk_norm=True))
    with pytest.raises(UserError, match=r"hidden_size=128 is not a multiple of model\.num_heads=3"):
        config_to_hf(ModelConfig(qkv_bias=False, num_heads=3, num_kv_heads=1))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        config_from_hf(tmp_path)


def test_impossible_heads_are_refused():
    with pytest.raises(UserError, match=r"num_heads=4.*num_kv_heads=3"):
        ModelConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(UserError, match="head_dim=7"):
        ModelConfig(head_dim=7)


def test_two_scalings_of_one_rotation_are_refused():
    with pytest.raises(UserError, match="scale the same rotation; set one of them to 0"):
        ModelConfig(yarn_factor=2.0, yarn_original_length=64, llama3_factor=2.0, llama3_original_length=64)


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm_eps": None}, {"rope_theta": "x"}, {"rope_scaling": 3}, {"rope_scaling": YARN | {"rope_type": []}}],
)
def test_a_value_that_is_none_for_its_key_is_one_line(tmp_path, changes):
    with pytest.raises(UserError, match=r"config.json has a value that is none for its key \(.*\); copy it again"):
        config_from_hf(write(tmp_path, **changes))
