"""`python -m retool_jax.convert from=SOURCE to=FOLDER`: write a Hugging Face checkpoint; `check=A,B`: compare two."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retool_jax.errors import UserError, run_command
from retool_jax.fields import split_words

if TYPE_CHECKING:
    import numpy as np

    from retool_jax.models.config import ModelConfig
    from retool_jax.models.decoder import Params
    from retool_jax.run.schema import SFTRun

HELP = """\
usage: python -m retool_jax.convert from=SOURCE to=FOLDER [dtype=bfloat16] [tokenizer=FOLDER]
       python -m retool_jax.convert check=SOURCE,SOURCE

A SOURCE is the folder of a run (its newest checkpoint is taken), a folder with config.json and safetensors, or a hub
id such as Qwen/Qwen3-8B.

from, to    Write SOURCE as a checkpoint that transformers loads: config.json, weights in files of at most 5 GB, their
            index, the tokenizer and its chat template. FOLDER must not exist; it appears when it is complete.
dtype       float32, bfloat16 or float16; by default as in SOURCE, so that every weight is kept to the bit.
tokenizer   Where tokenizer and template are copied from; by default the run's tokenizer, or SOURCE itself.
check       Compare two checkpoints field by field and tensor by tensor. Prints what differs and by how much; exit
            code 0 when nothing does, 1 otherwise.

There is no step the other way: init_from=SOURCE of a run takes a Hugging Face checkpoint as it is.
A model that does not fit on one device is converted in the host's memory with JAX_PLATFORMS=cpu."""

KEYS = ("from", "to", "dtype", "tokenizer", "check")


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
    convert(options["from"], Path(options["to"]), options.get("dtype"), options.get("tokenizer"))
    print(f"wrote {options['to']}")


@dataclass(frozen=True)
class Source:
    """Weights that are there: those of a run, or, where that is None, of a Hugging Face folder.

    Of the run's config only the model and the tokenizer are read; the devices are those that are here.
    """

    run: "SFTRun | None"
    folder: Path
    config: "ModelConfig"


def find_source(name: str) -> Source:
    """What a name on the command line means.

    Raises:
        UserError: there is neither a run nor a checkpoint.
    """
    from retool_jax.models.config import config_from_hf
    from retool_jax.models.huggingface import find_folder, read_headers
    from retool_jax.run.folder import CONFIG, read_model
    from retool_jax.run.schema import SFTRun

    folder = find_folder(name)
    if (folder / CONFIG).is_file():
        model, tokenizer = read_model(folder)
        return Source(SFTRun(model=model, tokenizer=tokenizer), folder, model)
    if not (folder / "config.json").is_file():
        raise UserError(f"no checkpoint at {name}: expected config.yaml of a run, or config.json of a model, there")
    kinds = {tensor.dtype.name for tensor in read_headers(folder).values()}
    # float32 holds what any mixture of the three types holds.
    return Source(None, folder, config_from_hf(folder, param_dtype=kinds.pop() if len(kinds) == 1 else "float32"))


def read_params(source: Source) -> "Params":
    """Its weights, over the devices that are here."""
    from retool_jax.mesh import MeshConfig, make_mesh
    from retool_jax.models.huggingface import load_params

    if source.run is None:
        return load_params(source.config, source.folder, make_mesh(MeshConfig()))
    from retool_jax.run.weights import load_weights

    return load_weights(source.run, source.folder)


def convert(name: str, target: Path, dtype: str | None = None, tokenizer: str | None = None) -> None:
    """Write a source's weights as a Hugging Face checkpoint.

    Raises:
        UserError: what the source lacks or the target already is, before any weight is read.
    """
    from retool_jax.models.config import DTYPES
    from retool_jax.models.huggingface import check_target, save_params
    from retool_jax.tokens.tokenizer import MINIATURE

    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype} is not one of: {', '.join(DTYPES)}")
    source = find_source(name)
    words = tokenizer or (source.run.tokenizer if source.run else str(source.folder))
    words = MINIATURE if words == "miniature" else Path(words)
    check_target(source.config, target, words)
    save_params(source.config, read_params(source), target, words, dtype=dtype)


def compare(a: str, b: str) -> list[str]:
    """What two checkpoints differ in, a line each: fields of the model, tensors that one lacks, values."""
    import numpy as np

    from retool_jax.models.config import ARCHITECTURE

    sources = [find_source(name) for name in (a, b)]
    values = [[getattr(source.config, key) for source in sources] for key in ARCHITECTURE]
    lines = [f"model.{key}: {x} and {y}" for key, (x, y) in zip(ARCHITECTURE, values, strict=True) if x != y]
    here, there = (tensors_of(source) for source in sources)
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


def tensors_of(source: Source) -> dict[str, Callable[[], "np.ndarray"]]:
    """Each tensor of a source by its Hugging Face name, read when it is called; of a folder, whatever is there."""
    from retool_jax.models.huggingface import checkpoint_tensors, read_headers

    if source.run is None:
        return {name: tensor.read for name, tensor in read_headers(source.folder).items()}
    return {
        name: partial(read, source.config.param_dtype)
        for name, read in checkpoint_tensors(source.config, read_params(source))
    }


if __name__ == "__main__":
    run_command(main)
