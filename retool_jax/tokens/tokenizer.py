"""Load a checkpoint's tokenizer with its chat template.

Three forms of a tokenizer are read: `tokenizer.json`; `vocab.json` with `merges.txt`; and the ranks file
`qwen.tiktoken` that Qwen publishes with its own packages, from which the merges are derived. The class that a
checkpoint's settings name is ignored: exports of one vocabulary name different classes (DeepSeek's distilled Qwen
names Llama's), and the ids must not depend on how a library treats them.
"""

# ruff: noqa: RUF001  (DeepSeek writes its marks with full-width bars)

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from retool_jax.errors import UserError, one_line
from retool_jax.tokens.qwen import QWEN_ADDED, added_after, byte_bpe, read_ranks, tokenizer_of_ranks

if TYPE_CHECKING:  # slow to import, and the report, which only reads texts, needs no tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MINIATURE = Path(__file__).parent.parent / "data" / "miniature"

_HUB_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"),
    *("added_tokens.json", "config.json", "qwen.tiktoken"),
)
_EXPECTED = "tokenizer.json, vocab.json with merges.txt, or qwen.tiktoken"


@dataclass(frozen=True)
class Family:
    """The strings with which a family's chat template marks turns, as far as segments need them.

    After a turn that called tools the template writes `answer_open`, the outputs, then `answer_close`. Each output
    stands between `output_open` and `output_close`, and newlines separate them. If `header_after_answer`, the header of
    the next turn follows, the same that ends a prompt.
    """

    stops: tuple[str, ...]  # tokens that end a turn; the template writes the first
    user_open: str  # begins a user's turn after a finished turn
    user_close: str
    answer_open: str
    output_open: str
    output_close: str
    answer_close: str
    header_after_answer: bool

    @property
    def turn_end(self) -> str:
        return self.stops[0]

    @property
    def marks(self) -> list[str]:
        """All marks in angle brackets in these strings."""
        texts = [*self.stops, self.user_open, self.user_close, self.answer_open, self.answer_close]
        return re.findall(r"<[^<>\s]+>", "".join([*texts, self.output_open, self.output_close]))


# Qwen2.5, Qwen3 and others that use their ChatML. The template puts a newline after <|im_end|>, where the policy has
# already stopped. Instruct models end with the first stop, Base models with the second.
QWEN = Family(
    stops=("<|im_end|>", "<|endoftext|>"),
    user_open="\n<|im_start|>user\n",
    user_close="<|im_end|>\n",
    answer_open="\n<|im_start|>user\n",
    output_open="<tool_response>\n",
    output_close="\n</tool_response>",
    answer_close="<|im_end|>\n",
    header_after_answer=True,
)
# DeepSeek-R1-Distill-Qwen: the marks of tool outputs are not tokens of its vocabulary. The published template opens the
# list of outputs only for the first answer of a conversation; here each answer opens its own list.
R1 = Family(
    stops=("<｜end▁of▁sentence｜>",),
    user_open="<｜User｜>",
    user_close="",
    answer_open="<｜tool▁outputs▁begin｜>",
    output_open="<｜tool▁output▁begin｜>",
    output_close="<｜tool▁output▁end｜>",
    answer_close="<｜tool▁outputs▁end｜>",
    header_after_answer=False,
)
FAMILIES = (QWEN, R1)
_USER = {"role": "user", "content": "?"}  # for trial renders of a template


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with only the operations that a token-in, token-out pipeline may use."""

    hf: "PreTrainedTokenizerBase"

    def __len__(self) -> int:
        """The largest id + 1: the number of rows in a table of all ids, above the number of tokens if ids have gaps."""
        return self._rows

    @cached_property
    def _rows(self) -> int:
        return max(self.hf.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text; strings of control tokens in it become control tokens (see `chat.defuse`)."""
        return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, including control tokens, without any clean-up."""
        return self.hf.backend_tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Every added token and its id. Tool output must never contain one of these ids."""
        return dict(self.hf.get_added_vocab())

    @cached_property
    def brackets(self) -> dict[int, int]:
        """The number of `<` in an id's text, for the ids that have any."""
        candidates = [i for token, i in self.hf.get_vocab().items() if "<" in token]
        return {i: count for i in candidates if (count := self.decode([i]).count("<"))}

    @cached_property
    def family(self) -> Family:
        """The family whose end of turn is in the vocabulary and whose marks the template writes."""
        known = [family for family in FAMILIES if family.turn_end in self.control_tokens]
        if not known:
            ends = " nor ".join(family.turn_end for family in FAMILIES)
            raise UserError(f"the tokenizer has neither {ends}; use one of Qwen2.5, Qwen3 or DeepSeek-R1-Distill-Qwen")
        if not self.hf.chat_template:  # `render` raises an error about it
            return known[0]
        written = self._render_or_empty([_USER, {"role": "assistant", "content": "!"}, _USER], None)
        for family in known:
            if f"!{family.turn_end}{family.user_open}?" in written:
                return family
        raise UserError(
            f"the vocabulary has {known[0].turn_end}, and the chat template does not write a user's next turn as"
            f" {known[0].turn_end + known[0].user_open!r}; put a chat_template.jinja that does beside the tokenizer"
        )

    @cached_property
    def writes_tools(self) -> bool:
        """Whether a prompt needs no extra text about tools: the template shows them, or it is the miniature's."""
        tool = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
        written = self._render_or_empty([_USER], [{"type": "function", "function": tool}])
        return self.is_miniature or ('"probe"' in written and "<tool_call>" in written)

    @cached_property
    def writes_system(self) -> bool:
        """Whether the template has a place for a system message."""
        return "probe" in self._render_or_empty([{"role": "system", "content": "probe"}, _USER], None)

    @cached_property
    def is_miniature(self) -> bool:
        """Whether the template is the miniature's, whose policy knows its tool only from demonstrations."""
        return self.hf.chat_template == (MINIATURE / "chat_template.jinja").read_text(encoding="utf-8")

    def _render_or_empty(self, messages: list[dict], tools: list[dict] | None) -> str:
        """`render`ed messages; empty if the template refuses them."""
        try:
            return self.render(messages, tools, generation_prompt=True)
        except UserError:
            return ""

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn; the template writes the first."""
        names = [*self.family.stops, self.hf.eos_token]
        found = (self.control_tokens[name] for name in names if name in self.control_tokens)
        return tuple(dict.fromkeys(found))

    @cached_property
    def turn_header(self) -> str:
        """The text that the template writes before a turn of the policy; some thinking models' ends with `<think>`."""
        before, after = self.render([_USER], None, False), self.render([_USER], None, True)
        if not after.startswith(before) or after == before:
            raise UserError(
                "the chat template does not add a header for the assistant to a finished user turn; put one that"
                " honours add_generation_prompt beside the tokenizer as chat_template.jinja"
            )
        return after[len(before) :]

    def render(self, messages: list[dict], tools: list[dict] | None, generation_prompt: bool) -> str:
        """The model's own chat template as text."""
        if not self.hf.chat_template:
            raise UserError("the tokenizer has no chat template; put chat_template.jinja beside its files")
        try:
            return self.hf.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:  # the last two when a template gets wrong types
            raise UserError(
                f"the chat template refuses turns of {', '.join(message['role'] for message in messages)}"
                f" ({one_line(error)}); change the data, or chat_template.jinja beside the tokenizer"
            ) from error


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder or of a hub id, or the project's own for `path="miniature"`.

    Raises:
        UserError: the files are missing, cannot be read, contradict each other or belong to no known family.
    """
    folder = MINIATURE if path == "miniature" else Path(path)
    if not folder.is_dir() and path.count("/") == 1 and not path.startswith((".", "/", "~", "runs/")):
        folder = _download(path)
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        try:
            fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"cannot read {folder / 'tokenizer.json'} ({one_line(error)}); fetch it again") from error
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        fast = _from_merges_file(folder, config)
    elif (folder / "qwen.tiktoken").is_file():
        ranks = read_ranks(folder / "qwen.tiktoken")
        added = _declared_tokens(folder, config) or added_after(len(ranks), _tokens_by_model_type(folder))
        fast = tokenizer_of_ranks(ranks, added)
    else:
        raise UserError(f"no tokenizer at {folder}: expected {_EXPECTED} there; set tokenizer=FOLDER or miniature")
    _check_added(fast, _declared_tokens(folder, config), folder)
    tokenizer = Tokenizer(_with_template(fast, folder, config))
    _ = tokenizer.family  # raises for a vocabulary without an end of turn, before a run begins
    return tokenizer


def _from_merges_file(folder: Path, config: dict) -> FastTokenizer:
    """A tokenizer from `vocab.json` and `merges.txt`. They do not describe the pipeline, so only Qwen's are read."""
    named = config.get("tokenizer_class")
    if named not in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):
        raise UserError(
            f"{folder} has vocab.json and merges.txt of tokenizer_class {named!r}, and only Qwen2Tokenizer's can be"
            " read without tokenizer.json; add that file"
        )
    vocab = _read_json(folder / "vocab.json")
    lines = _read_text(folder / "merges.txt").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = _declared_tokens(folder, config) or added_after(len(vocab), _tokens_by_model_type(folder))
    try:
        return byte_bpe(vocab, merges, added)
    except Exception as error:  # as above
        raise UserError(
            f"cannot join vocab.json and merges.txt of {folder} ({one_line(error)}); fetch them again"
        ) from error


def _declared_tokens(folder: Path, config: dict) -> dict[int, AddedToken]:
    """The added tokens that the folder's settings list, by id; empty if they list none."""
    try:
        if declared := config.get("added_tokens_decoder"):
            return {
                int(index): AddedToken(
                    token["content"],
                    **{flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "special")},
                    normalized=token.get("normalized", not token.get("special", False)),
                )
                for index, token in declared.items()
            }
        listed = _read_json(folder / "added_tokens.json")
        return {index: AddedToken(text, normalized=False) for text, index in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read the added tokens of {folder} ({one_line(error)}); fetch the files again"
        ) from error


def _tokens_by_model_type(folder: Path) -> dict[str, bool]:
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type not in QWEN_ADDED:
        raise UserError(
            f"{folder} does not say which added tokens it has (model_type is {model_type!r}); put a"
            f" tokenizer_config.json with added_tokens_decoder there, or a config.json with model_type"
            f" {' or '.join(QWEN_ADDED)}"
        )
    return QWEN_ADDED[model_type]


def _check_added(fast: FastTokenizer, declared: dict[int, AddedToken], folder: Path) -> None:
    """Every listed token must have its listed id, because the embedding was trained with it."""
    for index, token in declared.items():
        found = fast.token_to_id(token.content)
        if found != index:
            raise UserError(
                f"the tokenizer files of {folder} disagree: {token.content!r} is id {found} in the vocabulary and"
                f" {index} in the settings; fetch the files again"
            )


def _with_template(fast: FastTokenizer, folder: Path, config: dict) -> "PreTrainedTokenizerFast":
    """A tokenizer with the special tokens and the template that the folder's settings name."""
    from transformers import PreTrainedTokenizerFast

    names = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text and (not isinstance(text, str) or fast.token_to_id(text) is None):
            raise UserError(f"{folder / 'tokenizer_config.json'} has {name} {text!r}, which is not in the vocabulary")
        if text:
            names[name] = text
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates with names
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = _read_text(folder / "chat_template.jinja")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, chat_template=template, clean_up_tokenization_spaces=False, **names
    )


def _download(name: str) -> Path:
    """The folder of a hub id's tokenizer files, in the hub's own cache."""
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub raises dozens of kinds
        raise UserError(
            f"no tokenizer at {name}: not a folder, and the hub says {one_line(error)};"
            f" set tokenizer=FOLDER with {_EXPECTED}, or miniature"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} ({one_line(error)}); fetch it again") from error


def _read_json(path: Path) -> dict:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"cannot read {path} ({one_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value
