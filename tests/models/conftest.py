"""What several tests of models share: PyTorch where it is installed, and the shapes of published models."""

import json
from pathlib import Path
from types import ModuleType

import pytest


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
