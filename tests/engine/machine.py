"""An engine with an oracle for its rows, for tests of its cache."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Turns
from retool_jax.models.decoder import forward, init_params, logits

ROOM = 96

CONFIG = EngineConfig(slots=4, max_length=ROOM, decode_steps=8, page_size=8, token_buckets=(8,), read_buckets=(40,))


def random_weights(config, key: int):
    """Random weights, norms and biases, larger than at initialisation: nearly uniform logits would hide differences."""
    rng = np.random.default_rng(key)
    fresh = init_params(config, jax.random.key(key))
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype), fresh)


@dataclasses.dataclass
class Machine:
    """An engine, what its rows should hold, and the oracle for it."""

    engine: Engine
    oracle: Callable[[list[list[int]]], np.ndarray]  # logits of the next token after each list
    head: Callable[[dict, np.ndarray], jax.Array]  # logits of hidden states
    rows: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def logits(self) -> np.ndarray:
        """The logits from which the engine would draw each row's next token, [slots, V]."""
        engine = self.engine
        return np.asarray(self.head({"embedding": engine.weights["embedding"]}, jax.device_get(engine._state.hidden)))

    def difference(self) -> float:
        """The largest difference of next-token logits from those of a fresh forward, over drawable rows."""
        rows = [row for row, ids in self.rows.items() if ids and self.engine._drawable[row]]
        if not rows:
            return 0.0
        return float(np.abs(self.logits()[rows] - self.oracle([self.rows[row] for row in rows])).max())

    def decode(self, dispatches: int = 1, steps: int | None = None) -> list[Turns]:
        """Decode; all dispatches are made before the first is read."""
        drawn = [self.engine.decode(steps) for _ in range(dispatches)]
        results = [self.engine.read(one) for one in drawn]
        for turns in results:
            for row in np.flatnonzero(turns.counts).tolist():
                ids = turns.tokens[row, : turns.counts[row]].tolist()
                self.rows[row] = self.rows[row] + (ids[:-1] if turns.ended[row] else ids)
                assert turns.ended[row] or ids[-1] not in self.engine.stop_ids
        return results


def device_bytes(engine: Engine) -> dict[str, int]:
    """The most bytes that weights, cache and dense rows take on one device."""
    found = {}
    for name, arrays in (("weights", engine.weights), ("cache", engine._state.cache), ("rows", engine._rows)):
        sums: dict[jax.Device, int] = {}
        for array in jax.tree.leaves(arrays):
            for shard in array.addressable_shards:
                sums[shard.device] = sums.get(shard.device, 0) + shard.data.nbytes
        found[name] = max(sums.values(), default=0)
    return found


def make_machine(model, mesh, seed: int = 3, config: EngineConfig = CONFIG) -> Machine:
    """A machine that stops at every eighth id, so that a random model's turns end in both ways."""
    weights = random_weights(model, 1)
    engine = Engine(model, config, weights, mesh, range(0, model.vocab_size, 8), seed)

    @jax.jit
    def behind(tokens: jax.Array, last: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(ROOM), tokens.shape)
        hidden = forward(model, weights, tokens, positions, jnp.ones_like(tokens))
        return logits(model, weights, hidden[jnp.arange(len(tokens)), last])

    def oracle(lists: list[list[int]]) -> np.ndarray:
        tokens, last = np.zeros((4, ROOM), np.int32), np.zeros(4, np.int32)
        for row, ids in enumerate(lists):
            tokens[row, : len(ids)], last[row] = ids, len(ids) - 1
        return np.asarray(behind(tokens, last))[: len(lists)]

    return Machine(engine, oracle, jax.jit(partial(logits, model)))
