"""Weights are sharded by their logical axes, and training gathers weights, not activations."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.errors import UserError
from retool_jax.learn.packing import Batch
from retool_jax.learn.step import Outputs, loss_and_gradient
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import abstract_params, unstack
from retool_jax.models.sharding import param_shardings, unstacked_shardings
from retool_jax.rl.config import RLConfig
from retool_jax.rl.loss import clipped_loss

ROWS, LENGTH = 16, 256
# An activation of all rows has 1 MB; a device's part of it, 131 kB, is larger than any weight.
MODEL = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, head_chunk=128
)
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVE = re.compile(r" = (.*) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def arrays(types: str) -> list[tuple[str, tuple[int, ...]]]:
    """The types and shapes in an HLO type, which may be a tuple: "(f32[2,3]{1,0}, s32[])"."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", types)
    return [(name, tuple(int(size) for size in sizes.split(",") if size)) for name, sizes in found]


def collectives(program: str) -> list[tuple[str, tuple[int, ...], int]]:
    """The arrays that devices exchange in a compiled program: operation, shape and bytes of each."""
    return [
        (match[2], shape, BYTES[name] * math.prod(shape))
        for match in COLLECTIVE.finditer(program)
        for name, shape in arrays(match[1])
    ]


def gradient_program(mesh: Mesh) -> str:
    """The compiled loss and gradient of an update on a mesh, as its text."""
    weights, everywhere = param_shardings(MODEL, mesh), meshes.replicated(mesh)
    rows = meshes.sharding(mesh, "micro", "batch", "length")
    shapes = [jax.ShapeDtypeStruct((2, ROWS, LENGTH), dtype) for dtype in ("i4", "i4", "i4", "?", "f4", "f4")]
    step = jax.jit(
        partial(loss_and_gradient, Outputs(MODEL), partial(clipped_loss, rl=RLConfig())),
        in_shardings=(weights, Batch(*[rows] * 5, everywhere)),
        out_shardings=(weights, everywhere),
    )
    with jax.set_mesh(mesh):
        columns = dict(zip(("old_logprobs", "advantages"), shapes[4:], strict=True))
        batch = Batch(*shapes[:4], columns, jax.ShapeDtypeStruct((), jnp.int32))
        return step.lower(abstract_params(MODEL)[1], batch).compile().as_text()


@pytest.mark.parametrize(
    ("sizes", "dimension"), [({"tp": 4, "fsdp": 2}, "kv_heads dimension of 2"), ({"fsdp": 8}, "embed dimension of 36")]
)
def test_weights_divide_over_the_mesh(sizes, dimension):
    model = ModelConfig(vocab_size=40, hidden_size=36, num_heads=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(UserError, match=f"does not divide the model's {dimension}; set mesh"):
        param_shardings(model, make_mesh(MeshConfig(**sizes)))
    param_shardings(model, make_mesh(MeshConfig(data=2, fsdp=2, tp=2)))


def test_unstacked_weights_lie_as_their_stack_does():
    mesh, shapes = make_mesh(MeshConfig(data=2, fsdp=2, tp=2)), abstract_params(MODEL)[1]
    stacked, split = param_shardings(MODEL, mesh), unstacked_shardings(MODEL, mesh)
    assert jax.tree.structure(split) == jax.tree.structure(jax.eval_shape(unstack, shapes))
    assert jax.tree.leaves(split["embedding"]) == jax.tree.leaves(stacked["embedding"])
    trees = shapes["layers"], stacked["layers"], split["layers"][1]
    for weight, stack, one in zip(*map(jax.tree.leaves, trees), strict=True):
        assert one.shard_shape(weight.shape[1:]) == stack.shard_shape(weight.shape)[1:]


def test_fsdp_exchanges_weights_and_no_activation():
    program = gradient_program(make_mesh(MeshConfig(fsdp=8)))
    stacks = [weight.shape for weight in jax.tree.leaves(abstract_params(MODEL)[1]["layers"])]
    layer_bytes = sum(4 * math.prod(shape[1:]) for shape in stacks)
    activation = ROWS // 8, LENGTH, MODEL.hidden_size
    assert 4 * math.prod(activation) > layer_bytes
    exchanged = collectives(program)
    assert ("all-gather", (MODEL.hidden_size, MODEL.intermediate_size)) in [one[:2] for one in exchanged]
    # Exceptions: one number per token, which are sorted for a percentile; the ids of tokens; their embeddings and the
    # gradient of these, of which a device sends each of the eight its part of D, which is less than the table.
    values, ids, parts = (2, ROWS, LENGTH), (ROWS, LENGTH), (ROWS * LENGTH // 8, MODEL.hidden_size // 8)
    apart = {("all-gather", values): 2, ("all-gather", ids): 1, ("all-to-all", parts): 2 * 8}
    for one, most in apart.items():
        assert [other[:2] for other in exchanged].count(one) <= most
    for operation, shape, size in exchanged:
        if (operation, shape) in apart:
            continue
        assert size <= layer_bytes and max(shape, default=1) <= MODEL.intermediate_size, (operation, shape)
    carries = [arrays(match[1]) for match in re.finditer(r" = \((.*)\) while\(", program)]
    assert any(("f32", activation) in carry for carry in carries), "the scan over layers carries a device's own rows"
    # No device holds all rows, or the whole gradient of a large weight while it is summed.
    floats = {shape for carry in carries for name, shape in carry if name == "f32"}
    assert not [shape for shape in floats if shape[-3:-1] == (ROWS, LENGTH)]
    assert not floats & {shape for shape in stacks if len(shape) > 2 and MODEL.hidden_size in shape}
