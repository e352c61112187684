"""Every attention kernel compared with the plain form; the plain form and rotary positions compared with NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention
from pydantic import ValidationError

from retool_jax.errors import UserError
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.attention import (
    _ragged,
    attend,
    current_backend,
    packed_attention,
    packed_mask,
    paged_attention,
    resolve_cache_kernel,
    resolve_kernel,
    rotary_frequencies,
    rotate,
    rotation,
)
from retool_jax.models.cache import init_cache, read_pages
from retool_jax.models.config import ModelConfig


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attention computed for one query and one head at a time, in float64."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attend_is_grouped_softmax_attention(kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 4, 8))
    k, v = rng.normal(size=(2, 2, 7, kv_heads, 8))
    mask = rng.random((2, 5, 7)) < 0.5
    mask[:, :, 0] = True
    ours = jax.jit(attend)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(ours, reference(q, k, v, mask), atol=1e-5)


def test_a_query_that_sees_nothing_is_finite_forwards_and_backwards():
    q = jnp.ones((1, 2, 2, 4))
    mask = jnp.array([[[True, False, False], [False, False, False]]])
    run = jax.jit(jax.value_and_grad(lambda k: attend(q, k, k, mask).sum()))
    value, gradient = run(jnp.ones((1, 3, 1, 4)))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_packed_mask_is_causal_within_a_segment():
    mask = np.asarray(packed_mask(jnp.array([[1, 1, 2, 2, 0]])))[0]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def packed_case(rows: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: str) -> tuple:
    """q, k, v, a gradient of the output, and segments of different lengths with padding after them."""
    rng = np.random.default_rng(length + heads)
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(2, length - 3), 3, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            segments[row, start:end] = number
    return *arrays, jnp.asarray(segments)


def outputs_and_gradients(kernel: str, case: tuple, interpret: bool = False) -> list[np.ndarray]:
    *inputs, cotangent, segments = case

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # most of the time is compilation
    def run(*inputs: jax.Array) -> tuple:
        output, back = jax.vjp(packed_attention(kernel, segments, jnp.zeros_like(segments), interpret), *inputs)
        return output, *back(cotangent)

    return [np.asarray(x, np.float32) for x in run(*inputs)]


@pytest.mark.parametrize(
    ("rows", "length", "heads", "kv_heads", "head_dim"),
    [(2, 128, 2, 2, 128), (1, 256, 4, 2, 64), (1, 130, 5, 1, 80)],
)
def test_splash_equals_the_plain_form_forwards_and_backwards(rows, length, heads, kv_heads, head_dim):
    """Interpreted; 130 is not a multiple of its tiles."""
    case = packed_case(rows, length, heads, kv_heads, head_dim, "float32")
    splash, xla = outputs_and_gradients("splash", case, True), outputs_and_gradients("xla", case)
    for ours, plain in zip(splash, xla, strict=True):
        np.testing.assert_allclose(ours, plain, atol=2e-5)
        assert np.abs(plain).max() > 1.0


def test_splash_in_bfloat16_is_as_near_to_fp32_as_the_plain_form():
    half = packed_case(1, 128, 4, 2, 128, "bfloat16")
    exact = outputs_and_gradients("xla", (*(x.astype(jnp.float32) for x in half[:-1]), half[-1]))
    pairs = zip(outputs_and_gradients("splash", half, True), outputs_and_gradients("xla", half), exact, strict=True)
    for ours, plain, reference in pairs:
        error, usual = (np.linalg.norm(x - reference) / np.linalg.norm(reference) for x in (ours, plain))
        assert error < 1.5 * usual + 1e-3 and error < 0.01


def test_splash_on_a_mesh_splits_rows_and_heads_and_changes_nothing():
    case = packed_case(4, 128, 4, 2, 64, "float32")
    plain = outputs_and_gradients("xla", case)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        ours = outputs_and_gradients("splash", case, True)
    for x, y in zip(ours, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="cuDNN needs a GPU; with one, run this file with --noconftest"
)
def test_cudnn_equals_the_plain_form_forwards_and_backwards():
    for heads, kv_heads, head_dim in ((4, 4, 64), (4, 2, 128), (5, 1, 80)):
        case = packed_case(2, 129, heads, kv_heads, head_dim, "bfloat16")
        for ours, plain in zip(outputs_and_gradients("cudnn", case), outputs_and_gradients("xla", case), strict=True):
            assert np.linalg.norm(ours - plain) / np.linalg.norm(plain) < 0.01, (heads, kv_heads, head_dim)


@pytest.mark.parametrize(
    ("backend", "config", "kernel"),
    [
        ("cpu", {}, "xla"),
        ("cpu", {"compute_dtype": "bfloat16"}, "xla"),
        ("tpu", {"compute_dtype": "bfloat16"}, "splash"),
        ("tpu", {}, "splash"),
        ("tpu", {"compute_dtype": "float16"}, "xla"),
        ("gpu", {"compute_dtype": "bfloat16"}, "cudnn"),
        ("gpu", {}, "xla"),
        ("gpu", {"compute_dtype": "bfloat16", "head_dim": 160}, "xla"),
        ("tpu", {"attention_kernel": "xla"}, "xla"),
    ],
)
def test_auto_takes_the_backends_kernel_where_it_is_exact(backend, config, kernel):
    assert resolve_kernel(ModelConfig(**config), backend) == kernel


@pytest.mark.parametrize(
    ("backend", "config", "message"),
    [
        ("cpu", {"attention_kernel": "splash"}, "attention_kernel=splash runs on TPU only, and this run is on cpu"),
        ("tpu", {"attention_kernel": "cudnn"}, "attention_kernel=cudnn runs on GPU only"),
        ("gpu", {"attention_kernel": "cudnn"}, "does not take model.compute_dtype=float32"),
        ("gpu", {"attention_kernel": "cudnn", "compute_dtype": "bfloat16", "head_dim": 10}, "head_dim.* not 10"),
        ("tpu", {"attention_kernel": "splash", "compute_dtype": "float16"}, "compute_dtype=float16"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_by_name(backend, config, message):
    with pytest.raises(UserError, match=message) as error:
        resolve_kernel(ModelConfig(**config), backend)
    assert "\n" not in str(error.value)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValidationError, match=r"attention_kernel\s.*'auto', 'xla', 'splash' or 'cudnn'"):
        ModelConfig(attention_kernel="flash")


def test_the_backend_is_that_of_the_mesh_in_use():
    assert current_backend() == "cpu"
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert jax.jit(lambda x: (x, current_backend() == "cpu"))(1)[1]


# --- tokens with a cache ----------------------------------------------------------------------------------------------

CACHED = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
TABLE = np.array([[3, 0, 6], [1, 7, 2], [5, 4, 8]])  # of pages with 4 tokens
START, COUNT = np.array([5, 0, 11]), np.array([3, 4, 1])


@jax.jit
def paged(
    pool: jax.Array, layer: jax.Array, start: jax.Array, count: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The plain form, compiled once for each number of tokens."""
    return paged_attention("xla", 2, TABLE, start, count)(pool, layer, q, k, v)


def full_pool(rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.normal(size=init_cache(CACHED, 9, 4).shape), jnp.float32)


def queries(rng: np.random.Generator, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tuple(jnp.asarray(rng.normal(size=(3, T, n, 8)), jnp.float32) for n in (4, 2, 2))


@pytest.mark.parametrize("layer", [0, 1])
def test_paged_attention_writes_its_rows_and_attends_to_all_of_them(layer):
    rng = np.random.default_rng(0)
    pool, (q, k, v) = full_pool(rng), queries(rng, 4)
    mixed, after = paged(pool, layer, START, COUNT, q, k, v)
    expected = np.asarray(pool).copy()
    for row in range(3):
        for t in range(COUNT[row]):
            page, at = divmod(int(START[row]) + t, 4)
            expected[layer * 9 + TABLE[row, page], at, 0::2], expected[layer * 9 + TABLE[row, page], at, 1::2] = (
                k[row, t],
                v[row, t],
            )
    np.testing.assert_array_equal(after, expected)
    keys, values = read_pages(after, layer * 9, TABLE)
    mask = np.arange(12) <= (START[:, None] + np.arange(4))[..., None]
    ours = reference(*(np.asarray(x) for x in (q, keys, values)), mask)
    for row in range(3):
        np.testing.assert_allclose(mixed[row, : COUNT[row]], ours[row, : COUNT[row]], atol=1e-5)


@pytest.mark.parametrize("T", [1, 4])
def test_the_ragged_kernels_arguments_mean_what_the_plain_form_computes(T):
    """With the kernel's own reference, since it has no interpret mode; full rows, and rows without tokens."""
    rng = np.random.default_rng(0)
    pool, (q, k, v) = full_pool(rng), queries(rng, T)
    count = np.minimum(COUNT, T) * [1, 0, 1]
    expected, pool = paged(pool, 1, START, count, q, k, v)
    seen = []

    def kernel(*arguments, num_kv_pages_per_block: int, num_queries_per_block: int, **options) -> jax.Array:
        seen.append((num_kv_pages_per_block, num_queries_per_block))
        return ref_ragged_paged_attention(*arguments, **options)

    ours = _ragged(q, pool, jnp.asarray(TABLE + 9, jnp.int32), jnp.asarray(START), jnp.asarray(count), kernel)
    for row in range(3):
        np.testing.assert_allclose(ours[row, : count[row]], expected[row, : count[row]], atol=1e-5)
    assert seen == [(3 if T == 1 else 4, 3 * T)]


@pytest.mark.parametrize("left", [np.nan, np.inf])
@pytest.mark.parametrize("T", [1, 4])
def test_stale_entries_after_a_row_have_no_effect(left, T):
    """A weight of 0 times NaN would be NaN, so stale values must be masked."""
    rng = np.random.default_rng(0)
    pool, (q, k, v) = full_pool(rng), queries(rng, T)
    count = np.minimum(COUNT, T)
    dirty = np.full(pool.shape, left, np.float32)
    for row in range(3):
        for at in range(START[row]):
            page = TABLE[row, at // 4] + np.array([0, 9])
            dirty[page, at % 4] = np.asarray(pool)[page, at % 4]
    clean, _ = paged(pool, 1, START, count, q, k, v)
    ours, _ = paged(jnp.asarray(dirty), 1, START, count, q, k, v)
    for row in range(3):
        np.testing.assert_array_equal(ours[row, : count[row]], clean[row, : count[row]])


@pytest.mark.parametrize(
    ("backend", "config", "kernel"),
    [
        ("cpu", {"head_dim": 128}, "xla"),
        ("gpu", {"head_dim": 128}, "xla"),
        ("tpu", {"head_dim": 128}, "ragged"),
        ("tpu", {"head_dim": 128, "compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}, "ragged"),
        ("tpu", {"head_dim": 64}, "xla"),
        ("tpu", {"head_dim": 128, "cache_dtype": "float16"}, "xla"),
        ("tpu", {"head_dim": 128, "attention_kernel": "xla"}, "xla"),
        ("tpu", {"head_dim": 128, "cache_kernel": "xla"}, "xla"),
        (
            "gpu",
            {"head_dim": 64, "compute_dtype": "bfloat16", "cache_dtype": "bfloat16", "cache_kernel": "triton"},
            "triton",
        ),
    ],
)
def test_the_cache_is_read_in_place_where_the_kernel_can(backend, config, kernel):
    assert resolve_cache_kernel(ModelConfig(**config), backend) == kernel


@pytest.mark.parametrize(
    ("backend", "config", "message"),
    [
        ("cpu", {"cache_kernel": "ragged"}, "cache_kernel=ragged runs on TPU only, and this run is on cpu"),
        ("tpu", {"cache_kernel": "ragged", "head_dim": 64}, "multiple of 128, not 64"),
        ("tpu", {"cache_kernel": "triton"}, "cache_kernel=triton runs on GPU only"),
        ("gpu", {"cache_kernel": "triton", "head_dim": 80}, "16, 32, 64, 128 or 256, not 80"),
        ("gpu", {"cache_kernel": "triton", "head_dim": 64, "cache_dtype": "bfloat16"}, "same half precision"),
    ],
)
def test_a_cache_kernel_that_cannot_run_is_refused_by_name(backend, config, message):
    with pytest.raises(UserError, match=message):
        resolve_cache_kernel(ModelConfig(**config), backend)


@pytest.mark.parametrize("theta", [10_000.0, 5_000_000.0])
def test_rotate_turns_the_two_halves_as_complex_numbers(theta):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 2, 10)).astype(np.float32)
    positions = np.array([[0, 1, 2], [7, 100, 32_767]])
    config = ModelConfig(head_dim=10, rope_theta=theta)
    frequencies = np.float32(1) / (theta ** (np.arange(5) / 5)).astype(np.float32)
    angles = (positions[..., None, None].astype(np.float32) * frequencies).astype(np.float64)
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angles)
    ours = jax.jit(lambda x, p: rotate(x, rotation(config, p)))(x, positions)
    # One ulp of the largest angle is 2e-3; the exponents of the frequencies may add one rounding.
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], -1), atol=1e-2)
    np.testing.assert_allclose(ours[0], np.concatenate([turned.real, turned.imag], -1)[0], atol=1e-6)


def test_rotated_scores_depend_on_distance_alone():
    rng = np.random.default_rng(2)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)
    config = ModelConfig(head_dim=8)

    @jax.jit
    def score(at: int) -> jax.Array:
        turned = [rotate(x, rotation(config, jnp.reshape(place, (1, 1)))) for x, place in ((q, at + 9), (k, at))]
        return jnp.vdot(*turned)

    np.testing.assert_allclose([score(3), score(40)], score(0), atol=1e-5)


def test_yarn_keeps_fast_turns_stretches_slow_ones_and_blends_between():
    plain, _ = rotary_frequencies(ModelConfig(head_dim=128, rope_theta=1e6))
    config = ModelConfig(head_dim=128, rope_theta=1e6, yarn_factor=4.0, yarn_original_length=32_768)
    ours, factor = rotary_frequencies(config)
    turns = 32_768 * plain / (2 * np.pi)
    ratio = plain / ours
    np.testing.assert_array_equal(ratio[turns > 40], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.8], 4.0, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-6).all() and ((ratio > 1.01) & (ratio < 3.99)).sum() > 5
    assert factor == pytest.approx(0.1 * np.log(4.0) + 1)
    positions = jnp.array([[5]])
    given = ModelConfig(**vars(config) | {"yarn_attention_factor": 1.25})
    np.testing.assert_allclose(rotation(given, positions).cos, 1.25 * np.cos(5 * ours)[None, None, None], atol=1e-6)
