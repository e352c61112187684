"""Fixtures of the models' tests: PyTorch if it is installed, the shapes of published models, greedy turns."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, with which transformers computes what ours is compared to. A test that asks for it skips without it."""
    return pytest.importorskip("torch")


@pytest.fixture(scope="session")
def published_configs() -> dict[str, dict]:
    """By name, the fields of a model's config.json that decide its parameters, and three facts that it does not hold.

    These are `attention_qkv_bias` and `qk_norm`, which follow from its model_type, and `n_params`, where a tied
    embedding counts once.
    """
    table = json.loads(Path(__file__).with_name("published_configs.json").read_text())
    return {name: dict(zip(table["columns"], row, strict=True)) for name, row in table["models"].items()}


@dataclass
class Greedy:
    """A conversation of one turn."""

    prompt: list[int]
    request: int
    tokens: int
    temperature: float = 0.0
    cancelled: bool = False
    ids: list[int] = field(default_factory=list)

    def turn_budget(self) -> int:
        return self.tokens

    def stop_at(self, ids: list[int], seen: int) -> None:
        return None

    def end_turn(self, ids: list[int], logprobs: list[float]) -> None:
        self.ids = ids


@pytest.fixture(scope="session")
def greedy() -> Callable[[Engine, list[list[int]], int], list[list[int]]]:
    """The most probable next tokens of prompts, so many of each, by the engine: `greedy(engine, prompts, 64)`."""

    def run(engine: Engine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        chats = [Greedy(prompt, request, tokens) for request, prompt in enumerate(prompts)]
        asyncio.run(converse(engine, chats))
        return [chat.ids for chat in chats]

    return run
