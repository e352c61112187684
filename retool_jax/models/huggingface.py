"""Weights from and to a Hugging Face checkpoint folder: safetensors directly into sharded arrays, and back.

Everything goes tensor by tensor. A process reads only the slices of its own shards, and beside its shards it holds at
most one tensor. A tensor is read in the file's layout and type, put on the devices, and transposed, cast and checked
for NaN there. Each layer is written in place into the stack of all layers.
"""

import collections
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax.errors import UserError, one_line
from retool_jax.models.companions import check_companions, check_tokenizer, write_companions, write_json
from retool_jax.models.config import ARCHITECTURE, ModelConfig, config_from_hf, config_to_hf
from retool_jax.models.decoder import Params, Weight, abstract_params
from retool_jax.models.safetensors import INDEX, Tensor, equal_bytes, read_headers, some_names, write_file
from retool_jax.models.sharding import is_weight, weight_sharding

# For each weight its name in the file, and our axes (without L) in the file's order. torch's linear layers are
# [out, in], with heads and head_dim merged into one axis.
_NAMES = {
    "embedding": ("model.embed_tokens.weight", (0, 1)),
    "attention_norm": ("model.layers.{}.input_layernorm.weight", (0,)),
    "q": ("model.layers.{}.self_attn.q_proj.weight", (1, 2, 0)),
    "k": ("model.layers.{}.self_attn.k_proj.weight", (1, 2, 0)),
    "v": ("model.layers.{}.self_attn.v_proj.weight", (1, 2, 0)),
    "q_bias": ("model.layers.{}.self_attn.q_proj.bias", (0, 1)),
    "k_bias": ("model.layers.{}.self_attn.k_proj.bias", (0, 1)),
    "v_bias": ("model.layers.{}.self_attn.v_proj.bias", (0, 1)),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", (0,)),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", (0,)),
    "o": ("model.layers.{}.self_attn.o_proj.weight", (2, 0, 1)),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", (0,)),
    "gate": ("model.layers.{}.mlp.gate_proj.weight", (1, 0)),
    "up": ("model.layers.{}.mlp.up_proj.weight", (1, 0)),
    "down": ("model.layers.{}.mlp.down_proj.weight", (1, 0)),
    "final_norm": ("model.norm.weight", (0,)),
    "head": ("lm_head.weight", (0, 1)),
}
_HEAD, _EMBEDDING = _NAMES["head"][0], _NAMES["embedding"][0]
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # in old files; not needed, since they follow from the config


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint as a part of our weights; `logical` and `shape` are those of our weight, without L."""

    weight: str
    layer: int | None
    order: tuple[int, ...]  # our axes in the file's order
    logical: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def file_order_shape(self) -> tuple[int, ...]:
        """Our shape with the axes in the file's order."""
        return tuple(self.shape[axis] for axis in self.order)

    def merge(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes or bounds of our axes, in the file's order, as those of the tensor, which merges heads x head_dim."""
        merged: list[int] = []
        for number, size, axis in zip(numbers, self.file_order_shape, self.order, strict=True):
            if self.logical[axis] == "head_dim":
                merged[-1] *= size
            else:
                merged.append(number)
        return tuple(merged)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.merge(self.file_order_shape)


def is_hub_id(name: str) -> bool:
    """Whether a name looks like a repository of the hub (`Qwen/Qwen3-8B`) and is not a local path.

    `runs/NAME` is a run's folder also where there is none yet: the hub's account `runs` is somebody else's. The name of
    a file of data is none of the hub's either.
    """
    folder = Path(name)
    looks_so = re.fullmatch(r"(?!runs/|.*\.(?:jsonl?|parquet)$)[\w-][\w.-]*/[\w-][\w.-]*", name)
    return bool(looks_so) and not folder.exists() and not folder.parent.exists()


def find_folder(name: str, weights: bool = True, files: Sequence[str] = ()) -> Path:
    """The folder of a checkpoint: a local one, or that of a hub id (`Qwen/Qwen3-8B`), downloaded if necessary.

    Without `weights` only its `config.json` is fetched; with `files` only those.

    Raises:
        UserError: the download failed.
    """
    if not is_hub_id(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    usual = ["*.json", "*.safetensors", "*.txt", "*.jinja"] if weights else ["config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=list(files) or usual))
    except Exception as error:  # of the hub, of HTTP or of the network
        reason = one_line(error)
        raise UserError(
            f"no folder {name} here, and not to be had from the Hugging Face hub ({type(error).__name__}: {reason});"
            " give a folder with config.json and *.safetensors"
        ) from error


def load_params(config: ModelConfig, folder: Path, mesh: Mesh) -> Params:
    """The weights of a checkpoint folder in `config.param_dtype`, sharded over the mesh.

    It needs memory for the shards and at most 1.5 times the largest tensor.

    Raises:
        UserError: the folder holds another model, is damaged, or has weights that are not finite.
    """
    _check_config(config, folder)
    tensors = read_headers(folder)
    parts = _parts(config)
    _check_tensors(config, folder, tensors, parts)
    check_tokenizer(config, folder)

    leaves, tree = jax.tree.flatten_with_path(abstract_params(config)[1], is_leaf=is_weight)
    values = {}
    # The largest first, while there are few shards beside it.
    for path, leaf in sorted(leaves, key=lambda pair: -math.prod(pair[1].shape[_is_stack(pair[1]) :])):
        own = [(name, part) for name, part in parts.items() if part.weight == _name(path)]
        values[_name(path)] = _load_weight(leaf, own, tensors, mesh)
    return jax.tree.unflatten(tree, [leaf.replace(values[_name(path)]) for path, leaf in leaves])


def repeated_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> set[str]:
    """The names of tensors that say nothing new: a copy of tied embeddings as the head, and old files' buffers."""
    repeated = {name for name in tensors if _BUFFERS.search(name)}
    tied = config.tie_embeddings and _HEAD in tensors and _EMBEDDING in tensors
    return repeated | ({_HEAD} if tied and equal_bytes(tensors[_HEAD], tensors[_EMBEDDING]) else set())


def checkpoint_tensors(config: ModelConfig, params: Params) -> dict[str, Callable[[np.dtype], np.ndarray]]:
    """The tensors of these weights' checkpoint, in the order of the forward pass, each as a function of a dtype.

    With several processes all must make the same calls in the same order.
    """
    weights = {_name(path): leaf[...] for path, leaf in _weights(params)}

    def read(part: Part, dtype: np.dtype) -> np.ndarray:
        index = None if part.layer is None else jnp.int32(part.layer)
        value = _take(weights[part.weight], index, part.order, dtype)
        if not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        return np.ascontiguousarray(value).reshape(part.tensor_shape)

    return {name: partial(read, part) for name, part in _parts(config).items()}


def save_params(
    config: ModelConfig,
    params: Params,
    folder: Path,
    tokenizer_from: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    stop_ids: Sequence[int] = (),
    card: str = "",
) -> None:
    """Write a checkpoint folder that transformers can load; `dtype` is the file's type, by default the parameters'.

    The files of the tokenizer and the chat template are copied from `tokenizer_from`. If `stop_ids` are given,
    config.json and generation_config.json have only these. `card` is the text of README.md. The folder is written under
    another name and renamed when it is complete. With several processes all must call this; the first one writes.

    Raises:
        UserError: the folder exists already, no family has such a model, the tokenizer has more tokens than the
            embedding has rows, or the disk has no room; nothing is left behind.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    stored = np.dtype(jnp.dtype(dtype or config.param_dtype))
    check_target(config, folder, tokenizer_from)
    parts = _parts(config)
    split = split_state_dict_into_shards_factory(
        parts,
        get_storage_size=lambda part: stored.itemsize * math.prod(part.shape),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    total = split.metadata["total_size"]
    writes = jax.process_index() == 0
    temporary = folder.with_name(f".{folder.name}.partial")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a writer that was killed
        temporary.mkdir(parents=True)
        if (free := shutil.disk_usage(temporary).free) < total:
            temporary.rmdir()
            raise UserError(f"{folder} takes {total / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB left; make room")
    try:
        tensors = checkpoint_tensors(config, params)
        for shard, names in split.filename_to_tensors.items():
            values = (tensors[name](stored) for name in names)
            if writes:
                write_file(temporary / shard, {name: parts[name].tensor_shape for name in names}, stored, values)
            else:
                collections.deque(values, maxlen=0)  # takes part in gathering them
        if writes:
            if split.is_sharded:
                write_json(temporary / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
            hf = config_to_hf(config) | {"torch_dtype": stored.name}
            write_companions(temporary, hf, tokenizer_from, stop_ids)
            if card:
                (temporary / "README.md").write_text(card)
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_target(config: ModelConfig, folder: Path, tokenizer_from: Path | None) -> None:
    """Raise a `UserError` if `save_params` could not write these files there; nothing is written."""
    config_to_hf(config)
    if tokenizer_from is not None:
        if not any((tokenizer_from / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(f"no tokenizer at {tokenizer_from}: expected tokenizer.json or vocab.json there")
        check_companions(tokenizer_from)
        check_tokenizer(config, tokenizer_from)
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another folder, or remove that one")
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir():
        raise UserError(f"{folder} cannot be made, as {above} is no folder; choose another one")


def _load_weight(leaf: Weight, own: list[tuple[str, Part]], tensors: dict[str, Tensor], mesh: Mesh) -> jax.Array:
    sharding = weight_sharding(mesh, leaf.logical, leaf.shape)
    if not _is_stack(leaf):
        ((name, part),) = own
        value = _read_sharded(part, tensors[name], sharding.spec, mesh)
        _check_finite(name, tensors[name], _finite(value, leaf.dtype))
        return value if value.dtype == leaf.dtype else value.astype(leaf.dtype)
    stack = _zeros(leaf.shape, leaf.dtype, sharding)
    for name, part in own:
        value = _read_sharded(part, tensors[name], sharding.spec[1:], mesh)
        stack, finite = _put(stack, value, jnp.int32(part.layer), part.order, sharding)
        _check_finite(name, tensors[name], finite)  # also waits, so that tensors do not pile up in memory
    return stack


def _read_sharded(part: Part, tensor: Tensor, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """A tensor as an array with our axes in the file's order, sharded as `spec` says for our order."""
    seen: dict[tuple, np.ndarray] = {}  # devices with the same slice share one copy
    shape = part.file_order_shape

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
        if (key := tuple(bounds)) not in seen:
            edges = [part.merge(numbers) for numbers in zip(*bounds, strict=True)]
            slices = [slice(first, stop) for first, stop in zip(*edges, strict=True)]
            seen[key] = tensor.read(*slices).reshape([stop - first for first, stop in bounds])
        return seen[key]

    sharding = NamedSharding(mesh, PartitionSpec(*(spec[axis] for axis in part.order)))
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read, tensor.dtype))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
def _put(
    stack: jax.Array, value: jax.Array, layer: jax.Array, order: tuple[int, ...], sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    """Write a layer into the stack in place; returns the stack, and whether the layer is finite."""
    own = jnp.transpose(value, np.argsort(order)).astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, own, layer, 0)
    return jax.lax.with_sharding_constraint(stack, sharding), _finite(value, stack.dtype)


@partial(jax.jit, static_argnums=1)
def _finite(value: jax.Array, dtype: np.dtype) -> jax.Array:
    return jnp.isfinite(value.astype(dtype)).all()


@partial(jax.jit, static_argnums=(2, 3))
def _take(weight: jax.Array, layer: jax.Array | None, order: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """A tensor of the checkpoint from a weight: one layer, if it is a stack, with its axes in the file's order."""
    own = weight if layer is None else jax.lax.dynamic_index_in_dim(weight, layer, 0, keepdims=False)
    return jnp.transpose(own, order).astype(dtype)


def _check_finite(name: str, tensor: Tensor, finite: jax.Array) -> None:
    if not finite:
        raise UserError(f"{tensor.file} has NaN or inf in {name}; use a checkpoint from before the run went astray")


def _is_stack(leaf: Weight) -> bool:
    return leaf.logical[0] == "layers"


def _weights(params: Params) -> list[tuple[tuple, Weight]]:
    return jax.tree.flatten_with_path(params, is_leaf=is_weight)[0]


def _name(path: tuple) -> str:
    return path[-1].key


def _parts(config: ModelConfig) -> dict[str, Part]:
    """Every tensor of a checkpoint of this model, in the order of the forward pass."""
    leaves = {_name(path): leaf for path, leaf in _weights(abstract_params(config)[1])}
    parts = {}
    for weight, (name, order) in _NAMES.items():
        if (leaf := leaves.get(weight)) is None:
            continue
        if _is_stack(leaf):
            for layer in range(config.num_layers):
                parts[name.format(layer)] = Part(weight, layer, order, leaf.logical[1:], leaf.shape[1:])
        else:
            parts[name] = Part(weight, None, order, leaf.logical, leaf.shape)
    return parts


def _check_config(config: ModelConfig, folder: Path) -> None:
    there = config_from_hf(folder)
    for key in ARCHITECTURE:
        if getattr(there, key) != getattr(config, key):
            raise UserError(
                f"{folder} holds another model: model.{key} is {getattr(there, key)} there and"
                f" {getattr(config, key)} here; make them equal, or leave the shape out of the config, to be read there"
            )


def _check_tensors(config: ModelConfig, folder: Path, tensors: dict[str, Tensor], parts: dict[str, Part]) -> None:
    if missing := [name for name in parts if name not in tensors]:
        raise UserError(
            f"{folder} lacks {some_names(missing)}; use a complete checkpoint of the model in its config.json"
        )
    surplus = tensors.keys() - parts.keys() - repeated_tensors(config, tensors)
    if config.tie_embeddings and _HEAD in surplus:
        raise UserError(
            f"{folder} has a {_HEAD} that is not {_EMBEDDING}, though its config.json ties them;"
            " set tie_word_embeddings to false there"
        )
    if surplus:
        raise UserError(
            f"{folder} holds {some_names(sorted(surplus))}, which the model in its config.json does not have"
        )
    for name, part in parts.items():
        if tensors[name].shape != (expected := part.tensor_shape):
            raise UserError(
                f"{tensors[name].file} has {name} of shape {list(tensors[name].shape)};"
                f" the model in config.json needs {list(expected)}"
            )
