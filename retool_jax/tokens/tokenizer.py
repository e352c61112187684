"""Load a tokenizer with its chat template, and build the miniature's."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retool_jax.errors import UserError

MINIATURE = Path(__file__).parent.parent / "data" / "miniature"

# The pre-tokenization of Qwen2: single digits, words with their leading space, runs of punctuation.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer, narrowed to what a token-in, token-out pipeline may do with it."""

    hf: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; strings of control tokens in it become control tokens (see `chat.defuse`)."""
        return self.hf.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, control tokens included, nothing cleaned up."""
        return self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def id_of(self, token: str) -> int:
        """Id of one control token."""
        index = self.hf.get_added_vocab().get(token)
        if index is None:
            raise UserError(f"the tokenizer has no control token {token!r}; a Qwen tokenizer is needed")
        return index

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Every added token and its id: what tool output must never become."""
        return dict(self.hf.get_added_vocab())

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: Instruct models use the first, Base models the second."""
        return (self.id_of("<|im_end|>"), self.id_of("<|endoftext|>"))

    def render(self, messages: list[dict], tools: list[dict] | None, generation_prompt: bool) -> str:
        """The model's own chat template as text."""
        return self.hf.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
        )


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or the one that ships with the project for `path="miniature"`."""
    folder = MINIATURE if path == "miniature" else Path(path)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"no tokenizer at {folder}: expected tokenizer.json there; set tokenizer=FOLDER or miniature")
    return Tokenizer(AutoTokenizer.from_pretrained(folder))


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """A byte-level BPE with Qwen's pre-tokenization and control tokens; `vocab_size` counts neither of the latter."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"),
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
    from retool_jax.data.arithmetic import corpus

    build_miniature(corpus(4000))
