"""The engine under google-jetstream 0.2.2's abstract class: its names and its meaning, and nothing of its own.

JetStream passes weights and decode state through every call; here the engine holds both, donated and in place, so the
values that come back stand for them and are given back as they are. A prefix may be inserted any number of times.

google-jetstream imports seqio, and with it TensorFlow, for a tokenizer that is not used here. Where seqio is absent
(`pip install --no-deps google-jetstream==0.2.2` with tiktoken and protobuf), empty classes stand in for the two that it
names, and the import costs nothing.
"""

import importlib.util
import sys
import types
from typing import Any

import jax
import numpy as np

from retool_jax import mesh as meshes
from retool_jax.engine.engine import Engine, Prefix
from retool_jax.engine.layouts import bucket
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


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """A checkpoint's tokenizer under JetStream's interface. Qwen has no token for the beginning of a text."""

    def __init__(self, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._lengths = lengths

    def encode(self, s: str, **kwargs: Any) -> tuple[np.ndarray, int]:
        """Ids [bucket] int32, padded to the engine's next compiled length, and how many are real."""
        ids = self._tokenizer.encode(s)
        padded = np.full(max(bucket(min(len(ids), self._lengths[-1]), self._lengths), len(ids)), self.pad_id, np.int32)
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
        raise AttributeError("Qwen's vocabularies have no token for the beginning of a text; encode with is_bos=False")

    @property
    def stop_tokens(self) -> set[int]:
        return set(self._tokenizer.stop_ids)


class JetStreamEngine(engine_api.Engine):
    """`Engine` as JetStream's orchestrator wants it; `tokenizer` is the path or hub id of its vocabulary."""

    def __init__(self, engine: Engine, tokenizer: str) -> None:
        self.engine = engine
        self._tokenizer = tokenizer

    def load_params(self) -> Any:
        return self.engine.load_params()

    def prefill(
        self, *, params: Any, existing_prefix: Prefix | None = None, padded_tokens: jax.Array, true_length: int
    ) -> Prefix:
        return self.engine.prefill(
            params=params, existing_prefix=existing_prefix, padded_tokens=padded_tokens, true_length=true_length
        )

    def insert(self, prefix: Prefix, decode_state: Any, slot: int) -> Any:
        return self.engine.insert(prefix, decode_state, slot)

    def generate(self, params: Any, decode_state: Any) -> tuple[Any, engine_api.ResultTokens]:
        """One token per slot; the columns are token, whether it is real, and the slot's length."""
        state, data = self.engine.generate(params, decode_state)
        tokens = engine_api.ResultTokens(
            data=data, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )
        return state, tokens

    def init_decode_state(self) -> Any:
        return self.engine.init_decode_state()

    def get_prefix_destination_sharding(self) -> jax.sharding.Sharding:
        return meshes.replicated(self.engine.mesh)

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
        return tokenizer_pb2.TokenizerParameters(path=self._tokenizer)

    def build_tokenizer(self, metadata: tokenizer_pb2.TokenizerParameters) -> JetStreamTokenizer:
        return JetStreamTokenizer(load_tokenizer(metadata.path), self.engine.sizes.tokens)

    @property
    def max_concurrent_decodes(self) -> int:
        return self.engine.max_concurrent_decodes

    @property
    def samples_per_slot(self) -> int:
        return self.engine.samples_per_slot

    @property
    def max_prefill_length(self) -> int:
        return self.engine.max_prefill_length

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.engine.mesh

    @property
    def colocated_cpus(self) -> None:
        return None
