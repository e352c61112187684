"""Safetensors files: the tensors of a folder, slices of them, and writing a file tensor by tensor.

The `safetensors` package reads files, by memory mapping. It writes a file only from all of its tensors at once, so the
writer is here: 8 bytes with the length of a JSON header, then the header and the bytes of the tensors.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from retool_jax.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, *slices: slice) -> np.ndarray:
        """The tensor, or a slice of it. The file is mapped only during the call, since mapped pages count as memory."""
        with safe_open(self.file, "numpy") as file:
            return file.get_slice(self.name)[slices or ...]


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name, from the headers of its safetensors files; no weight is read.

    Raises:
        UserError: a file is missing, truncated or not a safetensors file, or the index does not match the files.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            older = (
                "; its *.bin are not read: load it with transformers and save it with save_pretrained"
                if any(folder.glob("*.bin"))
                else ""
            )
            raise UserError(f"no weights at {folder}: expected model.safetensors or {INDEX} there{older}")
        return _read_header(single)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors ({error}); copy it again") from error
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UserError(f"{folder} lacks {some_names(missing)} of the {len(shards)} files in {INDEX}; copy it again")
    tensors = {name: tensor for shard in shards for name, tensor in _read_header(folder / shard).items()}
    for name in weight_map.keys() | tensors.keys():
        placed, found = weight_map.get(name), name in tensors and tensors[name].file.name
        if placed != found:
            raise UserError(
                f"{INDEX} of {folder} places {name} in {placed or 'no file'}, and it is in {found or 'none'};"
                " copy the folder again"
            )
    return tensors


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; only a few rows of each are in memory at a time."""
    step, size = 1024, a.shape[0]
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        a.read(rows).tobytes() == b.read(rows).tobytes()
        for rows in (slice(first, min(first + step, size)) for first in range(0, size, step))
    )


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, values: Iterable[np.ndarray]) -> None:
    """Write tensors of these names and shapes, taking one value at a time."""
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        stop = end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, stop]}
        end = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def some_names(names: list[str]) -> str:
    """The first names of a list, for a one-line message."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    tensors = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                found = file.get_slice(name)
                if (kind := found.get_dtype()) not in DTYPES:
                    raise UserError(
                        f"{path} has {name} of type {kind}; only {', '.join(DTYPES)} are supported:"
                        " use the checkpoint that it was made from"
                    )
                tensors[name] = Tensor(path, name, DTYPES[kind], tuple(found.get_shape()))
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file, or a part of one ({error}); copy it again") from error
    return tensors
