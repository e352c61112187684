"""The decoder equals transformers on small random models: files, logits, gradients and greedy tokens."""

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # what needs PyTorch is imported when a test asks for it, since that takes seconds

from retool_jax.engine.engine import Engine, EngineConfig
from retool_jax.models import config as configs
from retool_jax.models.config import ModelConfig, config_from_hf
from retool_jax.models.decoder import Params, abstract_params, forward, logits
from retool_jax.models.huggingface import load_params, save_params

VOCAB, LENGTH = 67, 24
QWEN3 = {"qkv_bias": False, "qk_norm": True}
LLAMA = {"qkv_bias": False, "qk_norm": False}
LLAMA3 = LLAMA | {"llama3_factor": 8.0, "llama3_original_length": 8192, "rope_theta": 5e5, "rms_norm_eps": 1e-5}


def small(heads: int, kv_heads: int, head_dim: int, **changes) -> ModelConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_layers": 2}
    return ModelConfig(**sizes | changes, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)


YARN = {"yarn_factor": 4.0, "yarn_original_length": 8192, "rms_norm_eps": 1e-5}
CASES = {
    "qwen2-mha": small(4, 4, 14, rope_theta=1e6),
    "qwen2-pairs": small(4, 2, 10, tie_embeddings=False, rope_theta=5e6),
    "qwen2-fives": small(5, 1, 14, rope_theta=1e6, rms_norm_eps=1e-5),
    "qwen2-sevens": small(14, 2, 80, tie_embeddings=False, rope_theta=5e6),
    "qwen2-one-head": small(1, 1, 128),
    "qwen2-mqa": small(7, 1, 6, rope_theta=5e6),
    "qwen3-mha": small(2, 2, 10, **QWEN3, tie_embeddings=False, rope_theta=5e6),
    "qwen3-pairs": small(4, 2, 14, **QWEN3, rope_theta=1e6),
    "qwen3-fives": small(10, 2, 80, **QWEN3, tie_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-5),
    "qwen3-sevens": small(7, 1, 26, **QWEN3, rope_theta=5e6, max_positions=4096),
    "qwen3-wide-heads": small(2, 1, 128, **QWEN3, tie_embeddings=False, rope_theta=5e6),
    "qwen3-mqa": small(5, 1, 14, **QWEN3),
    "qwen2-yarn": small(4, 2, 80, **YARN, tie_embeddings=False, rope_theta=1e6),
    "qwen3-yarn": small(
        *(5, 1, 128),
        **QWEN3,
        **YARN,
        rope_theta=5e6,
        yarn_attention_factor=1.05,
        yarn_beta_fast=24.0,
        yarn_beta_slow=2.0,
    ),
    "llama-threes": small(9, 3, 64, **LLAMA, hidden_size=36, rope_theta=1e5, rms_norm_eps=1e-5, max_positions=8192),
    "llama3-pairs": small(4, 2, 32, **LLAMA3, tie_embeddings=False),
    "llama3-mqa": small(5, 1, 128, hidden_size=20, **(LLAMA3 | {"llama3_factor": 32.0, "llama3_low_factor": 2.0})),
}
# The models whose differences matter to a cache: heads and their sizes, norms, rotations; not biases and tied heads.
DECODED = (
    *("qwen2-mha", "qwen2-pairs", "qwen2-sevens", "qwen3-mqa", "qwen3-wide-heads", "qwen2-yarn", "qwen3-yarn"),
    "llama3-pairs",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread(torch: ModuleType) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_params(config: ModelConfig, seed: int) -> Params:
    """Every weight random, so that a swapped layer, head or axis shows; matrices keep activations near 1."""
    rng = np.random.default_rng(seed)
    into = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}

    def draw(path: tuple, weight: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-2].key
        if name.endswith("norm"):
            values = rng.normal(1.0, 0.3, weight.shape)
        elif name.endswith("bias") or name in ("embedding", "head"):
            values = rng.normal(0.0, 0.3, weight.shape)
        else:
            values = rng.normal(0.0, into.get(name, config.hidden_size) ** -0.5, weight.shape)
        return jnp.asarray(values, weight.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config)[1])


@pytest.fixture(scope="module")
def pair(torch: ModuleType, tmp_path_factory) -> Callable[[str], tuple]:
    """A model by its name, read by transformers from a folder that we wrote; our config and weights; the folder."""

    @cache
    def make(name: str) -> tuple:
        config, folder = CASES[name], tmp_path_factory.mktemp(name) / "model"
        params = random_params(config, list(CASES).index(name))
        save_params(config, params, folder, max_shard_bytes=20_000)
        theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return theirs.eval(), config, params, folder

    return make


def our_layout(config: ModelConfig, tensors: dict[str, np.ndarray]) -> Params:
    """Tensors or gradients of transformers in our layout: theirs are [out,in], ours [in,out] with heads split."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim

    def stack(name: str, heads: int = 0) -> np.ndarray:
        layers = [tensors[f"model.layers.{i}.{name}"].T for i in range(config.num_layers)]
        return np.stack([x.reshape(*x.shape[:-1], heads, H) if heads else x for x in layers])

    layers = {
        "attention_norm": stack("input_layernorm.weight"),
        "mlp_norm": stack("post_attention_layernorm.weight"),
        "q": stack("self_attn.q_proj.weight", N),
        "k": stack("self_attn.k_proj.weight", K),
        "v": stack("self_attn.v_proj.weight", K),
        "o": stack("self_attn.o_proj.weight").reshape(config.num_layers, N, H, config.hidden_size),
        "gate": stack("mlp.gate_proj.weight"),
        "up": stack("mlp.up_proj.weight"),
        "down": stack("mlp.down_proj.weight"),
    }
    if config.qkv_bias:
        layers |= {f"{x}_bias": stack(f"self_attn.{x}_proj.bias", n) for x, n in (("q", N), ("k", K), ("v", K))}
    if config.qk_norm:
        layers |= {f"{x}_norm": stack(f"self_attn.{x}_norm.weight") for x in "qk"}
    values = {"embedding": tensors["model.embed_tokens.weight"], "final_norm": tensors["model.norm.weight"]}
    if not config.tie_embeddings:
        values["head"] = tensors["lm_head.weight"]
    assert len(tensors) == config.num_layers * len(layers) + len(values)  # none is left behind
    return ours_from(config, values, layers)


def ours_from(config: ModelConfig, values: dict, layers: dict) -> Params:
    result = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config)[1])
    for node, new in ((result, values), (result["layers"], layers)):
        assert set(new) == set(node) - {"layers"}
        for name, value in new.items():
            assert node[name][...].shape == value.shape, name
            node[name][...] = value
    return result


def rows() -> tuple[list[dict], dict[str, np.ndarray]]:
    """Sequences with their places and positions, and the rows that hold them: left-padded, right-padded, packed."""
    rng = np.random.default_rng(0)
    packed = [(2, 0, 8, 0), (2, 8, 10, 32_000), (2, 10, 22, 0)]  # row, start, stop, first position
    places = [(0, 9, LENGTH, 0), (1, 0, 17, 0), *packed, (3, 0, LENGTH, 32_744)]
    tokens, positions, segments = (np.zeros((4, LENGTH), np.int32) for _ in range(3))
    tokens[:] = rng.integers(0, VOCAB, tokens.shape)  # padding has no special id
    sequences = []
    for number, (row, start, stop, first) in enumerate(places, start=1):
        positions[row, start:stop] = np.arange(first, first + stop - start)
        segments[row, start:stop] = number
        sequences.append({"row": row, "span": slice(start, stop)})
    return sequences, {"tokens": tokens, "positions": positions, "segments": segments}


@pytest.mark.parametrize("name", CASES)
def test_files_are_read_back_bit_for_bit_and_have_the_layout_of_transformers(name, pair, mesh):
    theirs, config, params, folder = pair(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert config_from_hf(folder) == config
    laid_out = our_layout(config, {key: parameter.detach().numpy() for key, parameter in theirs.named_parameters()})
    for found in (load_params(config, folder, mesh), laid_out):
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_those_of_transformers(name, torch, pair):
    theirs, config, params, _ = pair(name)
    theirs.zero_grad()
    sequences, arrays = rows()
    weights = np.random.default_rng(1).normal(size=(4, LENGTH, VOCAB)).astype(np.float32)
    sampled = (np.random.default_rng(2).random((4, LENGTH, 1)) < 0.6) & (arrays["segments"][..., None] > 0)
    weights *= sampled  # a loss that sees some tokens of every sequence and no padding

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # most of the time is compilation
    def ours(params: Params) -> tuple:
        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            values = logits(config, params, forward(config, params, *arrays.values()))
            return jnp.sum(jax.nn.log_softmax(values) * weights), values

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, values), gradient = jax.device_get(ours(params))  # JAX would compile each difference and each slice
    worst = size = 0.0
    for sequence in sequences:  # each alone in transformers, which has no packing
        at = (sequence["row"], sequence["span"])
        expected = theirs(
            torch.tensor(arrays["tokens"][at])[None].long(),
            position_ids=torch.tensor(arrays["positions"][at])[None].long(),
            use_cache=False,
        ).logits[0]
        (torch.log_softmax(expected, -1) * torch.tensor(weights[at])).sum().backward()
        worst = max(worst, np.abs(values[at] - expected.detach().numpy()).max())
        size = max(size, np.abs(values[at]).max())
    assert size > 1.0
    assert worst <= 2e-4
    exact = our_layout(config, {key: x.grad.numpy() for key, x in theirs.named_parameters()})
    relative = jax.tree.map(lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y)), gradient, exact)
    assert max(jax.tree.leaves(relative)) <= 1e-3
    print(f"{name}: logits {worst:.1e} of {size:.1f}, gradients {max(jax.tree.leaves(relative)):.1e}")


def test_left_padded_batches_are_what_transformers_masks(torch, pair):
    """Left padding in transformers, an attention mask over a batch, compared with our segments."""
    theirs, config, params, _ = pair("qwen3-pairs")
    tokens = np.random.default_rng(3).integers(0, VOCAB, (2, 12))
    real = np.arange(12) >= np.array([[5], [0]])
    positions = np.maximum(np.cumsum(real, 1) - 1, 0)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(real).long(), position_ids=torch.tensor(positions)
        ).logits.numpy()
    whole = jax.jit(lambda params, *arrays: logits(config, params, forward(config, params, *arrays)))
    ours = whole(params, tokens, positions, real.astype(np.int32))
    assert np.abs(np.asarray(ours) - expected)[real].max() <= 2e-4


@pytest.mark.parametrize("name", DECODED)
def test_greedy_decoding_equals_generate_token_by_token(name, torch, pair, greedy, mesh):
    theirs, config, params, _ = pair(name)
    sizes = EngineConfig(slots=4, max_length=80, decode_steps=16, token_buckets=(16,))
    engine = Engine(config, sizes, params, mesh, [], 0)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (3, 11, 16)]
    ours = greedy(engine, prompts, 64)
    padded = torch.tensor([[0] * (16 - len(prompt)) + prompt for prompt in prompts])
    real = torch.arange(16) >= torch.tensor([[16 - len(prompt)] for prompt in prompts])
    expected = theirs.generate(
        padded, attention_mask=real.long(), max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=[]
    )[:, 16:].tolist()
    assert [len(ids) for ids in expected] == [64, 64, 64]
    assert ours == expected
    assert len({token for ids in ours for token in ids}) > 2  # not the same token repeated


def parameters(config: ModelConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)[1]))


def from_published(hf: dict) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        tie_embeddings=hf["tie_word_embeddings"],
        qkv_bias=hf["attention_qkv_bias"],
        qk_norm=hf["qk_norm"],
    )


def test_two_published_models_have_their_published_sizes():
    qwen25_32b = ModelConfig(
        vocab_size=152_064,
        hidden_size=5120,
        intermediate_size=27_648,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=False,
    )
    qwen3_8b = ModelConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
    )
    assert [f"{parameters(config) / 1e9:.2f}" for config in (qwen25_32b, qwen3_8b)] == ["32.76", "8.19"]


def test_every_published_model_has_its_published_size(published_configs):
    assert len(published_configs) >= 20
    sizes = {name: parameters(from_published(hf)) for name, hf in published_configs.items()}
    assert sizes == {name: hf["n_params"] for name, hf in published_configs.items()}


def test_the_page_about_models_runs(monkeypatch, tmp_path):
    """The example of docs/models.md, which adds a family without editing a file."""
    page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    (example,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(configs, "FAMILIES", dict(configs.FAMILIES))
    monkeypatch.setattr(configs, "IRRELEVANT", set(configs.IRRELEVANT))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    exec(compile(example, page, "exec"), {})
    assert "seed_oss" in configs.FAMILIES
