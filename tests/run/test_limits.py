"""Every number that a run may set has two ends: none is so large or so small that it means nothing, or overflows."""

import dataclasses
import typing

import pytest

from retool_jax.errors import UserError
from retool_jax.fields import hints_of
from retool_jax.run.load import load
from retool_jax.run.schema import EvaluateRun, RLRun, Run, ServeRun, SFTRun

NAMES = {SFTRun: "sft", RLRun: "grpo", EvaluateRun: "eval", ServeRun: "serve"}


def numbers(schema: type, prefix: str = "") -> dict[str, type]:
    """Every key of a run that holds one number."""
    found = {}
    for name, hint in hints_of(schema).items():
        if dataclasses.is_dataclass(hint):
            found |= numbers(hint, f"{prefix}{name}.")
            continue
        plain = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        kinds = {typing.get_args(kind)[0] if typing.get_args(kind) else kind for kind in typing.get_args(plain)}
        kinds |= {plain}
        if kinds & {int, float}:
            found[prefix + name] = float if float in kinds else int
    return found


@pytest.mark.parametrize("schema", NAMES)
def test_a_number_beyond_all_sense_is_refused_by_name(schema: type[Run]):
    keys = numbers(schema)
    assert {"model.rope_theta", "model.num_layers", "mesh.tp", "seed"} & keys.keys() or schema is ServeRun
    for key, kind in keys.items():
        values = ["-1e300", "1e300", ".inf", ".nan"] if kind is float else [str(-(10**30)), str(10**30), "-2"]
        for value in values:
            with pytest.raises(UserError) as caught:
                load([f"config={NAMES[schema]}", f"{key}={value}"])
            assert key.rpartition(".")[2] in str(caught.value) and "\n" not in str(caught.value), (key, value)
