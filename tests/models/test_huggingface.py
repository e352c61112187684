"""Weights go to Hugging Face folders and back bit for bit; a damaged or foreign folder is reported, not loaded."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers  # what needs PyTorch is imported when a test asks for it, since that takes seconds
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from retool_jax.errors import UserError
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig, config_from_hf
from retool_jax.models.decoder import abstract_params, forward, logits
from retool_jax.models.huggingface import find_folder, load_params, save_params
from retool_jax.models.safetensors import INDEX, read_headers
from retool_jax.models.sharding import param_shardings

V, L = 96, 2
QWEN3 = {"qkv_bias": False, "qk_norm": True}


def small(heads: int, kv_heads: int, head_dim: int, **changes) -> ModelConfig:
    sizes = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_layers": L}
    return ModelConfig(**sizes, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **changes)


def random_params(config: ModelConfig, seed: int = 0):
    """Random weights, all different, so that a swapped layer, head or axis shows."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)[1]
    return jax.tree.map(lambda x: jax.device_put(rng.normal(0.1, 0.5, x.shape).astype(x.dtype)), shapes)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def our_logits(config: ModelConfig, params, ids: np.ndarray) -> np.ndarray:
    @jax.jit
    def compute(params, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return logits(config, params, forward(config, params, tokens, positions, jnp.ones_like(tokens)))

    return np.asarray(compute(params, ids))


def their_logits(torch: ModuleType, model: "transformers.PreTrainedModel", ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_what_transformers_saves_is_read(family, tied, torch, mesh, tmp_path):
    torch.manual_seed(0)
    name = family.capitalize()
    config_of, model_of = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | ({"head_dim": 10} if family == "qwen3" else {})
    rope = {"rope_type": "default", "rope_theta": 1e5}
    if family == "llama" and tied:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 64}
    theirs = model_of(config_of(**sizes, **heads, tie_word_embeddings=tied, rope_parameters=rope))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    config = config_from_hf(tmp_path)
    ids = np.random.default_rng(1).integers(0, V, (2, 11))
    ours = our_logits(config, load_params(config, tmp_path, mesh), ids)
    np.testing.assert_allclose(ours, their_logits(torch, theirs, ids), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", MeshConfig(fsdp=8)),
        ("qwen2", MeshConfig(fsdp=4, tp=2)),
        ("qwen3", MeshConfig(fsdp=4, tp=2)),
        ("qwen3", MeshConfig(data=2, fsdp=2, tp=2)),
    ],
)
def test_a_mesh_of_eight_gets_what_one_device_gets(family, sizes, mesh, tmp_path):
    config = small(4, 2, 6, tie_embeddings=False, **(QWEN3 if family == "qwen3" else {}))
    params = random_params(config)
    save_params(config, params, tmp_path / "out")
    eight = make_mesh(sizes)
    loaded = load_params(config, tmp_path / "out", eight)
    assert_same(loaded, params)
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(param_shardings(config, eight)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    save_params(config, loaded, tmp_path / "again")  # and from shards
    assert_same(load_params(config, tmp_path / "again", mesh), params)


def test_a_shard_reads_its_own_slice_and_no_other_byte(tmp_path):
    config = small(4, 2, 6)
    params = random_params(config)
    save_params(config, params, tmp_path / "out")
    tensor = read_headers(tmp_path / "out")["model.layers.1.self_attn.q_proj.weight"]
    rows = np.asarray(params["layers"]["q"][...])[1].reshape(24, 24).T
    # The rest of the file is overwritten, so that a read outside the slice shows.
    data = bytearray(tensor.file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[tensor.name]["data_offsets"][0]
    wanted = {start + (row * 24 + column) * 4 for row in range(6, 12) for column in range(8, 16)}
    for at in range(start, start + 24 * 24 * 4, 4):
        if at not in wanted:
            data[at : at + 4] = b"\xff" * 4
    tensor.file.write_bytes(data)
    np.testing.assert_array_equal(tensor.read(slice(6, 12), slice(8, 16)), rows[6:12, 8:16])
    np.testing.assert_array_equal(tensor.read(slice(11, 11)), np.zeros((0, 24)))


def test_dtypes_are_converted_as_jax_does(mesh, tmp_path):
    config = small(4, 2, 6)
    params = random_params(config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_params(config, params, tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype.name for tensor in read_headers(tmp_path / "out").values()} == {"bfloat16"}
    assert_same(load_params(replace(config, param_dtype="bfloat16"), tmp_path / "out", mesh), rounded)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert_same(load_params(config, tmp_path / "out", mesh), widened)


def test_a_folder_of_bfloat16_is_bfloat16_to_transformers(torch, tmp_path):
    config = small(4, 2, 6)
    save_params(config, random_params(config), tmp_path / "out", dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16


def write_tokenizer(folder: Path, tokens: int) -> Path:
    folder.mkdir(exist_ok=True)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0")).save(
        str(folder / "tokenizer.json")
    )
    return folder


def test_tokenizer_template_and_special_ids_go_along(mesh, tmp_path):
    source = write_tokenizer(tmp_path / "source", V)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (source / "config.json").write_text('{"eos_token_id": 3, "pad_token_id": 4}')
    (source / "training_args.bin").write_text("stays")
    config = small(4, 2, 6)
    save_params(config, random_params(config), tmp_path / "out", tokenizer_from=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "model.safetensors"),
        *("tokenizer.json", "chat_template.jinja", "generation_config.json"),
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    load_params(config, tmp_path / "out", mesh)


CONFIG = small(4, 2, 6)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A tied checkpoint in several shards; copy it to damage it."""
    folder = tmp_path_factory.mktemp("written") / "model"
    save_params(CONFIG, random_params(CONFIG), folder, max_shard_bytes=12_000)
    return folder


@pytest.fixture
def damaged(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "model"))


def edit(folder: Path, change) -> None:
    """Change the tensors of a checkpoint; it becomes one file."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def error_of(folder: Path, mesh, config: ModelConfig = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        load_params(config, folder, mesh)
    assert "\n" not in str(caught.value)
    return str(caught.value)


UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(UP), f"lacks {UP}"),
        (lambda t: [t.pop(name) for name in list(t) if "bias" in name], "bias and 3 more"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP]}), "holds model.layers.2.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": t[UP]}), "holds model.layers.0.self_attn.o_proj"),
        (lambda t: t.update({UP: t[UP].T.copy()}), rf"{UP} of shape \[24, 40\].*\[40, 24\]"),
        (lambda t: t.update({Q: t[Q].reshape(-1)}), rf"{Q} of shape \[576\]"),
        (lambda t: t[UP].__setitem__((3, 5), np.nan), f"NaN or inf in {UP}"),
        (lambda t: t["model.embed_tokens.weight"].__setitem__((95, 23), -np.inf), "NaN or inf in model.embed_tokens"),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} of type I8"),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "lm_head.weight that is not"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(damaged, mesh, change, named):
    edit(damaged, change)
    assert re.search(named, error_of(damaged, mesh))


def test_a_tied_copy_of_the_head_and_old_buffers_are_no_surplus(damaged, mesh):
    def add(tensors: dict) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    edit(damaged, add)
    assert_same(load_params(CONFIG, damaged, mesh), random_params(CONFIG))


def test_truncated_and_corrupt_files_are_named(written, damaged, mesh):
    shard = sorted(damaged.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for content in (
        *(whole[:-1], whole[: length // 2], whole[:5], b"", whole + b"x"),
        whole[:8] + b"#" + whole[9:],
        whole[:8] + b"[]" + b" " * (length - 2) + whole[8 + length :],
        whole.replace(b'"data_offsets": [0, ', b'"data_offsets": [4, ', 1),
    ):
        shard.write_bytes(content)
        message = error_of(damaged, mesh)
        assert f"{shard.name} is no safetensors file, or a part of one" in message, message
        assert message.endswith("copy it again")


def test_missing_files_are_named(written, mesh, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(written, tmp_path / name))

    folder = copy("config")
    (folder / "config.json").unlink()
    assert "expected config.json" in error_of(folder, mesh)
    folder = copy("shard")
    second = sorted(folder.glob("*.safetensors"))[1]
    second.unlink()
    assert f"lacks {second.name}" in error_of(folder, mesh)
    folder = copy("weights")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert "expected model.safetensors or" in error_of(folder, mesh)
    (folder / "pytorch_model.bin").touch()
    assert error_of(folder, mesh).endswith("load it with transformers and save it with save_pretrained")
    folder = copy("index")
    (folder / INDEX).write_text('{"weight_map": ')
    assert INDEX in error_of(folder, mesh)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update({"model.layers.9.x": min(m.values())}), "places model.layers.9.x in model-"),
        (lambda m: m.pop(UP), f"places {UP} in no file, and it is in model-"),
        (lambda m: m.update({UP: "elsewhere.safetensors"}), "lacks elsewhere.safetensors"),
    ],
)
def test_an_index_that_is_wrong_is_named(damaged, mesh, change, named):
    index = json.loads((damaged / INDEX).read_text())
    change(index["weight_map"])
    (damaged / INDEX).write_text(json.dumps(index))
    assert named in error_of(damaged, mesh)


def test_another_model_is_named(written, mesh):
    assert "model.rms_norm_eps is 1e-06 there and 1e-05 here" in error_of(
        written, mesh, replace(CONFIG, rms_norm_eps=1e-5)
    )
    load_params(replace(CONFIG, max_positions=1), written, mesh)  # changes no number


def test_a_mesh_that_does_not_divide_is_named(written):
    assert "mesh.tp=8" in error_of(written, make_mesh(MeshConfig(fsdp=1, tp=8)))


def test_a_tokenizer_beyond_the_embedding_is_named(damaged, mesh, tmp_path):
    write_tokenizer(damaged, V)
    load_params(CONFIG, damaged, mesh)
    write_tokenizer(damaged, V + 1)
    named = f"{V + 1} tokens, the model's embedding {V} rows"
    assert named in error_of(damaged, mesh)
    with pytest.raises(UserError, match=named):
        save_params(CONFIG, random_params(CONFIG), tmp_path / "out", tokenizer_from=damaged)
    (damaged / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer" in error_of(damaged, mesh)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", '{"chat_template": "{{ mess'),
        ("special_tokens_map.json", "[]"),
        ("added_tokens.json", ""),
        ("generation_config.json", '{"eos_token_id": [3'),
        ("config.json", "null"),
        ("vocab.json", "[" * 100_000),
        ("merges.txt", "#version: 0.2\na b\nc"),
        ("chat_template.jinja", "{% for m in messages %}{{ m.content }}"),
        ("chat_template.jinja", ""),
    ],
)
def test_a_torn_file_beside_the_weights_is_named_and_goes_nowhere(name, text, tmp_path):
    source = write_tokenizer(tmp_path / "source", V)
    (source / name).write_text(text)
    with pytest.raises(UserError, match=rf"source/{re.escape(name)} is torn \(.*\); copy it again"):
        save_params(CONFIG, random_params(CONFIG), tmp_path / "out", tokenizer_from=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("config", "tokenizer", "named"),
    [
        (replace(CONFIG, qk_norm=True), None, "neither Qwen2"),
        (CONFIG, Path("/nope"), "no tokenizer at /nope"),
    ],
)
def test_a_refusal_writes_nothing(config, tokenizer, named, tmp_path):
    with pytest.raises(UserError, match=named):
        save_params(config, random_params(config), tmp_path / "out", tokenizer_from=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out cannot be made, as .*/file is no folder; choose another one"):
        save_params(CONFIG, random_params(CONFIG), tmp_path / "file" / "a" / "out")


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        save_params(CONFIG, random_params(CONFIG), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    params = random_params(CONFIG)
    del params["final_norm"]  # the last tensor cannot be had
    (tmp_path / ".out.partial").mkdir()  # of a writer that was killed
    (tmp_path / ".out.partial" / "rest").write_text("")
    with pytest.raises(KeyError, match="final_norm"):
        save_params(CONFIG, params, tmp_path / "out", max_shard_bytes=12_000)
    assert not list(tmp_path.iterdir())


def test_only_what_looks_like_a_hub_id_is_sought_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    for name in ("/nope/there", "runs/missing", "here/missing", "missing", "a/b/c", "data/x.jsonl"):
        assert find_folder(name) == Path(name)
    with pytest.raises(UserError, match=r"no folder Qwen/nothing here.*LocalEntryNotFoundError"):
        find_folder("Qwen/nothing")
