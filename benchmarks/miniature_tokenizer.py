"""Rebuild the miniature's tokenizer: a small byte-level BPE with Qwen's pre-tokenization and control tokens."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from retool_jax.data.arithmetic import demonstration
from retool_jax.tokens.qwen import QWEN_SPLIT
from retool_jax.tokens.tokenizer import MINIATURE

# Control tokens in Qwen's order; the flag is `special`, as in the published files.
_CONTROL_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}


def corpus(count: int) -> list[str]:
    """Texts of demonstrations without control tokens, to train a tokenizer on."""
    texts = []
    for index in range(count):
        for message in demonstration(index, tools=True):
            calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
            texts.append("\n".join([message["role"], message["content"], *calls]))
    return texts


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """A byte-level BPE with Qwen's pre-tokenization and control tokens; `vocab_size` does not count control tokens."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in _CONTROL_TOKENS.items()]
    )
    return tokenizer


def build_miniature(texts: Iterable[str], folder: Path = MINIATURE) -> None:
    """Write the miniature's tokenizer files beside its chat template, as a checkpoint folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    train_byte_bpe(texts, vocab_size=448).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    build_miniature(corpus(4000))
