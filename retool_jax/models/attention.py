"""Grouped-query attention and rotary positions, as pure functions.

`attend` is the plain form; every kernel is tested against it. Packed rows use `packed_attention`, with the kernel that
`resolve_kernel` selects: splash on TPU, cuDNN on GPU, blocks of plain products (`blocks.py`) elsewhere. Tokens with a
cache use `paged_attention` (ragged on TPU, triton on GPU) or, one token per row, `row_attention` (`rows.py`). TPU
kernels are imported inside the functions that call them, so that runs on other chips do not load them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax import mesh as meshes
from retool_jax.errors import UserError
from retool_jax.models.blocks import ATTENTION, Seen, blocked_attention
from retool_jax.models.cache import read_pages, write_pages
from retool_jax.models.config import ModelConfig
from retool_jax.models.paged import paged_decode

SPLASH_BLOCKS = (1024, 512, 256, 128)  # 2048 overflows the scratch memory of v5 chips; vector lanes are 128 wide
RAGGED_BLOCK, RAGGED_QUERIES = 2048, 32  # tokens of a row, and queries, that the ragged kernel processes at once
RAGGED_BUFFER = 1 << 21  # bytes of scratch memory for one of its two blocks


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention of N query heads over K key heads; scores and softmax in fp32.

    Returns [B,T,N,H] in q's dtype. A query that sees no key gets the mean of all values: such queries are padding, and
    finite numbers are easier to mask than NaN.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH).reshape(B, T, N, H)


def packed_mask(segments_BT: jax.Array) -> jax.Array:
    """[B,T,T]: query t sees key s when s <= t and both belong to the same segment of a packed row."""
    T = segments_BT.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal & (segments_BT[:, :, None] == segments_BT[:, None, :])


def current_backend() -> str:
    """The platform to compile for: that of the current mesh, which may have no real devices, or else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def resolve_kernel(config: ModelConfig, backend: str) -> str:
    """The attention kernel of packed rows on a backend (cpu, gpu or tpu): xla, splash or cudnn.

    `attention_kernel=auto` selects the backend's own kernel if it is exact for the model's dtype and head size, and
    otherwise blocks of plain products (xla).

    Raises:
        UserError: the kernel that the config names cannot run there.
    """
    half = config.compute_dtype in ("bfloat16", "float16")
    limits = {
        "splash": {
            "runs on TPU only": backend == "tpu",
            "does not take model.compute_dtype=float16": config.compute_dtype != "float16",
        },
        "cudnn": {
            "runs on GPU only": backend in ("gpu", "cuda"),
            f"does not take model.compute_dtype={config.compute_dtype}": half,
            f"needs a head_dim that is a multiple of 8 and at most 128, not {config.head_dim}": (
                config.head_dim % 8 == 0 and config.head_dim <= 128
            ),
        },
    }
    if config.attention_kernel == "auto":
        return next((kernel for kernel, held in limits.items() if all(held.values())), "xla")
    _check(limits, "attention_kernel", config.attention_kernel, backend)
    return config.attention_kernel


def packed_attention(
    kernel: str, segments_BT: jax.Array, positions_BT: jax.Array, interpret: bool = False
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Causal attention within the segments of packed rows, as a function of (q [B,T,N,H], k and v [B,T,K,H]).

    A segment is a run of tokens with the same number. If the kernel `shares_prefixes`, a segment also sees the prefix
    that its positions continue (`seen_keys`). Values that all layers share are computed here, once. Under a mesh each
    device runs the kernel on its own rows and heads. `interpret` runs splash without a TPU, for tests.
    """
    rows_BT = seen_keys(segments_BT, positions_BT) if shares_prefixes(kernel) else segments_BT

    def local(q: jax.Array, k: jax.Array, v: jax.Array, rows: Seen | jax.Array) -> jax.Array:
        if kernel == "xla":
            return blocked_attention(q, k, v, rows, current_backend() == "cpu")
        return _cudnn(q, k, v, rows) if kernel == "cudnn" else _splash(q, k, v, rows, interpret)

    def apply(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if jax.sharding.get_abstract_mesh().empty:
            return local(q, k, v, rows_BT)
        rows = meshes.spec("batch", "length")
        queries, keys = (meshes.spec("batch", "length", heads, "head_dim") for heads in ("heads", "kv_heads"))
        split = jax.shard_map(local, in_specs=(queries, keys, keys, rows), out_specs=queries, check_vma=False)
        return split(q, k, v, rows_BT)

    return apply


def shares_prefixes(kernel: str) -> bool:
    """Whether a kernel lets segments share a prefix; the other kernels only compare segment numbers."""
    return kernel == "xla"


def seen_keys(segments_BT: jax.Array, positions_BT: jax.Array) -> Seen:
    """What each token of a packed row sees: its own segment up to itself, and the prefix that the segment continues.

    A segment whose positions begin at p > 0 continues the first p tokens of the last segment before it that began at
    position 0. If there are fewer than p tokens between the two starts, it continues nothing and sees only itself.
    """
    places = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)

    def last(marked: jax.Array) -> jax.Array:
        return jax.lax.cummax(jnp.where(marked, places, 0), axis=1)

    before = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    start, prefix = last(segments_BT != before), last(positions_BT == 0)
    stop = prefix + jnp.take_along_axis(positions_BT, start, axis=1)
    has_prefix = (stop > prefix) & (stop <= start)
    return Seen(start, jnp.where(has_prefix, prefix, start), jnp.where(has_prefix, stop, 0))


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool) -> jax.Array:
    """The TPU kernel: scores stay on the chip, and tiles that no query sees are skipped."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    B, T, N, H = q.shape
    K = k.shape[2]
    block = next(size for size in SPLASH_BLOCKS if -T % size <= T // 16 or size == SPLASH_BLOCKS[-1])
    q = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
    q, k, v, segments = _pad_length(block, q, k, v, segments)
    length = T + -T % block
    # The sizes select a backward pass of two kernels: a single one would write dq once per key block.
    blocks = splash_attention.BlockSizes(*[block] * 8)
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * (N // K))
    kernel = splash_attention.make_splash_mqa_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name=ATTENTION, interpret=interpret
    )
    q_BKGTH = q.reshape(B, length, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    mixed_BKGTH = jax.vmap(over_heads)(q_BKGTH, k_BKTH, v_BKTH, splash_attention.SegmentIds(segments, segments))
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, length, N, H)[:, :T]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """The GPU kernel. It has no segments, so the mask is a bias [B,T,T] in half precision, the same for all heads."""
    T = q.shape[1]
    q, k, v, segments = _pad_length(2, q, k, v, segments)  # its backward pass refuses odd lengths
    mask = packed_mask(segments)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")[:, :T]


def _pad_length(
    multiple: int, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Pad rows to a multiple. The padding is a segment of its own, so no token sees it, and its values are finite."""
    more = -q.shape[1] % multiple
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    return q, k, v, jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1)


def resolve_cache_kernel(config: ModelConfig, backend: str) -> str:
    """The attention kernel of tokens with a paged cache on a backend: ragged (TPU), triton (GPU) or xla.

    Ragged and triton read pages in place. `cache_kernel=auto` selects ragged on TPU if it is exact for the model's
    dtypes and head size, unless `attention_kernel=xla` asks for the plain form everywhere; otherwise xla. Triton was
    not measured on a GPU yet, so it must be set explicitly.

    Raises:
        UserError: the kernel that the config names cannot run there.
    """
    H, dtypes = config.head_dim, (config.compute_dtype, config.cache_dtype)
    limits = {
        "ragged": {
            "runs on TPU only": backend == "tpu",
            f"needs a head_dim that is a multiple of 128, not {H}": H % 128 == 0,
            "does not take float16": "float16" not in dtypes,
        },
        "triton": {
            "runs on GPU only": backend in ("gpu", "cuda"),
            f"needs a head_dim of 16, 32, 64, 128 or 256, not {H}": H in (16, 32, 64, 128, 256),
            "needs model.compute_dtype and model.cache_dtype to be the same half precision": (
                dtypes[0] == dtypes[1] != "float32"
            ),
        },
    }
    if config.cache_kernel == "auto":
        ragged = config.attention_kernel != "xla" and all(limits["ragged"].values())
        return "ragged" if ragged else "xla"
    _check(limits, "cache_kernel", config.cache_kernel, backend)
    return config.cache_kernel


def _check(limits: dict[str, dict[str, bool]], key: str, kernel: str, backend: str) -> None:
    """Refuse the kernel that a config names if one of its limits does not hold."""
    for reason, held in limits.get(kernel, {}).items():
        if not held:
            raise UserError(f"model.{key}={kernel} {reason}, and this run is on {backend}; set model.{key}=auto")


def paged_attention(
    kernel: str, layers: int, table_BP: jax.Array, start_B: jax.Array, count_B: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Write a layer's new entries after each row's first `start`, and let their queries see the row up to themselves.

    Returns a function of (pool, layer, q [B,T,N,H], k and v [B,T,K,H]) to (attention [B,T,N,H], pool). `table` has the
    pages of each row, for at least start + count tokens. Tokens beyond `count` are padding: they are not written, and
    their results have no meaning.
    """

    def apply(pages: jax.Array, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array):
        T, first_page = q.shape[1], layer * (pages.shape[0] // layers)
        offsets = jnp.arange(T)
        positions_BT = start_B[:, None] + offsets
        pages = write_pages(pages, first_page, table_BP, positions_BT, offsets < count_B[:, None], k, v)
        if kernel == "ragged":
            return _ragged(q, pages, table_BP + first_page, start_B, count_B), pages
        if kernel == "triton" and T == 1:
            return _triton(q, pages, table_BP + first_page, jnp.where(count_B > 0, start_B + 1, 0)), pages
        keys, values = (x.astype(q.dtype) for x in read_pages(pages, first_page, table_BP))
        places = jnp.arange(keys.shape[1])
        written_BS = places < (start_B + count_B)[:, None]
        values = jnp.where(written_BS[..., None, None], values, 0)
        return attend(q, keys, values, places <= positions_BT[..., None]), pages

    return apply


def _ragged(
    q_BTNH: jax.Array,
    pages: jax.Array,
    table_BP: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    kernel: Callable | None = None,
) -> jax.Array:
    """The TPU kernel for rows of any length, on each device's own heads. It treats all T queries of a row as real."""
    if kernel is None:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention as kernel
    B, T, N, H = q_BTNH.shape
    page_size = pages.shape[1]
    # Rows without tokens get a length of only T. Padding queries come after the last real one, and may reach beyond the
    # table, so it is padded; any page will do there.
    lengths_B = jnp.where(count_B > 0, start_B, 0) + T
    if T > 1:
        table_BP = jnp.pad(table_BP, ((0, 0), (0, -(-T // page_size))))
    ends = jnp.arange(B + 1, dtype=jnp.int32) * T

    def local(q: jax.Array, pages: jax.Array, lengths: jax.Array, table: jax.Array, ends: jax.Array) -> jax.Array:
        # Fixed block sizes, as in the kernel's own table for such shapes. The kernel itself would choose by the TPU of
        # this process, and a program may be compiled for another one.
        token_bytes = pages[0, 0].size * pages.dtype.itemsize
        block = min(RAGGED_BLOCK, RAGGED_BUFFER // token_bytes)
        sizes = {
            "num_kv_pages_per_block": min(max(block // page_size, 1), table.shape[1]),
            "num_queries_per_block": min(RAGGED_QUERIES, B * T),
        }
        return kernel(q, pages, lengths, table, ends, jnp.array([B], jnp.int32), sm_scale=H**-0.5, **sizes)

    arguments = q_BTNH.reshape(B * T, N, H), pages, lengths_B.astype(jnp.int32), table_BP.astype(jnp.int32), ends
    if not jax.sharding.get_abstract_mesh().empty:
        queries = meshes.spec(None, "heads", "head_dim")
        specs = queries, meshes.spec(None, None, "kv_heads", "head_dim"), *[meshes.spec()] * 3
        local = jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)
    return local(*arguments).reshape(B, T, N, H)


def _triton(q_B1NH: jax.Array, pages: jax.Array, table_BP: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The GPU kernel for one token a row, on each device's own heads."""
    decode = paged_decode
    if not jax.sharding.get_abstract_mesh().empty:
        queries = meshes.spec(None, "heads", "head_dim")
        specs = queries, meshes.spec(None, None, "kv_heads", "head_dim"), meshes.spec(), meshes.spec()
        decode = jax.shard_map(decode, in_specs=specs, out_specs=queries, check_vma=False)
    return decode(q_B1NH[:, 0], pages, table_BP.astype(jnp.int32), lengths_B.astype(jnp.int32))[:, None]


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, [B,T,1,H/2] fp32."""

    cos: jax.Array
    sin: jax.Array


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians per position of a head's H/2 pairs, and the factor on their cosines and sines.

    YaRN (arXiv 2309.00071, as `transformers` computes it) divides frequencies by the factor if they turn less than
    `yarn_beta_slow` times over the original length, keeps those that turn more than `yarn_beta_fast` times, and blends
    the ones between by their index. Llama 3 (arXiv 2407.21783, in the form of its published code) does the same between
    `llama3_low_factor` and `llama3_high_factor` turns, and blends by the number of turns. Each step is rounded to fp32
    as in torch: at position 32,768 one more rounding of a frequency changes an angle by 2e-3 radians.
    """
    c, pairs = config, config.head_dim // 2
    exponents = np.arange(0, c.head_dim, 2, dtype=np.float32) / np.float32(c.head_dim)
    periods = np.power(c.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    kept = np.float32(1) / periods
    if c.llama3_factor:
        turns = np.float32(c.llama3_original_length) / (np.float32(2 * math.pi) / kept)
        low, high = np.float32(c.llama3_low_factor), np.float32(c.llama3_high_factor)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - keep) * kept / np.float32(c.llama3_factor) + keep * kept, 1.0
    if not c.yarn_factor:
        return kept, 1.0

    def pair_that_turns(times: float) -> float:
        length = c.yarn_original_length / (times * 2 * math.pi)
        return c.head_dim * math.log(length) / (2 * math.log(c.rope_theta))

    low = max(math.floor(pair_that_turns(c.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(c.yarn_beta_slow)), c.head_dim - 1)
    span = high - low or 0.001
    keep = 1 - np.clip((np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    stretched = np.float32(1) / (np.float32(c.yarn_factor) * periods)
    factor = c.yarn_attention_factor or (0.1 * math.log(c.yarn_factor) + 1 if c.yarn_factor > 1 else 1.0)
    return stretched * (1 - keep) + kept * keep, factor


def rotation(config: ModelConfig, positions_BT: jax.Array) -> Rotation:
    """The rotation of these positions, which is the same for all heads and layers."""
    frequencies, factor = rotary_frequencies(config)
    angles = (positions_BT[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x_BTNH: jax.Array, rope: Rotation) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) in Qwen's layout: elements i of a head's two halves form a pair."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_BTNH.dtype)
