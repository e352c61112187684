"""Files of safetensors: where each tensor lies, any slice of one, and a file written tensor by tensor.

A file is 8 bytes that give the length of a JSON header, the header, and the tensors' bytes one after the other. The
`safetensors` package wants the tensors of a file all at once to write it, and cannot give bfloat16 to numpy.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from retool_jax.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
ALIGNMENT = 64  # bytes: a jax array on a CPU can take over an array that begins at a multiple, instead of copying it


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on the disk."""

    file: Path
    start: int  # its first byte there
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """The tensor, or a slice of it: of its rows and, for a matrix, of its columns. No other byte is read."""
        width = math.prod(self.shape[1:])
        first, stop, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(width)
        size = self.dtype.itemsize
        total = (stop - first) * (right - left) * size
        buffer = np.empty(total + ALIGNMENT, np.uint8)
        skip = -buffer.ctypes.data % ALIGNMENT
        buffer = buffer[skip : skip + total]
        runs = 1 if right - left == width else stop - first  # whole rows lie one after the other
        length = len(buffer) // max(runs, 1)
        with self.file.open("rb", buffering=0) as file:
            for run in range(runs):
                at = self.start + ((first + run) * width + left) * size
                _read_into(file.fileno(), buffer[run * length : (run + 1) * length], at, self.file)
        shape = (stop - first, right - left) if len(self.shape) > 1 else (stop - first,)
        return buffer.view(self.dtype).reshape(shape)


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name, from the headers of its safetensors files; no weight is read.

    Raises:
        UserError: a file is missing, truncated or no safetensors, or the index does not tell the truth.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise UserError(f"no weights at {folder}: expected model.safetensors or {INDEX} there")
        return _read_header(single)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of safetensors ({error}); copy it again") from error
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UserError(f"{folder} lacks {name_some(missing)} of the {len(shards)} files in {INDEX}; copy it again")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in _read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{folder / shard} holds {name}, which {INDEX} places in {weight_map.get(name, 'no file')};"
                    " copy the folder again"
                )
            tensors[name] = tensor
    if lost := weight_map.keys() - tensors.keys():
        raise UserError(f"{INDEX} of {folder} names {name_some(sorted(lost))}, in no file there; copy the folder again")
    return tensors


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the disk are the same to the bit; a few rows of each are in memory at a time."""
    step = 1024
    return (a.shape, a.dtype) == (b.shape, b.dtype) and all(
        np.array_equal(a.read(rows).view(np.uint8), b.read(rows).view(np.uint8))
        for rows in (slice(first, first + step) for first in range(0, a.shape[0], step))
    )


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, values: Iterator[np.ndarray]) -> None:
    """Write tensors of these names and shapes, asking for one at a time."""
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


def name_some(names: list[str]) -> str:
    """The first names of a list, for a message of one line."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or size < 8 + length:
            raise UserError(f"{path} is truncated: its header takes {8 + length} bytes, it has {size}; copy it again")
        text = file.read(length)
    tensors, end = {}, 0
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted((entry["data_offsets"], name) for name, entry in header.items())
        for (first, stop), name in spans:
            entry = header[name]
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path} has {name} of type {entry['dtype']}; only {', '.join(DTYPES)} are supported:"
                    " use the checkpoint that it was made from"
                )
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if first != end or stop - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the bytes of {name} are not where they should be")
            tensors[name] = Tensor(path, 8 + length + first, dtype, shape)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file ({' '.join(str(error).split())}); copy it again") from error
    if size != 8 + length + end:
        is_what = "truncated" if size < 8 + length + end else "longer than its header says"
        raise UserError(f"{path} is {is_what}: {size} of {8 + length + end} bytes; copy it again")
    return tensors


def _read_into(descriptor: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    done = 0
    while done < len(buffer):  # one call reads 2 GB at most
        count = os.preadv(descriptor, [buffer[done:].data], offset + done)
        if not count:
            raise UserError(f"{path} ended while it was read; copy it again")
        done += count
