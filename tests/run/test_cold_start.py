"""The cold start that the train command runs: the name of its folder, and the form of its demonstrations."""

from retool_jax.fields import defaults_of, flatten
from retool_jax.run import cold_start
from retool_jax.run.cold_start import cold_start_of
from retool_jax.run.load import load
from retool_jax.run.schema import SFTRun


def test_a_cold_start_has_a_folder_for_each_thing_that_decides_it():
    def folder(*words: str) -> str:
        return cold_start_of(load(["config=grpo", *words])).run

    plain = folder()
    decisive = ["sft.steps=7", "seed=1", "tools=none", "model.num_layers=3", "model.compute_dtype=bfloat16"]
    assert len({plain, *(folder(word) for word in decisive)}) == len(decisive) + 1
    # RL's own keys and the machine's are none of its business.
    for word in ("rl.steps=3", "mesh.fsdp=2", "model.remat=full", "sft.rows_per_micro=8", "checkpoint.every=1"):
        assert folder(word, "run=runs/x") == folder("run=runs/x"), word


def test_a_key_that_is_new_leaves_a_cold_starts_folder_as_it_is(monkeypatch):
    """The default of a new key has the meaning of the time before it existed."""
    before = cold_start_of(load(["config=grpo"])).run
    assert before == "runs/cold-start-python-seed0-abca8126", "published runs have theirs there"
    defaults = defaults_of(SFTRun)
    monkeypatch.setattr(cold_start, "flatten", lambda run: flatten(run) | {"sft.new": 0})
    monkeypatch.setattr(cold_start, "defaults_of", lambda schema: defaults | {"sft.new": 0})
    assert cold_start_of(load(["config=grpo"])).run == before


def test_a_cold_start_is_written_in_the_grammar_of_its_policy():
    plain, other = cold_start_of(load(["config=grpo"])), cold_start_of(load(["config=grpo", "rollout.grammar=retool"]))
    assert (plain.sft.grammar, other.sft.grammar) == ("", "retool") and plain.run != other.run
    named = cold_start_of(load(["config=grpo", "rollout.grammar=hermes", "sft.grammar=hermes"]))
    assert (named.run, named.sft.grammar) == (plain.run, "")
    text_only = ["config=grpo", "rollout.grammar=retool", "tools=none"]
    assert load(text_only).rollout.grammar == "retool" and cold_start_of(load(text_only)).sft.grammar == ""
    assert load(["config=grpo", "rollout.grammar=retool", "init_from=runs/mine"]).rollout.grammar == "retool"


def test_several_tools_have_a_cold_start_of_their_own():
    one, two = (cold_start_of(load(["config=grpo", f"tools={tools}"])) for tools in ("python", "[python,a.b:C]"))
    assert one.run.startswith("runs/cold-start-python-seed0-")
    assert two.run.startswith("runs/cold-start-python+a.b_C-seed0-") and two.tools == ("python", "a.b:C")
