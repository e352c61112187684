"""Log-probabilities of a prompt's own tokens: `prompt_logprobs` of Chat Completions."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.engine.compiled import Program, row_parts
from retool_jax.engine.engine import Engine
from retool_jax.models import decoder
from retool_jax.models.config import ModelConfig
from retool_jax.serving.wire import LEAST_LOGPROB
from retool_jax.tokens.tokenizer import Tokenizer

MOST = 20  # the most alternatives of a token
_POSITIONS = 128  # positions whose logits are computed at a time; prompts are padded to powers of 2, at least this one


class Scores(NamedTuple):
    """Scores of every token of a prompt except the first; each array has T - 1 rows."""

    logprobs: np.ndarray  # of the token itself, under softmax(logits)
    ranks: np.ndarray  # 1 for the most likely token
    top_ids: np.ndarray  # [T-1,MOST], the most likely first
    top_logprobs: np.ndarray


class PromptScorer:
    """A forward pass over a prompt with an engine's weights; its cache is neither read nor written.

    For each padded length, a power of 2, a program is compiled when the first such prompt comes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        everywhere = engine.layouts.everywhere
        self._program = Program(jax.jit(partial(_score, engine.model), out_shardings=everywhere), everywhere)

    async def __call__(self, ids: Sequence[int]) -> Scores:
        """The scores of a prompt. Call it on the engine's thread; the event loop is not blocked."""
        length = _POSITIONS
        while length < len(ids):
            length *= 2
        tokens = np.zeros((row_parts(self._engine.mesh), length), np.int32)  # a row for each part of the mesh
        tokens[:, : len(ids)] = ids
        arguments = self._engine.weights, tokens, np.int32(len(ids))
        compiled = await asyncio.to_thread(self._program.form, *arguments)
        found = compiled(*arguments)
        return Scores(*(np.asarray(x)[: len(ids) - 1] for x in await asyncio.to_thread(jax.device_get, found)))


def _score(model: ModelConfig, params: decoder.Params | dict, tokens_BT: jax.Array, count: jax.Array) -> Scores:
    """The scores of the first row; all rows are equal. Position t has the score of token t + 1."""
    places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segments_BT = (places_BT < count).astype(jnp.int32)
    hidden_TD = decoder.forward(model, params, tokens_BT, places_BT, segments_BT)[0]
    next_T = jnp.roll(tokens_BT[0], -1)

    def visit(part: tuple[jax.Array, jax.Array]) -> Scores:
        hidden_cD, next_c = part
        logprobs_cV = jax.nn.log_softmax(decoder.logits(model, params, hidden_cD), axis=-1)
        own_c1 = jnp.take_along_axis(logprobs_cV, next_c[:, None], axis=-1)
        top, top_ids = jax.lax.top_k(logprobs_cV, MOST)
        return Scores(own_c1[:, 0], 1 + jnp.sum(logprobs_cV > own_c1, axis=-1), top_ids, top)

    parts = hidden_TD.reshape(-1, _POSITIONS, hidden_TD.shape[-1]), next_T.reshape(-1, _POSITIONS)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(visit, parts))


def prompt_logprobs(tokenizer: Tokenizer, ids: Sequence[int], scores: Scores, top: int) -> list[dict[str, Any] | None]:
    """In vLLM's form: null for the first token; for each other one itself and the `top` likeliest ones, by id."""
    entries: list[dict[str, Any] | None] = [None]
    for place, index in enumerate(ids[1:]):
        likely = zip(scores.top_ids[place, :top].tolist(), scores.top_logprobs[place], strict=False)
        scored = {each: (logprob, rank) for rank, (each, logprob) in enumerate(likely, 1)}
        scored[index] = scores.logprobs[place], scores.ranks[place]
        entries.append(
            {
                str(each): {
                    "logprob": max(float(logprob), LEAST_LOGPROB),
                    "rank": int(rank),
                    "decoded_token": tokenizer.decode([each]),
                }
                for each, (logprob, rank) in scored.items()
            }
        )
    return entries
