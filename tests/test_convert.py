"""Weights are written as a Hugging Face folder and read from one; two checkpoints are compared by name."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers  # what needs PyTorch is imported when a test asks for it, since that takes seconds
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file

from retool_jax import __version__
from retool_jax.checkpoint import Checkpoints
from retool_jax.convert import compare, convert, main
from retool_jax.errors import UserError
from retool_jax.learn.optimizer import init_state
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import config_from_hf
from retool_jax.models.decoder import Params
from retool_jax.models.huggingface import load_params
from retool_jax.run.card import model_card
from retool_jax.run.folder import claim_folder
from retool_jax.run.load import load
from retool_jax.run.schema import SFTRun
from retool_jax.run.weights import load_weights
from retool_jax.tokens.tokenizer import MINIATURE

SIZES = ("hidden_size=32", "intermediate_size=48", "num_heads=2", "num_kv_heads=1", "head_dim=16")


@pytest.fixture(scope="module")
def made(mesh, tmp_path_factory) -> tuple[SFTRun, Params]:
    """A run and the weights of its newest checkpoint, on another mesh than that of `convert`."""
    folder = tmp_path_factory.mktemp("runs") / "cold"
    words = ["config=sft", f"run={folder}", *(f"model.{size}" for size in SIZES), "mesh.data=4", "mesh.fsdp=2"]
    run = load([*words, "sft.rows_per_micro=8"])
    with claim_folder(run):
        pass
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    state = init_state(run.model, run.sft.optimizer, mesh, run.seed)
    checkpoints.save(1, jax.tree.map(lambda x: x * 0, state), {})
    checkpoints.save(2, state, {})
    checkpoints.close()
    records = [{"kind": "sft", "step": step, "loss": 0.5 / step, "perf/tokens_per_s": 9.0} for step in (1, 2, 3)]
    records.append({"kind": "eval", "split": "dev", "step": 2, "accuracy": 0.25, "problems": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run, state.params


@pytest.fixture(scope="module")
def run(made) -> SFTRun:
    return made[0]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "model"
    convert(run.run, target)
    return target


def leaves(params) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def test_a_runs_newest_weights_go_out_and_start_another_run(made, exported):
    run, newest = made[0], leaves(made[1])
    for params in (load_params(run.model, exported, make_mesh(MeshConfig())), load_weights(run, exported)):
        for x, y in zip(leaves(params), newest, strict=True):
            np.testing.assert_array_equal(x, y)
    assert config_from_hf(exported) == run.model
    assert (exported / "tokenizer.json").is_file() and (exported / "chat_template.jinja").is_file()
    with pytest.raises(UserError, match=r"holds another model: model.rope_theta is 100.0 there and 200.0 here"):
        load_weights(replace(run, model=replace(run.model, rope_theta=200.0)), exported)


def test_a_run_of_an_older_version_is_converted_too(run, exported, tmp_path):
    """A run's config may have removed keys and lack new ones; only the model and the tokenizer are read."""
    old = Path(shutil.copytree(run.run, tmp_path / "old"))
    text = (old / "config.yaml").read_text()
    assert "  overlong: error\n" in text and "  head_chunk: 1024\n" in text
    text = text.replace("  overlong: error\n", "  gone: 1\n").replace("  head_chunk: 1024\n", "  dropout: 0.1\n")
    (old / "config.yaml").write_text(text)
    assert compare(str(old), str(exported)) == []


def test_equal_checkpoints_compare_equal(run, exported, tmp_path, capsys):
    assert compare(run.run, str(exported)) == []
    convert(str(exported), tmp_path / "again")
    with pytest.raises(SystemExit) as done:
        main([f"check={exported},{tmp_path / 'again'}"])
    assert done.value.code == 0 and "are equal" in capsys.readouterr().out


def test_differences_are_named_and_measured(exported, tmp_path, capsys):
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.25
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(SystemExit) as done:
        main([f"check={exported},{other}"])
    assert done.value.code == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"lm_head.weight: only in {other}",
        "model.layers.0.self_attn.q_proj.bias: shape [32] and [8]",
        f"model.layers.1.mlp.up_proj.weight: only in {exported}",
        "model.norm.weight: max abs difference 0.25",
        "model.rms_norm_eps: 1e-06 and 1e-05",
    ]


def test_what_repeats_other_tensors_is_no_difference(exported, tmp_path):
    """Old writers keep a copy of tied embeddings as the head, and buffers; what reads the weights ignores both."""
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert compare(str(exported), str(other)) == []


def test_a_dtype_rounds_and_says_how_much(exported, tmp_path):
    convert(str(exported), tmp_path / "half", dtype="bfloat16")
    lines = compare(str(exported), str(tmp_path / "half"))
    differences = [float(line.split()[-1]) for line in lines]
    assert len(lines) > 5 and 0 < max(differences) < 2**-8
    assert not any("norm" in line for line in lines)  # ones are exact
    convert(str(tmp_path / "half"), tmp_path / "copy")  # keeps what the source has
    assert compare(str(tmp_path / "half"), str(tmp_path / "copy")) == []
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size < 0.6 * (
        exported / "model.safetensors"
    ).stat().st_size


def test_nan_is_a_difference_of_its_own(exported, tmp_path):
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert compare(str(exported), str(other)) == ["model.norm.weight: max abs difference nan"]
    assert compare(str(other), str(other)) == []


def test_the_card_tells_of_the_run(run, exported):
    card = ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.tags) == ("transformers", ["retool_jax"])
    told = card.text
    assert "`cold`" in told and "checkpoint 2; first weights: random; data: arithmetic; tools: python" in told
    assert "`<|im_end|>` (391), `<|endoftext|>` (389)" in told
    assert "Only what the assistant writes in a demonstration carries loss" in told
    assert (Path(run.run) / "config.yaml").read_text().strip() in told
    rows = [line for line in told.splitlines() if line.startswith("| sft") or line.startswith("| eval")]
    assert rows == ["| sft | 2 | loss | 0.25 |", "| eval dev | 2 | accuracy | 0.25 |"], "up to the checkpoint"
    assert f"retool_jax {__version__}, jax {version('jax')}" in told


def test_the_card_names_what_is_on_the_hub_and_no_folder_of_this_machine(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, then = (Path(shutil.copytree(run.run, f"runs/{name}")) for name in ("first", "then"))
    text = (first / "config.yaml").read_text()
    (first / "config.yaml").write_text(text.replace("init_from: ''", "init_from: acme/base"))
    text = text.replace("init_from: ''", "init_from: runs/first").replace("data: arithmetic", "data: acme/traces")
    (then / "config.yaml").write_text(text)
    card = ModelCard(model_card(then, "mine", "float32", {}))
    assert (card.data.base_model, card.data.datasets) == ("acme/base", "acme/traces")
    (then / "config.yaml").write_text(text.replace("task: sft", "task: grpo").replace("runs/first", "''"))
    told = model_card(then, "mine", "float32", {})
    assert "first weights: those of a cold start of its own" in told and "Only tokens that the policy sampled" in told
    (then / "config.yaml").write_text(text.replace("acme/traces", "runs/traces.jsonl").replace("runs/first", "runs/x"))
    card = ModelCard(model_card(then, "mine", "float32", {}))
    assert (card.data.base_model, card.data.datasets) == (None, None)


def test_of_a_foreign_folder_the_card_says_what_is_known(exported, tmp_path):
    convert(str(exported), tmp_path / "again", dtype="bfloat16")
    told = ModelCard.load(tmp_path / "again" / "README.md").text
    assert "Weights in bfloat16, written by retool_jax from `model`. A turn ends at `<|im_end|>`" in told
    assert "## Versions" in told and "## Mask" not in told and "## Config" not in told


def test_a_run_that_saved_nothing_yet_is_named(run, tmp_path):
    shutil.copytree(run.run, tmp_path / "new", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match=r"no checkpoint at .*/new"):
        convert(str(tmp_path / "new"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def stubborn(mesh, tokenizer, tmp_path_factory) -> Path:
    """A run whose policy writes <|im_end|> whatever it reads, and again and again if nothing stops it."""
    folder = tmp_path_factory.mktemp("runs") / "stubborn"
    run = load(["config=sft", f"run={folder}", *(f"model.{size}" for size in SIZES), "model.num_layers=1"])
    with claim_folder(run):
        pass
    state = init_state(run.model, run.sft.optimizer, mesh, run.seed)
    for name in ("o", "down"):  # a layer adds nothing
        state.params["layers"][name][...] *= 0
    embedding = state.params["embedding"]
    embedding[...] = embedding[...].at[:, 0].set(1.0).at[tokenizer.stop_ids[0], 0].set(9.0)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    return folder


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({}, {}),
        ({"config.json": {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 3}}, {}),
        ({"generation_config.json": {"eos_token_id": 0, "top_k": 20, "do_sample": True}}, {"top_k": 20}),
        ({"config.json": {"eos_token_id": [5, 6]}, "generation_config.json": {"eos_token_id": [5]}}, {}),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": None}}, {}),
    ],
)
def test_the_exported_folder_stops_where_the_policy_stops(stubborn, tokenizer, tmp_path, files, kept):
    """Whatever stop ids the tokenizer's files name, as for a Base model that was trained on ChatML."""
    torch = pytest.importorskip("torch")
    words = Path(shutil.copytree(MINIATURE, tmp_path / "words"))
    for name, fields in files.items():
        (words / name).write_text(json.dumps(fields))
    convert(str(stubborn), tmp_path / "out", tokenizer=str(words))
    told = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [file["eos_token_id"] for file in told] == [list(tokenizer.stop_ids)] * 2
    assert kept.items() <= told[1].items()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([tokenizer.encode("12*3?")])
    how = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    ids = theirs.generate(prompt, **how)
    assert ids[0, prompt.shape[1] :].tolist() == [tokenizer.hf.convert_tokens_to_ids("<|im_end|>")]
    theirs.generation_config.eos_token_id = None  # nothing else ends it
    assert theirs.generate(prompt, **how).shape[1] == prompt.shape[1] + 6


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["form=x", "to=y"], r"cannot read 'form=x'; did you mean from=...\?"),
        (["xyz=1"], "cannot read 'xyz=1'; it takes from, to, dtype, tokenizer, push, check"),
        (["from"], "cannot read 'from'; did you mean from=..."),
        (["from=", "to=y"], "from= is empty"),
        (["from=runs/x"], "give from=SOURCE and to=FOLDER"),
        (["check=a"], "check=A,B"),
        (["check=a,b", "to=c"], "check=A,B"),
        (["from=/nope", "to={out}"], "no checkpoint at /nope"),
        (["from={model}", "to={out}", "dtype=int8"], "dtype=int8 is not one of"),
        (["from={model}", "to={model}"], "exists already"),
        (["from={model}", "to={out}", "tokenizer=/nope"], "no tokenizer at /nope"),
        (["check={model},/nope"], "no checkpoint at /nope"),
        (["from={model}", "to={out}", "push=mine"], "push=mine is no repository of the hub; give it as owner/name"),
    ],
)
def test_bad_words_are_named_and_nothing_is_written(words, named, exported, tmp_path):
    words = [word.format(model=exported, out=tmp_path / "out") for word in words]
    with pytest.raises(UserError, match=named):
        main(words)
    assert not list(tmp_path.iterdir())


def test_help_names_every_key(capsys):
    main(["--help"])
    told = capsys.readouterr().out
    assert all(key in told for key in ("from=", "to=", "check=", "dtype", "tokenizer", "push=", "init_from"))
