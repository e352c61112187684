"""Qwen's vocabularies from the published ranks: byte-level BPE with its pre-tokenization and added tokens."""

import base64
import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from retool_jax.errors import UserError

# The pre-tokenization of Qwen2: single digits, words with their leading space, runs of punctuation.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_VISION = ("object_ref", "box", "quad")
# The added tokens of the published vocabularies, from id 151643 on, in order.
_QWEN25_ADDED = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    **{f"<|{name}_{edge}|>": True for name in _VISION for edge in ("start", "end")},
    **{f"<|{name}|>": True for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")},
    "<tool_call>": False,
    "</tool_call>": False,
    **{f"<|{name}|>": False for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")},
}
_QWEN3_ADDED = _QWEN25_ADDED | dict.fromkeys(("<tool_response>", "</tool_response>", "<think>", "</think>"), False)
QWEN_ADDED = {"qwen2": _QWEN25_ADDED, "qwen3": _QWEN3_ADDED}  # by `model_type` of the checkpoint's config.json


def read_ranks(path: Path) -> dict[bytes, int]:
    """The rank of each token in a tiktoken file, whose lines are `base64 rank`."""
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not `base64 rank`; fetch the file again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} has gaps: ranks must count from 0 and all 256 bytes must be there; fetch it again")
    return ranks


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges of byte-level BPE, in order, from the ranks of its tokens.

    A token's merge is the pair that remains when its bytes are merged with all merges of lower rank.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            scores = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
            at = min(range(len(scores)), key=scores.__getitem__)
            if scores[at] >= ranks[token]:
                raise UserError(f"token {ranks[token]} of the ranks file follows from no merge; fetch the file again")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def tokenizer_of_ranks(ranks: dict[bytes, int], added: dict[int, AddedToken]) -> FastTokenizer:
    """Qwen's tokenizer from its ranks and added tokens, the same as the published `tokenizer.json`."""
    alphabet = str.maketrans(byte_alphabet())

    def spell(token: bytes) -> str:
        return token.decode("latin-1").translate(alphabet)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    return byte_bpe(vocab, [[spell(left), spell(right)] for left, right in merges_of_ranks(ranks)], added)


def added_after(first: int, tokens: dict[str, bool]) -> dict[int, AddedToken]:
    return {
        index: AddedToken(text, special=special, normalized=False)
        for index, (text, special) in enumerate(tokens.items(), start=first)
    }


def byte_alphabet() -> dict[int, str]:
    """GPT-2's characters for the 256 bytes: printable bytes are themselves, the others are moved to 256 and above."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(moved)) for byte in range(256)}


def byte_bpe(vocab: dict[str, int], merges: list[list[str]], added: dict[int, AddedToken]) -> FastTokenizer:
    """Qwen's pipeline with this vocabulary. Made from the file format, as the constructors cannot set the decoder."""
    bytes_as_they_are = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token.content, **{flag: getattr(token, flag) for flag in flags}}
            for index, token in sorted(added.items())
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_as_they_are]},
        "post_processor": bytes_as_they_are,
        "decoder": bytes_as_they_are,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return FastTokenizer.from_str(json.dumps(content))
