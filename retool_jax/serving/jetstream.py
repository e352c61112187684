"""The engine under google-jetstream 0.2.2's abstract class. Names and meanings are JetStream's.

JetStream passes weights and decode state through every call. Here the engine holds both and updates them in place, so
the values that are returned only stand for them. A prefix may be inserted any number of times.

JetStream's orchestrator calls prefill, insert and generate from different threads. The engine belongs to one thread, so
all calls run on a thread of this module, one after another.

google-jetstream imports seqio, and with it TensorFlow, for a tokenizer that is not used here. If seqio is not installed
(`pip install --no-deps google-jetstream==0.2.2` with tiktoken and protobuf, and for the orchestrator grpcio,
prometheus-client and shortuuid), empty classes replace the two that it imports.
"""

import importlib.util
import logging
import sys
import types
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from retool_jax import mesh as meshes
from retool_jax.engine.config import bucket
from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Drawn, Prefix, Turn
from retool_jax.errors import UserError
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer


def _stand_in_for_seqio() -> None:
    if "seqio" in sys.modules or importlib.util.find_spec("seqio"):
        return
    vocabularies = types.ModuleType("seqio.vocabularies")
    for name in ("Vocabulary", "SentencePieceVocabulary"):
        setattr(vocabularies, name, type(name, (), {}))
    package = types.ModuleType("seqio")
    package.vocabularies = vocabularies
    sys.modules |= {"seqio": package, "seqio.vocabularies": vocabularies}


_stand_in_for_seqio()
from jetstream.engine import engine_api, tokenizer_api, tokenizer_pb2  # noqa: E402  (after the stand-in)

if TYPE_CHECKING:
    from jetstream.core.orchestrator import Driver

T = TypeVar("T")

NO_BOS = -1  # for JetStream's token at the beginning of a text, which Qwen does not have; `prefill` removes it
LENGTHS = tuple(16 << i for i in range(12))  # lengths to which JetStream pads prompts
OUTSIDE = 5  # the most prefixes that the orchestrator holds outside of the slots at once


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """A checkpoint's tokenizer under JetStream's interface. Qwen has no token for the beginning of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, s: str, *, max_prefill_length: int | None = None, **kwargs: Any) -> tuple[np.ndarray, int]:
        """Ids [bucket] int32, padded to the next of JetStream's lengths, and how many are real.

        A text of more than `max_prefill_length` tokens is cut at its beginning, as in JetStream.
        """
        ids = self._tokenizer.encode(s)
        ids = ids[-max_prefill_length:] if max_prefill_length else ids
        padded = np.full(max(bucket(min(len(ids), LENGTHS[-1]), LENGTHS), len(ids)), self.pad_id, np.int32)
        padded[: len(ids)] = ids
        return padded, len(ids)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return self._tokenizer.decode(token_ids)

    @property
    def pad_id(self) -> int:
        return self._tokenizer.stop_ids[-1]

    @property
    def eos_id(self) -> int:
        return self._tokenizer.stop_ids[0]

    @property
    def bos_id(self) -> int:
        return NO_BOS

    @property
    def stop_tokens(self) -> set[int]:
        return set(self._tokenizer.stop_ids)


class JetStreamEngine(engine_api.Engine):
    """An `Engine` for JetStream's orchestrator; `tokenizer` is the path or hub id of its vocabulary.

    It moves the engine to a thread of its own. Use `call` to do anything else with the engine on that thread.
    """

    def __init__(self, engine: Engine, tokenizer: str) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._device = ThreadPoolExecutor(1, "engine")
        self._under_way: deque[Drawn] = deque()
        self._starts = np.zeros(engine.config.slots, np.int32)  # length of each slot's prefix
        self.call(engine.take_over)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function on the engine's thread, after all earlier calls, and wait for it."""
        return self._device.submit(function, *arguments).result()

    def load_params(self) -> Any:
        return self.engine.weights

    def prefill(
        self, *, params: Any, existing_prefix: Prefix | None = None, padded_tokens: jax.Array, true_length: int
    ) -> Prefix:
        """Write the first `true_length` tokens after an existing prefix, which stays unchanged, or from position 0.

        An empty prompt becomes a single end-of-text token.
        """
        ids = [token for token in np.asarray(padded_tokens)[:true_length].tolist() if token != NO_BOS]
        if not ids:
            ids = [self.build_tokenizer(self.get_tokenizer()).pad_id]
        return self.call(self.engine.write_prefix, ids, existing_prefix)

    def insert(self, prefix: Prefix, decode_state: Any, slot: int) -> Any:
        """Begin a row in a slot with a prefix, whose pages it shares; it is decoded greedily."""
        return self.call(self._insert, prefix, slot)

    def _insert(self, prefix: Prefix, slot: int) -> None:
        self.engine.place(prefix, slot)
        self.engine.start(slot, Turn(slot, self.engine.config.max_length - prefix.length, temperature=0.0))
        self._starts[slot] = prefix.length

    def generate(self, params: Any, decode_state: Any) -> tuple[Any, engine_api.ResultTokens]:
        """One token per slot; the columns are token, whether it is real, and how many the slot has drawn."""
        data = self.call(self._generate)
        tokens = engine_api.ResultTokens(
            data=data, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )
        return decode_state, tokens

    def _generate(self) -> jax.Array:
        while len(self._under_way) > 1:
            self.engine.read(self._under_way.popleft())
        drawn = self.engine.decode(1)
        self._under_way.append(drawn)
        return _columns(drawn.ints, self._starts.copy())

    def init_decode_state(self) -> Any:
        """Free every slot."""
        return self.call(self._clear)

    def _clear(self) -> None:
        self._under_way.clear()
        self.engine.clear()

    def get_prefix_destination_sharding(self) -> jax.sharding.Sharding:
        return meshes.replicated(self.engine.mesh)

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
        return tokenizer_pb2.TokenizerParameters(path=self._tokenizer)

    def build_tokenizer(self, metadata: tokenizer_pb2.TokenizerParameters) -> JetStreamTokenizer:
        return JetStreamTokenizer(load_tokenizer(metadata.path))

    @property
    def max_concurrent_decodes(self) -> int:
        return self.engine.config.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        """The longest prompt; it must be one of JetStream's lengths."""
        return max(length for length in LENGTHS if length <= max(self.engine.config.max_length, LENGTHS[0]))

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.engine.mesh

    @property
    def colocated_cpus(self) -> None:
        return None


@jax.jit
def _columns(ints: jax.Array, starts_B: jax.Array) -> jax.Array:
    """Three numbers of each slot after a step: the token, whether it is real, tokens since the start; int32 [B,3]."""
    steps = ints.shape[1] // 2
    return jnp.stack([ints[:, 0], ints[:, steps], ints[:, -1] - starts_B], 1)


def make_driver(engine: JetStreamEngine) -> "Driver":
    """Start google-jetstream's own orchestrator over an engine; its `stop` ends it.

    Version 0.2.2 deletes the arrays of an inserted prefix with a function that jax no longer has; it is replaced by one
    that frees the prefix's pages. It also changes the level and handlers of the root logger, which is undone.

    Raises:
        UserError: the cache is too small for what the orchestrator keeps; it would end the process when pages run out.
    """
    sizes, slots = engine.engine.sizes, engine.engine.config.slots
    needed = (slots + OUTSIDE) * -(-engine.engine.config.max_length // sizes.page_size)
    if sizes.pages < needed:
        raise UserError(
            f"engine.pages={sizes.pages} hold less than {slots} slots and the {OUTSIDE} prompts that JetStream keeps;"
            f" set engine.pages={needed}"
        )
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from jetstream.core import orchestrator

    root.setLevel(level)
    root.handlers[:] = handlers
    orchestrator.delete_pytree = lambda prefix: prefix.release()
    params = engine.load_params()
    return orchestrator.Driver(
        prefill_engines=[engine],
        generate_engines=[engine],
        prefill_params=[params],
        generate_params=[params],
        interleaved_mode=True,
    )
