"""Weights leave a run as a Hugging Face folder and come in from one; two checkpoints are compared by name."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retool_jax.checkpoint import Checkpoints
from retool_jax.convert import compare, convert, main
from retool_jax.errors import UserError
from retool_jax.learn.optimizer import init_state
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import config_from_hf
from retool_jax.models.decoder import Params
from retool_jax.models.huggingface import load_params
from retool_jax.run.folder import claim_folder
from retool_jax.run.load import load
from retool_jax.run.schema import SFTRun
from retool_jax.run.weights import load_weights

SIZES = ("hidden_size=32", "intermediate_size=48", "num_heads=2", "num_kv_heads=1", "head_dim=16")


@pytest.fixture(scope="module")
def made(mesh, tmp_path_factory) -> tuple[SFTRun, Params]:
    """A run and the weights of its newest checkpoint: its mesh is not that of `convert`."""
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
    """Its config may hold keys that are gone and lack those that are new; of it only the model and words count."""
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
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
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


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["form=x", "to=y"], r"cannot read 'form=x'; did you mean from=...\?"),
        (["xyz=1"], "cannot read 'xyz=1'; it takes from, to, dtype, tokenizer, check"),
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
    assert all(key in told for key in ("from=", "to=", "check=", "dtype", "tokenizer", "init_from"))
