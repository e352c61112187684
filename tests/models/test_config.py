"""Model shapes are read from a checkpoint's own config.json, and what the decoder is not is refused by name."""

import json
import re
from pathlib import Path

import pytest
from transformers import Qwen2Config

from retool_jax.errors import UserError
from retool_jax.models.config import ModelConfig, config_from_hf

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
    config = config_from_hf(write(tmp_path), compute_dtype="bfloat16", remat=True)
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
        remat=True,
    )


def test_reads_what_todays_transformers_writes(tmp_path):
    theirs = {key: value for key, value in HF.items() if key not in ("model_type", "rope_theta")}
    Qwen2Config(**theirs, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path)
    config = config_from_hf(tmp_path)
    assert (config.rope_theta, config.num_layers, config.head_dim, config.tie_embeddings) == (5e5, 3, 8, False)


def test_head_dim_and_heads_of_the_file_win(tmp_path):
    assert config_from_hf(write(tmp_path, head_dim=16)).head_dim == 16
    assert config_from_hf(write(tmp_path, num_key_value_heads=4)).num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "linear"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_refuses_by_name_what_it_would_compute_wrongly(tmp_path, changes, named):
    with pytest.raises(UserError, match=re.escape(named)):
        config_from_hf(write(tmp_path, **changes))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        config_from_hf(tmp_path)


def test_impossible_heads_are_refused():
    with pytest.raises(UserError, match=r"num_heads=4.*num_kv_heads=3"):
        ModelConfig(num_heads=4, num_kv_heads=3)
    with pytest.raises(UserError, match="head_dim=7"):
        ModelConfig(head_dim=7)
