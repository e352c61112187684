"""Every number that a run may set has an upper and a lower limit, so that none is meaningless or overflows."""

import dataclasses
import math
import typing

import pytest

from retool_jax.errors import UserError
from retool_jax.fields import hints_of, nested
from retool_jax.run.load import make, merged, read
from retool_jax.run.schema import TASKS


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


def test_a_number_beyond_all_sense_is_refused_by_name():
    seen: set[str] = set()
    for task, schema in TASKS.items():
        _, values = read([f"config={task}" if task != "evaluate" else "config=eval"])
        keys = {key: kind for key, kind in numbers(schema).items() if key not in seen}
        seen |= keys.keys()
        for key, kind in keys.items():
            for value in (-1e300, 1e300, math.inf) if kind is float else (-(10**30), 10**30):
                with pytest.raises(UserError) as caught:
                    make(schema, merged([values, nested({key: value})]))
                assert key.rpartition(".")[2] in str(caught.value) and "\n" not in str(caught.value), (key, value)
    assert {"model.rope_theta", "mesh.tp", "seed", "rl.optimizer.b2", "serve.answer_s", "sandbox.limits.wall_s"} <= seen
