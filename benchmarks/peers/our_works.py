"""The works of `ours.py`: one call of `run` prepares and measures one work.

`update` is a policy update whose loss covers every token but the first of each row. It does more than its peers: it
also computes entropies and the spread of log-probabilities. `grpo` and `tool_step` sample, learn, and give the new
weights to the engine.
"""

import asyncio
from collections.abc import Coroutine
from functools import partial
from itertools import count

import jax
import numpy as np
from shape import (
    ANSWER,
    DRAWN,
    GROUP,
    LENGTH,
    MODEL,
    PROMPT,
    ROWS,
    TOOL_DRAWN,
    TOOL_LENGTH,
    TOOL_PROMPT,
    TURN,
    TURNS,
    report,
)

from retool_jax.data.problems import Problem
from retool_jax.engine.config import EngineConfig
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse
from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import init_state
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import Outputs, make_step
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.rl.algorithms import ALGORITHMS
from retool_jax.rl.config import RLConfig
from retool_jax.rl.learner import Learner, learn
from retool_jax.rl.loss import clipped_loss
from retool_jax.rollout.trajectory import End, Trajectory

QWEN = ModelConfig(**MODEL, tie_embeddings=False)
OPTIMIZER = OptimizerConfig(warmup_steps=1)
PROBLEM = Problem("random", (), "")


class Talk:
    """A conversation whose turns have one fixed length and whose tool answers at once."""

    temperature, cancelled = 1.0, False

    def __init__(self, request: int, prompt: list[int], turns: int, turn: int, rng: np.random.Generator) -> None:
        self.request, self.prompt = request, prompt
        self._turns, self._turn, self._rng = turns, turn, rng
        self.trajectory = Trajectory(str(request), PROBLEM, reward=(-1.0) ** request)
        self.trajectory.add("prompt", prompt)

    def turn_budget(self) -> int:
        return self._turn

    def stop_at(self, ids: list[int], seen: int) -> None:
        return None

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int]] | None:
        self.trajectory.add("policy", ids, logprobs)
        if self.trajectory.turns < self._turns:
            return self._answer()
        self.trajectory.end = End.ANSWERED
        return None

    async def _answer(self) -> list[int]:
        ids = random_ids(self._rng, ANSWER)
        self.trajectory.add("tool", ids)
        return ids

    def drop(self, reason: str) -> None:
        raise RuntimeError(f"request {self.request} was dropped: {reason}")


def random_ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(1, MODEL["vocab_size"], count).tolist()


def update() -> None:
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    examples = [
        Example(
            random_ids(rng, LENGTH),
            np.arange(LENGTH) > 0,
            {"old_logprobs": -7.6, "advantages": (-1.0) ** row},
        )
        for row in range(ROWS)
    ]
    batch = pack(examples, LENGTH, ROWS)
    change = make_step(Outputs(QWEN), partial(clipped_loss, rl=RLConfig()), OPTIMIZER, mesh)
    state = init_state(QWEN, OPTIMIZER, mesh, seed=0)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(change(state, batch))

    report("update", step, jax=jax.__version__)


def sampling(work: str) -> None:
    """Measure a work that samples; `grpo` and `tool_step` also learn from the samples."""
    tools, learns = work in ("rollout", "tool_step"), work in ("grpo", "tool_step")
    prompt, turns, turn = (TOOL_PROMPT, TURNS, TURN) if tools else (PROMPT, 1, DRAWN)
    length = TOOL_LENGTH if tools else PROMPT + DRAWN
    group = 1 if work == "generate" else GROUP
    rl = RLConfig(
        prompts_per_step=ROWS // GROUP, group_size=GROUP, minibatches=1, row_length=length, optimizer=OPTIMIZER
    )
    mesh, rng, requests = make_mesh(MeshConfig()), np.random.default_rng(0), count()
    state = init_state(QWEN, OPTIMIZER, mesh, seed=0)
    engine = Engine(QWEN, EngineConfig(slots=ROWS, max_length=length), state.params, mesh, [], seed=0)
    loss = partial(clipped_loss, rl=rl)
    learner = Learner(rl, ALGORITHMS["grpo"], length, make_step(Outputs(QWEN), loss, OPTIMIZER, mesh))

    def step() -> None:
        nonlocal state
        prompts = [random_ids(rng, prompt) for _ in range(ROWS // group)]
        talks = [Talk(next(requests), prompts[row // group], turns, turn, rng) for row in range(ROWS)]
        statistics = asyncio.run(converse(engine, talks))
        assert statistics.decoded_tokens == ROWS * (TOOL_DRAWN if tools else DRAWN)
        if learns:
            learned = learn(learner, state, [talk.trajectory for talk in talks], step=1)
            assert learned.tokens == ROWS * length
            state = learned.state
            engine.update_params(state.params)
            engine.wait()

    report(work, step, jax=jax.__version__)


def run(work: str) -> None:
    update() if work == "update" else sampling(work)
