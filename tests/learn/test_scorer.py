"""A scorer gives each token the outputs of a step, wherever packing puts it, and is compiled once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retool_jax.errors import UserError
from retool_jax.learn.critic import critic_params
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.scorer import Scorer
from retool_jax.learn.step import Outputs
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.sharding import param_shardings

TEMPERATURE = 0.6


@pytest.fixture(scope="module")
def examples(model) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(0, model.vocab_size, length).tolist(), np.arange(length) % 4 > 1, {"advantages": 1.0})
        for length in rng.integers(4, 40, 9)
    ]


@pytest.fixture(scope="module")
def scorer(model, mesh) -> Scorer:
    return Scorer(Outputs(model, temperature=TEMPERATURE), mesh, 48, 2, 5, share_prefixes=True)


def assert_scores(scores: dict[str, list[np.ndarray]], examples: list[Example], expected: dict[str, list]) -> None:
    """Assert that values are equal where sampled, and 0 elsewhere."""
    assert scores.keys() == expected.keys()
    for name, arrays in scores.items():
        for example, array, values in zip(examples, arrays, expected[name], strict=True):
            assert array.dtype == np.float32 and array.shape == (len(example.ids),)
            np.testing.assert_allclose(array, np.where(example.sampled, values, 0.0), atol=1e-5)


@pytest.fixture(scope="module")
def expected(fresh_logits, examples) -> dict[str, list[np.ndarray]]:
    return by_forwards(fresh_logits, examples)


def by_forwards(fresh_logits: Callable, examples: list[Example]) -> dict[str, list[np.ndarray]]:
    """The outputs from one forward over each example."""
    logprobs, entropy = [], []
    for example, values in zip(examples, fresh_logits([e.ids for e in examples]), strict=True):
        logs = np.asarray(jax.nn.log_softmax(values[:-1] / TEMPERATURE))
        logprobs.append(np.r_[0.0, logs[np.arange(len(logs)), example.ids[1:]]])
        entropy.append(np.r_[0.0, -(np.exp(logs) * logs).sum(-1)])
    return {"logprobs": logprobs, "entropy": entropy}


def test_scores_are_those_of_a_forward_wherever_examples_stand(params, scorer, examples, expected, compiles):
    scores = scorer(params, examples)
    assert_scores(scores, examples, expected)
    known = len(compiles)
    order = [3, 7, 1]  # fewer rows, other sequences beside it
    again = scorer(params, [examples[i] for i in order])
    assert_scores(again, [examples[i] for i in order], {name: [x[i] for i in order] for name, x in expected.items()})
    assert scorer(params, []) == {"logprobs": [], "entropy": []}
    assert len(compiles) == known


def test_samples_that_share_a_prompt_have_the_scores_of_each_alone(scorer, params, examples, fresh_logits, compiles):
    known = len(compiles)
    samples = [Example([*range(20), *e.ids], np.r_[np.zeros(20, bool), e.sampled]) for e in examples if len(e.ids) < 28]
    scores = scorer(params, samples)
    assert len(compiles) == known
    assert_scores(scores, samples, by_forwards(fresh_logits, samples))


def test_scores_are_a_steps_outputs(model, params, scorer, examples):
    """They equal those of micro-batches of the same shape, to the last bits."""
    batch = pack(examples, 48, 2)
    compute = jax.jit(scorer.outputs.of)
    micros = [jax.tree.map(lambda x: x[i] if x.ndim else x, batch) for i in range(batch.micro_batches)]  # noqa: B023
    outputs = [compute(params, micro) for micro in micros]
    for name, arrays in scorer(params, examples).items():
        ours = np.concatenate([x[e.sampled] for x, e in zip(arrays, examples, strict=True)])
        theirs = np.concatenate([np.asarray(o[name])[m.sampled] for o, m in zip(outputs, micros, strict=True)])
        np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-6, atol=1e-6)


def test_a_mesh_and_a_critic(model, params, mesh, examples):
    """The critic's values on four devices and on one."""
    critic, rng = critic_params(model, params), np.random.default_rng(1)
    critic["value"][...] = jnp.asarray(rng.normal(0, 0.1, model.hidden_size), "f4")
    outputs, four = Outputs(model, ("values",)), make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    placed = jax.device_put(jax.tree.map(np.array, critic), param_shardings(model, four, value_head=True))
    ours = Scorer(outputs, four, 40, 4, 3)(placed, examples)
    alone = Scorer(outputs, mesh, 48, 2, 5)(critic, examples)
    assert_scores(ours, examples, alone)
    assert all(np.abs(x[e.sampled]).min() > 0 for x, e in zip(ours["values"], examples, strict=True))


def test_too_much_for_its_micro_batches_is_refused(params, scorer, examples):
    with pytest.raises(UserError, match="need 6 micro-batches of 2; the limit is 5"):
        scorer(params, [Example([1] * 40, [True] * 40)] * 11)


def test_a_scorer_can_be_lowered_without_weights_or_tokens(params, scorer, examples):
    batch = pack([Example(e.ids, e.sampled) for e in examples], 48, 2, 5)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    (logprobs,) = [x for name, x in scorer.lower(*shapes).out_info.items() if name == "logprobs"]
    assert logprobs.shape == batch.tokens.shape
