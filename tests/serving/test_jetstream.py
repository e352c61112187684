"""The engine through google-jetstream's own abstract class, used as in its test of the mock engine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("jetstream") is None:
    pytest.skip("google-jetstream is absent: pip install --no-deps google-jetstream==0.2.2", allow_module_level=True)

from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Turn
from retool_jax.errors import UserError
from retool_jax.serving.jetstream import NO_BOS, JetStreamEngine, engine_api, make_driver


@pytest.fixture(scope="module")
def engine(make_engine) -> JetStreamEngine:
    return JetStreamEngine(make_engine(stop_ids=(), slots=4), "miniature")


def greedy(engine: JetStreamEngine, ids: list[int], count: int) -> list[int]:
    """The tokens that the engine itself draws after these ids."""

    def work(inner: Engine) -> list[int]:
        inner.clear()
        inner.append([0], [ids])
        inner.start(0, Turn(0, count, temperature=0.0))
        drawn: list[int] = []
        while len(drawn) < count:
            turns = inner.read(inner.decode())
            drawn += turns.tokens[0, : turns.counts[0]].tolist()
        return drawn

    return engine.call(work, engine.engine)


def test_it_is_an_engine_with_every_property(engine):
    assert isinstance(engine, engine_api.Engine) and not JetStreamEngine.__abstractmethods__
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (4, 1, 64)
    assert engine.mesh.size == 1 and engine.colocated_cpus is None
    assert engine.get_prefix_destination_sharding().is_fully_replicated


def test_prefill_insert_and_generate_give_the_greedy_tokens_in_their_slot(engine):
    """The five methods in the order of an orchestrator's calls, from text to text."""
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    padded, true_length = tokenizer.encode("What is 6 * 7?", is_bos=False)
    assert len(padded) == 16 and true_length < len(padded)
    expected = greedy(engine, padded[:true_length].tolist(), 6)

    params = engine.load_params()
    state = engine.init_decode_state()
    prefix = engine.prefill(params=params, padded_tokens=padded, true_length=true_length)
    state = engine.insert(prefix=prefix, decode_state=state, slot=1)
    drawn = []
    for step in range(6):
        state, tokens = engine.generate(params=params, decode_state=state)
        tokens.copy_to_host_async()
        found = tokens.convert_to_numpy().get_result_at_slot(1)
        assert found.valid.item() == 1 and found.lengths.item() == step + 1
        drawn.append(found.tokens.item())
        assert tokens.convert_to_numpy().get_result_at_slot(0).valid.item() == 0
    assert drawn == expected and tokenizer.decode(drawn) == tokenizer._tokenizer.decode(expected)


def test_an_existing_prefix_is_continued_and_kept(engine):
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 60, 9), rng.integers(1, 60, 5)
    expected = greedy(engine, [*first.tolist(), *second.tolist()], 4)
    params, state = engine.load_params(), engine.init_decode_state()
    prefix = engine.prefill(params=params, padded_tokens=first, true_length=9)
    longer = engine.prefill(params=params, existing_prefix=prefix, padded_tokens=second, true_length=5)
    assert (prefix.length, longer.length) == (9, 14)
    for slot in (0, 3):  # a prefix may be inserted more than once
        state = engine.insert(longer, state, slot)
    drawn = []
    for _ in range(4):
        state, tokens = engine.generate(params, state)
        drawn.append([tokens.convert_to_numpy().get_result_at_slot(slot).tokens.item() for slot in (0, 3)])
    assert drawn == [[token, token] for token in expected]


def test_a_prompt_is_taken_as_jetstream_gives_it(engine):
    """With a place for the beginning of a text, which Qwen does not have; longer than a row; or empty."""
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    params, bos = engine.load_params(), tokenizer.bos_id
    padded = np.array([bos, 5, 6, 7, tokenizer.pad_id])
    assert bos == NO_BOS and engine.prefill(params=params, padded_tokens=padded, true_length=4).length == 3
    assert engine.prefill(params=params, padded_tokens=np.array([bos]), true_length=1).length == 1
    text = "6 * 7 " * 100
    padded, true_length = tokenizer.encode(text, is_bos=True, max_prefill_length=engine.max_prefill_length)
    assert true_length == 64 and text.endswith(tokenizer.decode(padded[:true_length].tolist()))
    assert engine.prefill(params=params, padded_tokens=padded, true_length=true_length).length == 64
    # JetStream itself pads ids, and counts those that it has cut off.
    assert engine.prefill(params=params, padded_tokens=np.arange(64), true_length=70).length == 64


def test_a_cache_that_the_orchestrator_could_fill_is_refused(engine):
    with pytest.raises(UserError, match=r"engine.pages=24 hold less than 4 slots .* set engine.pages=54"):
        make_driver(engine)


PROGRAM = """
import asyncio, logging, threading
import jax, jax.numpy as jnp, numpy as np
from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import init_params
from retool_jax.serving.jetstream import JetStreamEngine, make_driver
from retool_jax.tokens.tokenizer import load_tokenizer

tokenizer = load_tokenizer("miniature")
model = ModelConfig(len(tokenizer), 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
rng = np.random.default_rng(1)
noisy = lambda x: x + jnp.asarray(rng.normal(0.0, 0.2, x.shape), x.dtype)
params = jax.tree.map(noisy, init_params(model, jax.random.key(1)))
config = EngineConfig(slots=32, max_length=96, decode_steps=4, pages=222)
inner = Engine(model, config, params, make_mesh(MeshConfig()), tokenizer.stop_ids, 0)


class Greedy:
    temperature, cancelled = 0.0, False

    def __init__(self, request, prompt):
        self.request, self.prompt = request, prompt

    def turn_budget(self):
        return 4

    def stop_at(self, ids, seen):
        return None

    def end_turn(self, ids, logprobs):
        self.ids = [token for token in ids if token not in tokenizer.stop_ids]


texts = [f"What is {i} * {i % 7}?" for i in range(500)]
chats = [Greedy(i, tokenizer.encode(text)) for i, text in enumerate(texts)]
chats += [Greedy(500 + i, rng.integers(1, 60, rng.integers(1, 60)).tolist()) for i in range(500)]
asyncio.run(converse(inner, chats))

engine = JetStreamEngine(inner, "miniature")
driver = make_driver(engine)
assert logging.getLogger().level == logging.WARNING
from jetstream.core import orchestrator
from jetstream.core.proto.jetstream_pb2 import DecodeRequest

client = orchestrator.LLMOrchestrator(driver)


async def ask(number):
    how = {"max_tokens": 4, "session_cache": "", "priority": 1}
    if number < 500:
        how["text_content"] = DecodeRequest.TextContent(text=texts[number])
    else:
        how["token_content"] = DecodeRequest.TokenContent(token_ids=chats[number].prompt)
    answers = [answer async for answer in client.Decode(DecodeRequest(**how))]
    return [token for answer in answers for token in answer.stream_content.samples[0].token_ids]


async def main():
    return await asyncio.gather(*[ask(number) for number in range(1000)])


found = asyncio.run(main())
threads = [thread.name for thread in threading.enumerate()]
assert {"prefill-0", "generate-0", "detokenize-0", "engine_0"} <= set(threads), threads

import socket

import grpc
from jetstream.core.server_lib import JetStreamServer
from requester import jetstreams_requester

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
server = JetStreamServer(driver, 8, port, grpc.insecure_server_credentials())
server.start()
request = DecodeRequest(token_content=DecodeRequest.TokenContent(token_ids=chats[500].prompt), max_tokens=4)
drawn, _, _ = asyncio.run(jetstreams_requester()(f"127.0.0.1:{port}", request))
assert drawn == chats[500].ids, (drawn, chats[500].ids)
server.stop()  # and the driver
wrong = [number for number in range(1000) if found[number] != chats[number].ids]
assert not wrong, (wrong, found[wrong[0]], chats[wrong[0]].ids)
engine.init_decode_state()
print("right:", len(found), "tokens:", sum(map(len, found)), "left:", engine.call(inner.counts))
"""


def test_jetstreams_own_driver_answers_a_thousand_requests_and_its_own_server_its_requester(one_device):
    """Its threads prefill, insert and generate at once. In a process of its own, since a failing thread would kill
    it."""
    pytest.importorskip("grpc", reason="JetStream's orchestrator: pip install grpcio prometheus-client shortuuid")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = one_device | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    words = done.stdout.splitlines()[-1].split()
    assert words[:2] == ["right:", "1000"] and int(words[3]) > 3000 and "'used': 0" in done.stdout
