"""Qwen's real vocabulary, from the `dashscope` wheel of the test extra."""

import hashlib
import json
from pathlib import Path

import pytest

from retool_jax.tokens.qwen import QWEN_ADDED, added_after, byte_bpe, read_ranks, tokenizer_of_ranks
from retool_jax.tokens.tokenizer import MINIATURE, Tokenizer, load_tokenizer

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


# Like that of small instruct models: ChatML with its own system turn, without tools.
PLAIN_CHATML = """
{%- for message in messages -%}
    {%- if loop.first and message.role != "system" -%}
        {{- "<|im_start|>system\\nYou are kind.<|im_end|>\\n" -}}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory) -> Path:
    """The miniature's vocabulary without the marks of calls, outputs and thoughts, under a template of its own."""
    folder = tmp_path_factory.mktemp("bare")
    content = json.loads((MINIATURE / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(PLAIN_CHATML)
    return folder


@pytest.fixture(scope="session")
def bare(bare_folder) -> Tokenizer:
    return load_tokenizer(str(bare_folder))


@pytest.fixture(scope="session")
def qwen_ranks(wheel_file) -> dict[bytes, int]:
    path = wheel_file("dashscope", "dashscope/resources/qwen.tiktoken")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == RANKS_SHA256
    return read_ranks(path)


@pytest.fixture(scope="session")
def qwen_folders(qwen_ranks, tmp_path_factory) -> dict[str, Path]:
    """Folders as checkpoints have them, by model_type: Qwen's vocabulary under the miniature's template."""
    newer = tokenizer_of_ranks(qwen_ranks, added_after(len(qwen_ranks), QWEN_ADDED["qwen3"]))
    model = json.loads(newer.to_str())["model"]  # deriving the merges from the ranks is slow, so only once
    older = byte_bpe(model["vocab"], model["merges"], added_after(len(qwen_ranks), QWEN_ADDED["qwen2"]))
    folders = {}
    for model_type, fast in (("qwen2", older), ("qwen3", newer)):
        folder = folders[model_type] = tmp_path_factory.mktemp(model_type)
        fast.save(str(folder / "tokenizer.json"))
        settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text((MINIATURE / "chat_template.jinja").read_text())
    return folders


@pytest.fixture(scope="session")
def qwen(qwen_folders) -> dict[str, Tokenizer]:
    """Tokenizers of both vocabularies, by model_type; tests do not change them."""
    return {model_type: load_tokenizer(str(folder)) for model_type, folder in qwen_folders.items()}
