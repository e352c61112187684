"""`python -m retool_jax.convert from=SOURCE to=FOLDER`: write a Hugging Face checkpoint; `check=A,B`: compare two."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from retool_jax.errors import UserError, one_line, run_command
from retool_jax.fields import split_words

if TYPE_CHECKING:
    import numpy as np

    from retool_jax.run.schema import SFTRun

HELP = """\
usage: python -m retool_jax.convert from=SOURCE to=FOLDER [dtype=bfloat16] [tokenizer=SOURCE] [push=HUB_ID]
       python -m retool_jax.convert check=SOURCE,SOURCE

A SOURCE is the folder of a run (its newest checkpoint is taken), a folder with config.json and safetensors, or a hub
id such as Qwen/Qwen3-8B.

from, to    Write SOURCE as a checkpoint that transformers loads: config.json, weights in files of at most 5 GB, their
            index, the tokenizer and its chat template, the ids at which a turn of the policy ends, and a model card,
            README.md, with what is known of the run. FOLDER must not exist; it appears when it is complete.
dtype       float32, bfloat16 or float16; by default as in SOURCE, so that every weight is kept to the bit.
tokenizer   Where tokenizer and template are copied from; by default the run's tokenizer, or SOURCE itself.
push        Copy FOLDER to this repository of the hub, such as my-name/my-model. If it does not exist, it is created as
            a private one. Log in first with hf auth login, or set HF_TOKEN.
check       Compare two checkpoints field by field and tensor by tensor. Prints what differs and by how much; exit
            code 0 when nothing does, 1 otherwise.

Nothing needs to be converted the other way: init_from=SOURCE of a run reads a Hugging Face checkpoint as it is.
A model that does not fit on one device is converted in the host's memory with JAX_PLATFORMS=cpu."""

KEYS = ("from", "to", "dtype", "tokenizer", "push", "check")


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        return
    options = dict(split_words(words, KEYS))
    if "check" in options:
        sources = [name for name in options["check"].split(",") if name]
        if len(sources) != 2 or len(options) > 1:
            raise UserError("check compares two checkpoints and takes no other key: check=A,B")
        lines = compare(*sources)
        print("\n".join(lines) if lines else f"{sources[0]} and {sources[1]} are equal")
        sys.exit(1 if lines else 0)
    if not {"from", "to"} <= options.keys():
        raise UserError("give from=SOURCE and to=FOLDER, or check=A,B; see --help")
    target, push = Path(options["to"]), options.get("push", "")
    if push and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UserError(f"push={push} is no repository of the hub; give it as owner/name")
    convert(options["from"], target, options.get("dtype"), options.get("tokenizer"))
    print(f"wrote {target}")
    if push:
        print(f"pushed {upload(target, push)}")


def find_source(name: str) -> "tuple[SFTRun, Path]":
    """The source that a word names: a run with its model and tokenizer (all else is default), and its folder.

    Raises:
        UserError: there is neither a run nor a checkpoint.
    """
    from retool_jax.models.config import config_from_hf
    from retool_jax.models.huggingface import find_folder, read_headers
    from retool_jax.run.folder import CONFIG, read_model
    from retool_jax.run.schema import SFTRun

    folder = find_folder(name)
    if (folder / "config.json").is_file():
        kinds = {tensor.dtype.name for tensor in read_headers(folder).values()}
        # float32 can hold any mixture of the three dtypes exactly.
        model = config_from_hf(folder, param_dtype=kinds.pop() if len(kinds) == 1 else "float32")
        return SFTRun(model=model, tokenizer=str(folder)), folder
    if not (folder / CONFIG).is_file():
        raise UserError(f"no checkpoint at {name}: expected config.yaml of a run, or config.json of a model, there")
    model, tokenizer = read_model(folder)
    return SFTRun(model=model, tokenizer=tokenizer), folder


def convert(name: str, target: Path, dtype: str | None = None, tokenizer: str | None = None) -> None:
    """Write a source's weights as a Hugging Face checkpoint.

    Raises:
        UserError: the source is incomplete or the target exists; raised before any weight is read.
    """
    from retool_jax.models.companions import COMPANIONS
    from retool_jax.models.config import DTYPES
    from retool_jax.models.huggingface import check_target, find_folder, save_params
    from retool_jax.run.card import model_card
    from retool_jax.run.weights import load_weights
    from retool_jax.tokens.tokenizer import MINIATURE, load_tokenizer

    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype} is not one of: {', '.join(DTYPES)}")
    run, folder = find_source(name)
    words = tokenizer or run.tokenizer
    words = MINIATURE if words == "miniature" else find_folder(words, files=(*COMPANIONS, "config.json"))
    check_target(run.model, target, words)
    try:
        loaded = load_tokenizer(str(words))
        stops = {index: loaded.decode([index]) for index in loaded.stop_ids}
    except UserError:  # a family that cannot be trained: the stop ids of its own files are kept
        stops = {}
    params = load_weights(run, folder)
    card = model_card(folder, target.name, dtype or run.model.param_dtype, stops)
    save_params(run.model, params, target, words, dtype=dtype, stop_ids=tuple(stops), card=card)


def upload(folder: Path, name: str) -> str:
    """Copy a checkpoint folder to a repository of the hub, and return its address.

    Raises:
        UserError: the hub refuses, or cannot be reached; the local folder stays.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights, tokenizer and card")
    except Exception as error:  # from the hub, HTTP or the network
        reason = one_line(error)
        raise UserError(
            f"{folder} is complete, and the hub does not take it as {name} ({type(error).__name__}: {reason}); log in"
            f" with hf auth login, then: hf upload {name} {quote(str(folder))}"
        ) from error
    return str(address)


def compare(a: str, b: str) -> list[str]:
    """The differences of two checkpoints, one a line: fields of the model, missing tensors, values."""
    import numpy as np

    from retool_jax.models.config import ARCHITECTURE

    sources = [find_source(name) for name in (a, b)]
    values = [[getattr(run.model, key) for run, _ in sources] for key in ARCHITECTURE]
    lines = [f"model.{key}: {x} and {y}" for key, (x, y) in zip(ARCHITECTURE, values, strict=True) if x != y]
    here, there = (tensors_of(*source) for source in sources)
    for name in here | there:
        if name not in here or name not in there:
            lines.append(f"{name}: only in {a if name in here else b}")
            continue
        x, y = (tensors[name]() for tensors in (here, there))
        if x.shape != y.shape:
            lines.append(f"{name}: shape {list(x.shape)} and {list(y.shape)}")
        elif not np.array_equal(x, y, equal_nan=True):
            x, y = x.astype(np.float32), y.astype(np.float32)
            lines.append(f"{name}: max abs difference {np.max(np.abs(x - y)):.6g}")
    return lines


def tensors_of(run: "SFTRun", folder: Path) -> dict[str, Callable[[], "np.ndarray"]]:
    """Each tensor of a source, without copies of others, by its Hugging Face name, as a function that reads it."""
    from retool_jax.models.huggingface import checkpoint_tensors, read_headers, repeated_tensors
    from retool_jax.run.weights import load_weights

    if (folder / "config.json").is_file():
        there = read_headers(folder)
        repeated = repeated_tensors(run.model, there)
        return {name: tensor.read for name, tensor in there.items() if name not in repeated}
    tensors = checkpoint_tensors(run.model, load_weights(run, folder))
    return {name: partial(read, run.model.param_dtype) for name, read in tensors.items()}


if __name__ == "__main__":
    run_command(main)
