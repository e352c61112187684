"""Algorithms are records: found by name, refused in combinations without a meaning, and extended by a user's own."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from retool_jax.errors import UserError
from retool_jax.learn.packing import Batch
from retool_jax.rl.advantage import Scored
from retool_jax.rl.algorithms import ALGORITHMS, Algorithm, aggregation_of, algorithm_of
from retool_jax.rl.config import ClipConfig, CriticConfig, KLConfig, RLConfig, TeacherConfig
from retool_jax.rl.loss import aggregation_weights

TEACHER = TeacherConfig(init_from="runs/teacher")


def config(name: str, **keys) -> RLConfig:
    return RLConfig(algorithm=name, **({"teacher": TEACHER} if name == "opd" else {}) | keys)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gspo", "cispo", "ppo", "opd"])
def test_an_algorithm_makes_what_its_loss_reads(name):
    algorithm = algorithm_of(config(name))
    assert algorithm is ALGORITHMS[name]
    rng = np.random.default_rng(0)
    sampled = [rng.random(9) < 0.7 for _ in range(6)]
    models = {"critic": ("values",), "teacher": ("teacher_logprobs",)}
    told = ["old_logprobs", *(column for model in algorithm.models for column in models[model])]
    columns = {column: [rng.normal(size=9).astype(np.float32) * at for at in sampled] for column in told}
    made = algorithm.advantage(Scored(rng.normal(size=6), np.repeat([0, 1], 3), sampled, columns), config(name))
    assert set(algorithm.columns) <= columns.keys() | made.keys()
    assert ("returns" in made) == ("critic" in algorithm.models)

    read = {column: np.stack((columns | made)[column]) for column in algorithm.columns}
    zeros = np.zeros((6, 9), np.int32)
    batch = Batch(zeros, zeros, zeros + 1, np.stack(sampled), read, np.int32(1))
    outputs = {"logprobs": read["old_logprobs"] + 0.1, "entropy": np.ones((6, 9), np.float32)}
    terms = jax.eval_shape(lambda outputs: algorithm.loss(outputs, batch, config(name)), outputs)
    assert {x.shape for x in jax.tree.leaves(terms)} == {(6, 9)}
    assert {"clip_fraction", "mismatch_k3"} <= terms.metrics.keys() and terms.spread.keys() == {"logprob_diff"}
    aggregation_weights(aggregation_of(config(name), algorithm), np.array([3, 4]), 9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_loss_reads_each_of_its_keys_or_the_key_is_refused(name):
    rng = np.random.default_rng(0)
    ids = np.ones((4, 16), np.int32)
    columns = {column: rng.normal(size=(4, 16)).astype(np.float32) for column in ("old_logprobs", "advantages")}
    columns |= {"teacher_logprobs": columns["old_logprobs"], "old_values": ids, "returns": ids}
    moved = np.array([[-1.0], [-0.3], [0.3], [1.0]], np.float32)  # whole sequences beyond each bound
    outputs = {"logprobs": columns["old_logprobs"] + moved, "entropy": np.ones((4, 16), np.float32)}

    def loss(**keys) -> np.ndarray:
        batch = Batch(ids, ids, ids, ids > 0, columns, np.int32(1))
        return np.asarray(ALGORITHMS[name].loss(outputs, batch, config(name, **keys)).loss)

    for keys in (
        *({"clip": ClipConfig(**{key: value})} for key, value in (("low", 0.1), ("high", 0.1), ("dual", 1.5))),
        {"entropy_coefficient": 0.1},
    ):
        unread = np.array_equal(loss(), loss(**keys))
        try:
            algorithm_of(config(name, **keys))
        except UserError as error:
            assert unread and "is not read" in str(error), keys
        else:
            assert not unread, keys


def test_a_run_may_say_how_losses_become_one_number():
    dr_grpo, grpo = (ALGORITHMS[name] for name in ("dr_grpo", "grpo"))
    assert (aggregation_of(RLConfig(), grpo), aggregation_of(RLConfig(), dr_grpo)) == ("token_mean", "fixed")
    assert aggregation_of(RLConfig(aggregation="sequence_token_sum"), dr_grpo) == "sequence_token_sum"


@pytest.mark.parametrize(
    ("rl", "said"),
    [
        (config("grop"), ["rl.algorithm=grop", "did you mean grpo?", "dr_grpo", "my_package.my_module:MY_ALGORITHM"]),
        (config("dapo"), ["rl.algorithm=dapo is not known; it is grpo with rl.groups.dynamic=true; there are"]),
        (config("rloo", group_size=1), ["rl.algorithm=rloo", "rl.group_size=1", "rl.group_size=2 or more"]),
        (
            config("grpo", teacher=TEACHER),
            ["rl.teacher.init_from=runs/teacher", "rl.algorithm=grpo", "rl.algorithm=opd"],
        ),
        (config("grpo", teacher=TeacherConfig(coefficient=0.5)), ["rl.algorithm=grpo has no teacher", "rl.teacher;"]),
        (config("opd", teacher=TeacherConfig()), ["rl.algorithm=opd", "rl.teacher.init_from is empty"]),
        (config("grpo", kl=KLConfig(place="reward")), ["rl.kl.place=reward", "rl.kl.coefficient=0"]),
        (config("ppo", kl=KLConfig(estimator="k1")), ["rl.kl.estimator=k1", "rl.kl.coefficient=0"]),
        (config("grpo", gae_lambda=0.9), ["rl.algorithm=grpo has no critic", "rl.gae_lambda", "rl.algorithm=ppo"]),
        (config("opd", critic=CriticConfig(warmup_steps=1)), ["rl.algorithm=opd has no critic", "rl.critic;"]),
        (config("cispo", clip=ClipConfig(dual=3.0)), ["rl.clip.dual=3.0", "rl.algorithm=cispo"]),
        (config("no_such_package.mine:MINE"), ["no_such_package.mine:MINE", "cannot be loaded", "has MINE"]),
        (config("retool_jax.rl.algorithms:NONE"), ["cannot be loaded", "has NONE"]),
        (config("retool_jax.rl.algorithms:ALGORITHMS"), ["of the type dict", "retool_jax.rl.algorithms.Algorithm"]),
    ],
)
def test_what_cannot_mean_anything_is_refused_in_words(rl, said):
    with pytest.raises(UserError) as error:
        algorithm_of(rl)
    message = str(error.value)
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gate_high": 0.1}, "rl.teacher.gate_high=0.1 is not read with rl.teacher.form=plain"),
        ({"form": "gated", "coefficient": 2.0}, "rl.teacher.coefficient=2.0 is not read with rl.teacher.form=gated"),
    ],
)
def test_a_number_of_the_other_form_is_refused(keys, said):
    with pytest.raises(UserError, match=re.escape(said)):
        TeacherConfig(init_from="runs/teacher", **keys)


def test_one_sample_of_a_prompt_is_enough_for_a_critic_or_a_teacher():
    for name in ("ppo", "opd"):
        algorithm_of(config(name, group_size=1, kl=KLConfig(0.1, "k1", "reward")))


REINFORCE = '''
import numpy as np

from retool_jax.rl.algorithms import Algorithm
from retool_jax.rl.loss import clipped_loss


def reward_minus_mean(scored, rl):
    """REINFORCE (Williams, 1992) with the mean reward of the step for a baseline."""
    values = scored.rewards - scored.rewards.mean()
    return {"advantages": [np.float32(value) * at for value, at in zip(values, scored.sampled)]}


REINFORCE = Algorithm(reward_minus_mean, clipped_loss, aggregation="sequence_token_sum")
'''


def test_another_algorithm_is_one_record_in_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "algorithms_of_mine.py").write_text(REINFORCE)
    monkeypatch.syspath_prepend(tmp_path)
    rl = RLConfig(algorithm="algorithms_of_mine:REINFORCE", group_size=1)
    algorithm = algorithm_of(rl)
    assert isinstance(algorithm, Algorithm) and aggregation_of(rl, algorithm) == "sequence_token_sum"
    scored = Scored(np.array([1.0, 0.0, -1.0, 2.0]), np.arange(4), [np.array([False, True])] * 4, {})
    made = algorithm.advantage(scored, rl)["advantages"]
    np.testing.assert_allclose(made, [[0, 0.5], [0, -0.5], [0, -1.5], [0, 1.5]])
    assert made[0].dtype == np.float32


def test_a_record_is_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ALGORITHMS["grpo"].least_samples = 1
    mine = dataclasses.replace(ALGORITHMS["grpo"], aggregation="fixed")
    assert mine.advantage is ALGORITHMS["grpo"].advantage and mine.aggregation == "fixed"
