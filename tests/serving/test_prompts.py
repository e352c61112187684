"""`prompt_logprobs`: log-probs of a prompt's own tokens, compared with a fresh forward pass."""

import asyncio
from typing import Any

import jax
import numpy as np
import pytest

from retool_jax.engine.engine import Engine
from retool_jax.serving.prompts import PromptScorer


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    """The tiny model, in the shape of test_load.py's."""
    return make_engine(tool_lag=-1, token_buckets=(64,))


def body(**fields: Any) -> dict:
    user = {"role": "user", "content": "What is gcd(12, 18)?"}
    return {"messages": [user], "max_tokens": 1, "return_token_ids": True} | fields


def test_they_are_those_of_a_fresh_forward_with_ranks_and_alternatives(serve, engine, fresh_logits, tokenizer):
    async def main() -> tuple[dict, dict, list[str]]:
        async with serve(engine) as client:
            refused = [body(prompt_logprobs=1, stream=True), body(prompt_logprobs=21), body(prompt_logprobs=True)]
            told = [(await client.ask(each, status=400))["error"]["message"] for each in refused]
            asked = [await client.ask(body(prompt_logprobs=top, temperature=0.5)) for top in (3, 0)]
            assert "prompt_logprobs" not in await client.ask(body())
            return *asked, told

    engine.take_over()
    before = engine.counts()
    three, none, told = asyncio.run(main())
    assert engine.counts() == before
    ids = three["prompt_token_ids"]
    logprobs = np.asarray(jax.nn.log_softmax(fresh_logits([ids])[0], axis=-1))[:-1]
    assert three["prompt_logprobs"][0] is None and len(three["prompt_logprobs"]) == len(ids)
    for entry, alone, row, index in zip(
        three["prompt_logprobs"][1:], none["prompt_logprobs"][1:], logprobs, ids[1:], strict=True
    ):
        best = np.argsort(-row)[:3].tolist()
        assert set(entry) == {str(each) for each in {*best, index}} and set(alone) == {str(index)}
        for each in map(int, entry):
            said = entry[str(each)]
            assert said["logprob"] == pytest.approx(row[each], abs=1e-4)
            assert said["rank"] == 1 + int((row > row[each]).sum())
            assert said["decoded_token"] == tokenizer.decode([each])
        assert alone[str(index)] == entry[str(index)]
    assert "prompt_logprobs is not served with stream=true" in told[0]
    assert "prompt_logprobs is 21; it must be between 0 and 20" in told[1] and "prompt_logprobs is True" in told[2]


def test_a_long_prompt_is_scored_as_its_beginning_is(engine, fresh_logits):
    ids = np.random.default_rng(3).integers(1, 300, 300)
    engine.take_over()
    scores = asyncio.run(PromptScorer(engine)(ids.tolist()))
    logprobs = np.asarray(jax.nn.log_softmax(fresh_logits([ids[:90].tolist()])[0], axis=-1))
    np.testing.assert_allclose(scores.logprobs[:89], logprobs[np.arange(89), ids[1:90]], atol=1e-4)
    assert len(scores.logprobs) == 299 and np.isfinite(scores.logprobs).all() and scores.ranks.min() >= 1
