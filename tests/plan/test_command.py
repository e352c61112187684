"""The command plans the miniature on virtual devices, says what is unknown, and refuses bad words before it
compiles."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from retool_jax.errors import UserError
from retool_jax.mesh import make_mesh
from retool_jax.mesh_config import MeshConfig
from retool_jax.plan.command import main
from retool_jax.plan.functions import held
from retool_jax.run.load import load
from retool_jax.run.weights import abstract_state

PARTS = ["decode", "write", "log-probs", "policy update", "weights to engines"]


def test_every_function_of_a_step_is_compiled(planned):
    said, printed = planned
    assert said["compiled"] and list(said["functions"]) == PARTS
    assert (said["mesh"], said["chips"], said["axes"]) == ("cpu-8", 8, {"data": 1, "fsdp": 4, "tp": 2})
    for number, name in enumerate(PARTS, 1):
        assert f"{number} of {len(PARTS)}: compiling the {name} ..." in printed
        assert said["functions"][name]["temporaries"] > 0 and said["functions"][name]["flops"] >= 0


def test_the_classes_of_memory_are_all_that_a_function_is_given(planned, words):
    said, _ = planned
    for name in ("log-probs", "policy update", "decode"):
        one = said["functions"][name]
        # Beside them only what a step brings: turns, tables, a key.
        assert 0 <= one["arguments_total"] - sum(one["arguments"].values()) < 5e3, name
    run = load([*words])
    mesh = make_mesh(MeshConfig(fsdp=4, tp=2))
    state = abstract_state(dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=400)), mesh)
    update = said["functions"]["policy update"]["arguments"]
    assert update["parameters"] == held(state.params) and update["optimiser"] == held((state.step, state.opt_state))
    whole = sum(np.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(state.params))
    assert whole / 8 < update["parameters"] < whole / 7  # norms and biases are whole on some axis
    assert said["functions"]["decode"]["arguments"]["cache"] > 8 * 128 * 2 * 2 * 2 * 32 * 4 / 2


def test_what_stays_and_what_passes_make_the_peak(planned):
    memory, functions = planned[0]["memory"], planned[0]["functions"]
    assert set(memory["stays"]) == {"parameters", "optimiser", "engine weights", "cache"}
    assert memory["peak"] == pytest.approx(sum(memory["stays"].values()) + memory["passing"])
    most = functions[memory["most"]]
    assert memory["passing"] >= most["temporaries"] + most["arguments"].get("batch", 0.0)
    assert planned[0]["fits"] is None and planned[0]["step"]["seconds"] is None  # of a CPU nobody knows
    assert "whether it fits is not known" in planned[1] and "no time: the speed of these chips" in planned[1]


def test_training_exchanges_weights_and_gradients_and_the_engines_get_theirs(planned):
    functions = planned[0]["functions"]
    weights = functions["policy update"]["arguments"]["parameters"]
    assert functions["policy update"]["wire"] > 3 * weights  # gathered over four, and summed up over them
    assert functions["policy update"]["sent"]["all-gather"] > 0
    assert functions["weights to engines"]["wire"] > 0
    assert functions["policy update"]["units_per_step"] == 192 * 64 / (8 * 128)


ON_GPUS = """
import json, sys
for name in ("libtpu", "jax.experimental.pallas.ops.tpu"):
    sys.modules[name] = None  # so that nobody can import it
from retool_jax.plan import main
for words in json.loads(sys.argv[1]):
    main(words)
import retool_jax.run.evaluate, retool_jax.run.rl, retool_jax.run.sft
"""


def test_without_a_compiler_shapes_and_formulas_remain_and_nothing_of_a_tpu_is_imported(tmp_path, one_device):
    """In a process that has already imported everything that a run on GPUs imports."""
    words = ["config=grpo_qwen2.5_32b", "mesh=h100-8", "engine.pages=2048", f"json={tmp_path / 'plan.json'}"]
    replayed = [*words[:2], "replay=runs/kept", f"json={tmp_path / 'replayed.json'}"]
    others = ["config=sft_qwen2.5_32b", "mesh=h100-8"], replayed
    command = [sys.executable, "-c", ON_GPUS, json.dumps([words, *others])]
    done = subprocess.run(command, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "not compiled: temporaries, bytes sent and estimates are missing" in printed
    assert "it does not fit" in printed and "compiling" not in printed  # by what stays alone
    assert "parameters 16.39, optimiser 32.77" in printed  # of 131 and 262 GB
    assert "policy update" in printed.partition("it does not fit")[2]
    # Rollouts from files need no engine.
    whole, learning = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "replayed.json"))
    assert set(whole["functions"]) - set(learning["functions"]) == {"decode", "write", "weights to engines"}
    assert set(whole["memory"]["stays"]) - set(learning["memory"]["stays"]) == {"engine weights", "cache"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("config=grpo_qwen2.5_32b mesh=v5p-63", "no slice is called 'v5p-63'; did you mean v5p-64"),
        ("config=grpo_qwen2.5_32b", "for which chips? add mesh=NAME"),
        ("config=eval_aime25 mesh=v5p-64", "this config is of task evaluate and trains nothing"),
        ("config=grpo_qwen2.5_32b mesh=v6e-64", "rl.rows_per_micro=32 does not divide"),
        ("config=grpo_qwen2.5_32b mesh=h100-16 mesh.tp=16", "mesh.tp=16 does not divide model.num_kv_heads=8"),
        ("config=grpo_qwen2.5_32b mesh=h100-8 tokens=some", "tokens=some must be a whole number above 0"),
        ("config=grpo_qwen2.5_32b mesh=h100-8 search=maybe", "search=maybe must be true or false"),
        ("config=grpo mesh=cpu-8 sft.rows_per_micro=8 rl.rows_per_micro=8 search=true", "has no known speed"),
        ("config=grpo_qwen2.5_32b mesh=h100-8 rl.setps=3", "unknown key rl.setps"),
        ("config=grpo mesh=cpu-8 json", "cannot read 'json'; did you mean json=...?"),
        ("config=grpo mesh=cpu-8 json=", "json= is empty; give it a value or leave it out"),
        ("config=grpo mesh=cpu-8 json=.", "json=. is a folder; name a file"),
        (
            "config=grpo mesh=cpu-8 rl.rows_per_micro=8 sft.rows_per_micro=8 tokens=129",
            "tokens=129 of a trajectory are more than engine.max_length=128; lower tokens",
        ),
        ("config=grpo mesh=cpu-8 tokens=5 search=true", "tokens=5 is not read with search=true"),
        (
            "config=sft mesh=cpu-8 sft.rows_per_micro=8 teacher=grpo",
            "teacher=grpo is a model that this run does not use",
        ),
        (
            "config=grpo mesh=cpu-8 rl.rows_per_micro=8 sft.rows_per_micro=8 teacher=grpo",
            "teacher=grpo is a model that",
        ),
        ("config=grpo_smollm2 mesh=cpu-2 init_from=nowhere", "the model's shape is that of init_from=nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_compiled(words, error, capsys):
    with pytest.raises(UserError) as caught:
        main(words.split())
    assert error in str(caught.value)
    assert "compiling" not in capsys.readouterr().out


def test_a_missing_compiler_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"mesh=v5p-64 .* not installed here .* pip install --no-deps 'libtpu=="):
        main(["config=grpo_qwen2.5_32b", "mesh=v5p-64"])


def test_help_and_a_mistake_load_no_jax():
    code = (
        "import sys\nfrom retool_jax.plan import main\nmain(['--help'])\n"
        "try: main(['config=grpo', 'mesh=v5p-9'])\nexcept Exception as error: print(error)\n"
        "print(*{'jax', 'numpy'} & set(sys.modules), '|')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "usage: python -m retool_jax.plan config=NAME [key=value ...]" and lines[-1] == "|"
    assert "no slice is called 'v5p-9'" in lines[-2] and any("search=true" in line for line in lines)
