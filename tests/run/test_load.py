"""A config means what it says: every key and every value is checked, and errors are one line."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from pydantic import ValidationError

from retool_jax.engine.config import EngineConfig
from retool_jax.errors import UserError
from retool_jax.fields import flatten, show
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import init_state, state_shardings
from retool_jax.mesh import make_mesh
from retool_jax.mesh_config import MeshConfig
from retool_jax.models.config import ModelConfig, config_to_hf
from retool_jax.rl.config import RLConfig
from retool_jax.rollout.config import RolloutConfig
from retool_jax.run.build import compiled_ahead, explain_out_of_memory, resolve, sandbox_config
from retool_jax.run.cold_start import cold_start_of
from retool_jax.run.folder import claim_folder
from retool_jax.run.load import config_names, help_text, load
from retool_jax.run.schema import EvaluateRun, RLRun, ServeRun, SFTRun
from retool_jax.tokens.grammar import GRAMMARS


def error_of(*words: str) -> str:
    """The message, one line, of loading these words."""
    with pytest.raises(UserError) as caught:
        load(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def value_of(key: str, *words: str) -> object:
    return flatten(load(["config=grpo", *words]))[key]


# ------------------------------------------------------------------------------------------------ keys and values


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("rl.stpes=3", "did you mean rl.steps?"),
        ("sfft.steps=3", "did you mean sft.steps?"),
        ("rl.clip.hihg=0.3", "did you mean rl.clip.high?"),
        (
            "optimizer.learning_rate=1",
            "did you mean sft.optimizer.learning_rate or rl.critic.optimizer.learning_rate or",
        ),
        ("rl.learning_rate=1", "did you mean rl.optimizer.learning_rate?"),
        ("steps=3", "did you mean sft.steps or rl.steps?"),
        ("sed=1", "did you mean seed?"),
        ("--rl.steps=3", "did you mean rl.steps?"),
        ("sandbox.limits.wal_s=3", "did you mean sandbox.limits.wall_s?"),
        ("rl.xyzzy=3", "known here: rl.algorithm, rl.steps, rl.prompts_per_step"),
    ],
)
def test_an_unknown_key_names_the_nearest(word, suggestion):
    message = error_of("config=grpo", word)
    assert message.startswith(f"unknown key {word.split('=')[0]}; ")
    assert suggestion in message


def test_keys_of_reinforcement_learning_are_unknown_to_the_cold_start():
    assert error_of("config=sft", "rl.steps=3").startswith("unknown key rl.steps; it belongs to configs of task grpo")
    assert "unknown key rollout.max_turns" in error_of("config=sft", "rollout.max_turns=2")


def test_an_unknown_config_lists_those_that_exist():
    assert "no config 'grop'" in error_of("config=grop")
    assert f"there are: {', '.join(config_names())}" in error_of("config=grop")
    assert f"one of: {', '.join(config_names())}" in error_of("rl.steps=3")


@pytest.mark.parametrize("word", ["grpo", "--config", "", "rl.steps"])
def test_a_word_without_an_equals_sign(word):
    assert error_of("config=grpo", word).startswith(f"cannot read {word!r}; expected key=value")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rl.steps=abc", "rl.steps=abc is of type str; it must be int"),
        ("rl.steps=1.5", "rl.steps=1.5 is of type float; it must be int"),
        ("rl.steps=true", "rl.steps=true is of type bool; it must be int"),
        ("rl.steps=[1,2]", "rl.steps=[1,2] is of type list; it must be int"),
        ("rl.steps=", "rl.steps= is empty; it must be int"),
        ("rl.steps=null", "rl.steps= is empty; it must be int"),
        ("rl.temperature=warm", "rl.temperature=warm is of type str; it must be float"),
        ("rl.temperature=.nan", "rl.temperature=nan must be a finite number"),
        ("sandbox.show_last_expression=1", "sandbox.show_last_expression=1 is of type int; it must be bool"),
        ("sandbox.backend=[1]", "sandbox.backend=1 is of type int; it must be str"),
        ("sandbox.backend=", "sandbox.backend is empty"),
        ("sandbox.backend=[process", "cannot read sandbox.backend=[process: "),
        ("rl=3", "rl=3 sets a whole section; set one of its keys: rl.algorithm, rl.steps, "),
        ("rl.steps.x=3", "rl.steps is a single int and has no key 'x' below it"),
        ("tools=no", "tools=no is not one of: python, none"),
        ("rl.steps={a: 1}", "rl.steps is a single int and has no key 'a' below it"),
        ("engine.token_buckets=[16,0]", "engine.token_buckets=0 must be at least 1"),
        ("engine.token_buckets=[a]", "engine.token_buckets=a is of type str; it must be int"),
        ("engine.page_size=-1", "engine.page_size=-1 must be at least 0"),
        ("engine.tool_lag=-2", "engine.tool_lag=-2 must be at least -1"),
        ("engine.stale_rows=forget", "engine.stale_rows=forget is not one of: rewrite, discard, keep"),
        ("model.attention_kernel=flash", "model.attention_kernel=flash is not one of: auto, xla, splash, cudnn"),
        ("model.remat=true", "model.remat=true is not one of: none, full, dots, offload"),
        ("model.head_chunk=0", "model.head_chunk=0 must be at least 1"),
        ("model.head_dim=7", "model.head_dim=7 must be even"),
        ("rollout.grammar=xml", "rollout.grammar=xml is not one of: hermes, retool"),
        ("rollout.answer_tokens=-1", "rollout.answer_tokens=-1 must be at least 0"),
        ("evaluation.answer_tokens=88", "evaluation.answer_tokens=88 must lie between 0 (none) and 87, what"),
        ("evaluation.final_split=train", "evaluation.final_split=train is not one of: dev, test"),
        ("rl.clip.dual=0.5", "rl.clip.dual=0.5 must be at least 1"),
        ("rl.temperature=0", "rl.temperature=0.0 must be between 0.01 and 100"),
        ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1"),
        ("sandbox.slots=-1", "sandbox.slots is -1; it must lie between 0 and 1024"),
        ("sandbox.slots=two", "sandbox.slots=two is of type str; it must be int"),
        ("sandbox.limits.wall_s=0", "limits.wall_s is 0.0; it must lie between 0.05 and 600"),
        ("seed=-1", "seed=-1 must be between 0 and 4294967295"),
        ("rl.steps=0", "rl.steps=0 must be at least 1"),
        ("rl.optimizer.learning_rate=-1", "rl.optimizer.learning_rate=-1.0 must be between 0 and 10"),
        ("sft.optimizer.b1=2", "sft.optimizer.b1=2.0 must be between 0 and 0.999999"),
        ("rl.optimizer.b2=1", "rl.optimizer.b2=1.0 must be between 0 and 0.999999"),
        ("rl.critic.optimizer.max_grad_norm=0", "rl.critic.optimizer.max_grad_norm=0.0 must be between 1e-06 and"),
        (
            "rl.optimizer={decay_steps: 0, final_fraction: 0.5}",
            "rl.optimizer.final_fraction=0.5 is where a cosine ends, and with",
        ),
        ("rl.critic.optimizer.final_fraction=0", "rl.critic.optimizer.final_fraction=0.0 is where a cosine ends"),
        ("rl.groups.refills=3", "rl.groups.refills=3 says how often groups are drawn in the place of others, and"),
        ("rl.groups.skip_solved=2", "rl.groups.skip_solved=2 skips prompts that come again, and no prompt of"),
        (
            "engine.stale_rows=keep",
            "engine.stale_rows=keep is for rows that are unfinished when the weights change, and with rl.ahead=0",
        ),
        ("rl.max_staleness=1", "rl.max_staleness=1 drops what older weights drew, and with rl.ahead=0"),
        ("rl.reward.overlong_penalty=0.5", "rl.reward.overlong_penalty=0.5 is what the last of"),
        ("rl.reward.overlong_tokens=89", "rl.reward.overlong_tokens=89 is more than the longest response of"),
        ("rl.clip.low=1.5", "rl.clip.low=1.5 must be between 0 and 1"),
        ("evaluation.every=-1", "evaluation.every=-1 must be at least 0"),
        ("model.rope_theta=0", "model.rope_theta=0.0 must be between 100 and"),
        ("model.rms_norm_eps=-1", "model.rms_norm_eps=-1.0 must be between 1e-12 and 0.1"),
        ("model.yarn_beta_slow=0", "model.yarn_beta_slow=0.0 must be above 0"),
        ("model.yarn_attention_factor=-1", "model.yarn_attention_factor=-1.0 must be at least 0"),
        ("model.num_kv_heads=0", "model.num_kv_heads=0 must be between 1 and 4096"),
        ("model.compute_dtype=float33", "model.compute_dtype=float33 is not one of: float32"),
        ("rl.minibatches=5", "rl.prompts_per_step=24 does not divide into rl.minibatches=5"),
        ("rl.group_size=0", "rl.group_size=0 must be at least 1"),
        ("rl.temperature=1e-6", "rl.temperature=1e-06 must be between 0.01 and 100"),
        ("rl.temperature=1e6", "rl.temperature=1000000.0 must be between 0.01 and 100"),
        ("model.rope_theta=1.0001", "model.rope_theta=1.0001 must be between 100 and"),
        ("engine.slots=1000000", "engine.slots=1000000 must be between 1 and 65536"),
        ("rl.steps=99999999999", "rl.steps=99999999999 must be at most 2147483647"),
        ("rl.steps=99999999", "x rl.group_size=8 are 19199999808 draws, and a run has random numbers for 2147483647"),
        ("rl.clip.high=1e300", "rl.clip.high=1e+300 must be at most 1000000000.0"),
        ("rl.kl.coefficient=.inf", "rl.kl.coefficient=inf must be a finite number"),
        ("rl.optimizer.weight_decay=1e8", "learning_rate=0.0003 x weight_decay=100000000.0 takes more from a weight"),
        ("evaluation.problems=1000000000", "evaluation.problems=1000000000 must be between 1 and 262144"),
        ("rl.row_length=64", "rl.row_length=64 is shorter than engine.max_length=128"),
        ("task=sft", "task=sft: only a config's file can set its task; choose another config=NAME"),
        ("run=a\udcffb", "run has bytes that are not UTF-8"),
        ("rollout.max_prompt_tokens=500", "rollout.max_prompt_tokens=500 leaves no room in engine.max_length=128"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(word, message):
    assert message in error_of("config=grpo", word)


def test_what_nothing_would_read_is_refused():
    alone = error_of("config=ppo", "rl.group_size=1", "rl.groups.dynamic=true")
    assert "rl.groups.dynamic=true looks for prompts with right and wrong answers, and rl.group_size=1" in alone
    constant = error_of("config=sft", "sft.optimizer.decay_steps=0", "sft.optimizer.final_fraction=0")
    assert "sft.optimizer.final_fraction=0.0 is where a cosine ends, and with sft.optimizer.decay_steps=0" in constant
    prompt = error_of("config=sft", "sft.tool_prompt=paper")
    assert "sft.tool_prompt explains <code>, and sft.grammar=hermes is explained by the chat template" in prompt
    for words, message in (
        ("config=sft sft.batch_size=8 sft.batch_tokens=99", "sft.batch_tokens=99 is not read with sft.batch_size=8"),
        (
            "config=eval evaluation.preset=greedy evaluation.top_p=0.9",
            "evaluation.top_p=0.9 and evaluation.top_k=0",
        ),
        ("config=eval_aime25 data.split=dev", "data.split=dev is of problems that are made here, and data.source="),
        ("config=eval data.answer=x", "data.answer=x is a column, and data.source=arithmetic, which is made here, has"),
        ("config=sft model.yarn_beta_fast=9", "model.yarn_beta_fast=9.0 is not read with model.yarn_factor=0"),
        (
            "config=grpo model.llama3_high_factor=9",
            "model.llama3_high_factor=9.0 is not read with",
        ),
        (
            "config=grpo tools=none rollout.strict_calls=true",
            "rollout.strict_calls=true refuses calls that are not exactly",
        ),
        (
            "config=grpo sandbox.urls=[http://x:1]",
            "sandbox.urls is ('http://x:1',), which only the back-end remote",
        ),
    ):
        assert message in error_of(*words.split())
    load(["config=sft", "sft.tool_prompt=paper", "sft.grammar=retool"])
    cold_start_of(load(["config=grpo", "tools=none", "rollout.grammar=retool", "rollout.tool_prompt=paper"]))
    load(["config=grpo", "rl.reward.overlong_tokens=88", "rl.reward.overlong_penalty=0.5"])
    load(["config=grpo", "rl.ahead=1", "rl.max_staleness=0", "engine.stale_rows=discard"])
    load(["config=grpo", "data.train=mine.jsonl", "rl.groups.skip_solved=2"])


def test_a_section_that_is_made_in_python_refuses_the_same_values():
    for section, values in (
        (EngineConfig, {"page_size": -1}),
        (ModelConfig, {"num_layers": 2.0}),
        (RLConfig, {"stpes": 3}),
        (OptimizerConfig, {"learning_rate": math.nan}),
    ):
        with pytest.raises(ValidationError, match=next(iter(values))):
            section(**values)


def test_a_checkpoint_that_describes_no_model_is_told_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(ModelConfig()) | {"num_hidden_layers": 0}))
    message = f"{tmp_path / 'config.json'} describes a model that cannot be computed here: model.num_layers=0 must be"
    with pytest.raises(UserError, match=rf"^{re.escape(message)} between 1 and 4096$"):
        resolve(["config=sft_retool", f"init_from={tmp_path}"])


def test_rows_must_divide_over_the_mesh():
    message = error_of("config=grpo", "mesh.data=2", "mesh.fsdp=2", "rl.rows_per_micro=6", "sft.rows_per_micro=8")
    assert message.startswith("rl.rows_per_micro=6 does not divide over mesh.data x mesh.fsdp = 4 devices")
    assert "sft.rows_per_micro=3" in error_of("config=sft", "mesh.fsdp=2", "sft.rows_per_micro=3")


def test_reinforcement_learning_asks_for_a_cold_starts_keys_only_where_it_makes_one():
    words = ["config=grpo", "mesh.fsdp=8", "rl.rows_per_micro=8", "sft.rows_per_micro=4"]
    assert error_of(*words).startswith("sft.rows_per_micro=4 does not divide over mesh.data x mesh.fsdp = 8 devices")
    assert load([*words, "init_from=runs/mine"]).sft.rows_per_micro == 4
    assert not issubclass(RLRun, SFTRun)


def test_the_grammars_that_a_config_may_name_are_those_that_exist():
    (known,) = [hint for name, hint in typing.get_type_hints(RolloutConfig).items() if name == "grammar"]
    assert typing.get_args(known) == tuple(GRAMMARS)


def test_a_cold_start_in_another_grammar_than_its_policys_is_refused():
    assert "sft.grammar=retool is not rollout.grammar=hermes; leave it out" in error_of(
        "config=grpo", "sft.grammar=retool"
    )
    assert "sft.grammar=xml is not one of: hermes, retool" in error_of("config=sft", "sft.grammar=xml")


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("rl.optimizer.learning_rate", "1e-4", 1e-4),
        ("rl.optimizer.learning_rate", "1", 1.0),
        ("sandbox.show_last_expression", "false", False),
        ("sandbox.backend", "[process,bubblewrap]", ("process", "bubblewrap")),
        ("sandbox.backend", "process", ("process",)),
        ("engine.tool_lag", "-1", -1),
        ("run", "2024", "2024"),
        ("run", "yes", "yes"),
        ("run", "'quoted name'", "quoted name"),
        ("run", "a=b", "a=b"),
        ("run", "a #2", "a #2"),
        ("run", "@home", "@home"),
        ("run", "100%: done", "100%: done"),
        ("data.train", "${x}/y.jsonl", "${x}/y.jsonl"),
        ("data.train", "~/x.jsonl", str(Path.home() / "x.jsonl")),
        ("init_from", "", ""),
        ("init_from", "runs/mine/", "runs/mine"),  # as a shell completes it
        ("init_from", "/", "/"),
        ("tools", "mcp:http://localhost:8000/mcp/", "mcp:http://localhost:8000/mcp/"),
    ],
)
def test_values_are_read_as_meant(key, word, value):
    read = value_of(key, f"{key}={word}")
    assert read == value and type(read) is type(value)


def test_later_words_win():
    assert value_of("rl.steps", "rl.steps=3", "rl.steps=4") == 4
    assert isinstance(load(["config=grpo", "config=sft"]), SFTRun)


# ------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_config_builds_its_model(name):
    run = load([f"config={name}"])
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tp=2))
    optimizer = OptimizerConfig() if isinstance(run, EvaluateRun | ServeRun) else run.sft.optimizer
    shapes = jax.eval_shape(lambda: init_state(run.model, optimizer, mesh, run.seed))
    for shape, sharding in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(state_shardings(run.model, optimizer, mesh)), strict=True
    ):
        assert len(sharding.shard_shape(shape.shape)) == shape.ndim
    assert shapes.params["embedding"].get_value().shape == (run.model.vocab_size, run.model.hidden_size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: grpo\n  rl: [", "cannot read"),
        ("task: grpo\nseed: 1\nseed: 2\n", "duplicate key seed"),
        ("- a\n- b\n", "expected keys and values"),
        ("seed: 1\n", "has task=None; it must be one of: sft, grpo"),
        ("task: [grpo]\n", "has task=['grpo']; it must be one of: sft, grpo"),
        ("base: grpo\nrl: {stpes: 3}\ntask: grpo\n", "did you mean rl.steps?"),
        ("base: nowhere\ntask: grpo\n", "no config 'nowhere', the base of"),
        ("task: grpo\nrun: 2024\n", "run=2024 is of type int; it must be str"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert message in error_of(f"config={path}")


def test_a_config_that_is_its_own_base(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {path}\ntask: grpo\n")
    assert "is its own base" in error_of(f"config={path}")


def test_the_folder_follows_from_the_command():
    def folder(*words: str) -> str:
        return load(["config=grpo", *words]).run

    assert folder("seed=1", "rl.steps=3") == folder("rl.steps=3", "seed=1") == "runs/grpo-rl.steps=3-seed=1"
    assert folder("rl.steps=4", "rl.steps=3") == folder("rl.steps=3"), "only the last word of a key counts"
    long = "x" * 150
    commands = [
        (),
        ("seed=1",),
        ("data.train=a/b.jsonl",),
        ("data.train=a_b.jsonl",),
        (f"data.train={long}1",),
        (f"data.train={long}2",),
        ("rl.steps=1",),
    ]
    folders = [folder(*words) for words in commands]
    assert len(set(folders)) == len(commands)
    assert all(Path(name).parent == Path("runs") and len(Path(name).name) < 130 for name in folders)


def test_configs_of_one_name_in_two_places_have_two_folders(tmp_path):
    names = ["grpo"]
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "grpo.yaml").write_text("base: grpo\ntask: grpo\n")
        names.append(str(tmp_path / part / "grpo.yaml"))
    assert len({load([f"config={name}"]).run for name in names}) == 3


# ----------------------------------------------------------------------------------------------------------- tools


def test_tools_are_a_word_or_a_list_of_them():
    def tools(*words: str) -> object:
        return value_of("tools", *words)

    assert tools() == tools("tools=python") == tools("tools=[python]") == "python"
    assert tools("tools=none") == tools("tools=[none]") == "none"
    assert tools("tools=[python, calculator]") == ("python", "calculator")
    assert tools("tools=[python,my_package.my_module:MyTool]") == ("python", "my_package.my_module:MyTool")
    assert tools("tools=my_module:tool") == "my_module:tool"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tools=no", "tools=no is not one of: python, none"),
        ("tools=null", "tools=null is not one of: python, none, python_session, calculator, or my_pack"),
        ("tools=my_module.MyTool", "tools=my_module.MyTool is not one of: python, none"),
        ("tools=[]", "tools is empty; name at least one, for example tools=[python], or tools=none"),
        ("tools=[python,none]", "or my_package.my_module:MyTool; none stands alone"),
        ("tools=[python,python]", "tools=[python,python] names a tool twice; leave one out"),
        ("tools=[python,python_session]", "names a tool twice; leave one out"),
        ("tools=[1]", "tools=[1] is of type list; it must be str or list"),
        ("tools=python_session", "wait for another trajectory's end; set engine.tool_lag=-1"),
    ],
)
def test_a_word_that_names_no_tool_is_told(word, message):
    assert message in error_of("config=grpo", word)


def test_the_papers_grammar_has_one_tool():
    message = error_of("config=grpo", "rollout.grammar=retool", "tools=[python,calculator]")
    assert message.startswith("the grammar retool has one tool, the interpreter, and tools names calculator; set")
    assert error_of("config=sft", "sft.grammar=retool", "tools=calculator").startswith("the grammar retool has one")
    session = ["config=grpo", "rollout.grammar=retool", "tools=python_session", "engine.tool_lag=-1"]
    assert sandbox_config(load(session)).queue_limit == sandbox_config(load(["config=grpo"])).queue_limit
    assert sandbox_config(load([*session, "engine.slots=4"])).queue_limit == 16, "every interpreter may call"


def test_calls_wait_for_servers_as_if_each_ran_one_program_at_once():
    """What a server can do at once is not known here, and this machine's cores say nothing about it."""
    far = ["sandbox.backend=[remote]", "sandbox.urls=[http://a,http://b]"]
    words = ["config=grpo", "engine.slots=64", "sandbox.limits.wall_s=30", "sandbox.slots=8"]
    assert sandbox_config(load([*words, *far])).queue_s == (64 / 2 + 1) * 31
    assert sandbox_config(load(words)).queue_s == 600, "eight slots need less than sandbox.queue_s"


# ----------------------------------------------------------------------------------------------------------- help


def test_help_names_every_config_and_every_key_in_readable_lines():
    text = help_text(["--help"])
    assert text.startswith("usage: python -m retool_jax.train config=NAME [key=value ...]")
    assert all(name in text for name in config_names())
    for key, value in flatten(load(["config=grpo"])).items():
        assert key == "run" or f"\n  {key}={show(value)}" in text, key
    assert "More slots than cores make time limits unfair" in " ".join(text.split()), "all that is said of a key"
    assert max(map(len, text.splitlines())) <= 110
    assert "rl.steps" not in help_text(["--help", "config=sft"])


# --- what a config leaves to the checkpoint ---------------------------------------------------------------------------


def test_the_shape_and_the_tokenizer_that_no_config_sets_are_the_checkpoints(tmp_path):
    there = ModelConfig(vocab_size=500, hidden_size=24, num_heads=6, head_dim=10, rope_theta=5e6, max_positions=4096)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config_to_hf(there)))
    words = ["config=sft_retool", f"init_from={tmp_path / 'hf'}", "model.head_chunk=77"]
    run = resolve(words)
    assert load(words).model == ModelConfig(
        compute_dtype="bfloat16", cache_dtype="bfloat16", remat="full", head_chunk=77
    ), "words alone look nowhere"
    assert run.tokenizer == str(tmp_path / "hf") and run.model.compute_dtype == "bfloat16"
    expected = dataclasses.asdict(there) | {"compute_dtype": "bfloat16", "cache_dtype": "bfloat16", "remat": "full"}
    assert dataclasses.asdict(run.model) == expected | {"head_chunk": 77}

    with claim_folder(dataclasses.replace(run, run=str(tmp_path / "run"), tokenizer="elsewhere")):
        pass
    again = resolve(["config=sft_retool", f"init_from={tmp_path / 'run'}", "model.head_chunk=77"])
    assert (again.model, again.tokenizer) == (run.model, "elsewhere")
    named = resolve(["config=sft_retool", f"init_from={tmp_path / 'run'}", "tokenizer=mine"])
    assert named.tokenizer == "mine" and named.model.head_chunk == ModelConfig.head_chunk


def test_the_miniatures_shape_does_not_count_where_weights_are_named_above_it(tmp_path, capsys):
    there = ModelConfig(vocab_size=500, num_layers=9, head_dim=10, max_positions=4096)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(there)))
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: grpo\ntask: grpo\ninit_from: {folder}\n")
    told = f"model and tokenizer: taken from {folder}, since the config sets no other\n"
    for words in (["config=grpo", f"init_from={folder}"], ["config=sft", f"init_from={folder}"], [f"config={mine}"]):
        run = resolve([*words, "model.compute_dtype=bfloat16"])
        assert run.model == dataclasses.replace(there, compute_dtype="bfloat16") and run.tokenizer == str(folder)
        assert capsys.readouterr().out == told
    # Whoever sets a tokenizer or a part of the shape, or takes the weights back, means what the config says.
    named = resolve(["config=grpo", f"init_from={folder}", "tokenizer=miniature"])
    assert (named.tokenizer, named.model) == ("miniature", there)
    own = ["config=grpo", f"init_from={folder}", "model.num_layers=1"]
    assert resolve(own) == load(own) and load(own).tokenizer == "miniature" and load(own).model.head_dim == 32
    back = [f"config={mine}", "init_from="]
    assert resolve(back).model == load(["config=grpo"]).model and resolve(back).tokenizer == "miniature"
    whole = tmp_path / "whole.yaml"  # a config that has its own tokenizer has its own shape, too
    whole.write_text("task: sft\ntokenizer: words\nmodel: {num_layers: 5}\n")
    assert resolve([f"config={whole}", f"init_from={folder}"]).model.num_layers == 5
    # The weights of a run of the miniature leave everything as it was, also in its folder's name.
    with claim_folder(load(["config=sft", f"run={tmp_path / 'run'}"])):
        pass
    after = ["config=grpo", f"init_from={tmp_path / 'run'}"]
    assert flatten(resolve(after)) == flatten(load(["config=grpo"])) | {
        "run": load(after).run,
        "init_from": str(tmp_path / "run"),
    }


def test_a_shape_that_a_config_sets_stays_and_needs_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(ModelConfig(num_layers=9))))
    assert resolve(["config=sft_qwen2.5_32b", f"init_from={tmp_path}"]).model.num_layers == 64
    large = resolve(["config=sft_qwen2.5_32b"])
    assert large.tokenizer == large.init_from == "Qwen/Qwen2.5-32B-Instruct" and large.model.num_layers == 64
    nowhere = resolve(["config=sft_retool", f"init_from={tmp_path / 'nowhere'}"])
    assert nowhere.model.num_layers == ModelConfig.num_layers


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("sft", "sft.row_length=192, sft.rows_per_micro=4"),
        ("grpo", "rl.row_length=256, rl.rows_per_micro=4, engine.slots"),
    ],
)
def test_a_device_without_room_is_told_with_what_to_lower(config, sizes):
    with pytest.raises(UserError) as caught, explain_out_of_memory(load([f"config={config}"])):
        jax.jit(lambda: jnp.ones((1 << 23, 1 << 21)))()  # 64 TB
    message = str(caught.value)
    assert message.startswith("a device has no room for what this run computes (RESOURCE_EXHAUSTED")
    assert f"; lower {sizes}" in message and "\n" not in message
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory(load([f"config={config}"])):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.parametrize(
    "words",
    [
        ["engine.slots=65536", "engine.max_length=1048576"],
        ["engine.slots=192", "engine.max_length=128", "engine.pages=2000000000"],
        ["engine.slots=192", "engine.max_length=128", "engine.prefix_tokens=2000000000"],
    ],
)
def test_a_cache_that_no_machine_holds_is_refused_before_anything_is_compiled(tokenizer, compiles, words):
    run, known = load(["config=eval", "init_from=x", "mesh.tp=2", "model.num_layers=99", *words]), len(compiles)
    said = rf"an engine of {', '.join(words)} holds [0-9,.]+ GB with its weights, and there are [0-9,.]+ GB; lower one"
    with pytest.raises(UserError, match=said), compiled_ahead(run, make_mesh(run.mesh), tokenizer):
        raise AssertionError
    assert len(compiles) == known


def test_a_checkpoint_of_another_kind_is_refused_when_its_shape_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type='mamba'; only qwen2, qwen3, llama are supported"):
        resolve(["config=sft_retool", f"init_from={tmp_path}"])
