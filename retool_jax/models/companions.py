"""The files beside the weights of a checkpoint: the tokenizer's, the chat template, the generation config."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from retool_jax.errors import UserError, one_line
from retool_jax.models.config import ModelConfig

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def check_companions(folder: Path) -> None:
    """Raise a `UserError` if one of a folder's files is damaged: not a JSON object, a broken merge or template."""
    for name in (*COMPANIONS, "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json" and not isinstance(json.loads(text), dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is torn ({one_line(error)}); copy it again") from error
        if name == "merges.txt":
            lines = [line for line in text.split("\n") if line.strip()]
            if not lines or (not lines[-1].startswith("#version") and len(lines[-1].split(" ")) != 2):
                raise UserError(f"{path} is torn (its last line is no merge of two parts); copy it again")
        if name == "chat_template.jinja":
            _check_template(path, text)


def _check_template(path: Path, text: str) -> None:
    """Raise a `UserError` if a template is empty or ends inside a block; the tag `generation` of others is allowed."""
    import jinja2  # slow to import, and few folders have such a file

    fault = "" if text.strip() else "it is empty"
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        fault = fault or ("" if "unknown tag 'generation'" in str(error) else one_line(error))
    if fault:
        raise UserError(f"{path} is torn ({fault}); copy it again")


def check_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Raise a `UserError` if the folder has a tokenizer with more tokens than the embedding has rows."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} is no tokenizer ({' '.join(str(error).split())[:160]}); copy it again") from error
    tokens = max(vocabulary.values(), default=-1) + 1
    if tokens > config.vocab_size:
        raise UserError(
            f"{path} has {tokens} tokens, the model's embedding {config.vocab_size} rows; use the model's own tokenizer"
        )


def write_companions(folder: Path, hf: dict, source: Path | None, stop_ids: Sequence[int]) -> None:
    """Write config.json and copy the source's files, with these stop ids in place of its own.

    The source's files must have passed `check_companions`.
    """
    stops = {"eos_token_id": list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]} if stop_ids else {}
    if source is not None:
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        # config.json also has these, although the model does not use them.
        there = _read_table(source / "config.json")
        hf |= {key: there[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in there}
    if stops:  # if there is such a file, generate() reads only that one
        write_json(folder / "generation_config.json", _read_table(folder / "generation_config.json") | stops)
    write_json(folder / "config.json", hf | stops)


def _read_table(path: Path) -> dict:
    """The JSON object of a file; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
