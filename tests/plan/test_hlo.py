"""A module's cycles and sent bytes are added up through its loops and all notations of its collectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retool_jax.plan.hlo import Cost, cost_of, temporaries_of, trips

DEVICES = 8


def module(*lines: str, others: str = "") -> str:
    """A module on eight devices with these instructions in its entry."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions={DEVICES}\n\n{others}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def loop(name: str, bound: str, stride: int, *lines: str) -> str:
    """A loop's condition and body, as text; its bound is a constant or an unknown value."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""
%{name}_condition (c: (s32[], s32[])) -> pred[] {{
  %c = (s32[], s32[]) parameter(0)
  %at.{name} = s32[]{{:T(128)}} get-tuple-element(%c), index=0
  %end.{name} = {bound}
  ROOT %less = pred[] compare(%at.{name}, %end.{name}), direction=LT
}}

%{name}_body (b: (s32[], s32[])) -> (s32[], s32[]) {{
  %b = (s32[], s32[]) parameter(0)
  %i.{name} = s32[] get-tuple-element(%b), index=0
  %rest.{name} = s32[] get-tuple-element(%b), index=1
  %stride.{name} = s32[] constant({stride})
  %next.{name} = s32[] add(%i.{name}, %stride.{name})
{body}
  ROOT %out = (s32[], s32[]) tuple(%next.{name}, %rest.{name})
}}
"""


KNOWN = "s32[]{:T(128)} constant(12)"
UNKNOWN = "s32[] get-tuple-element(%c), index=1"
FUSED = '%f = f32[4] fusion(%p), kind=kLoop, calls=%inside, backend_config={"estimated_cycles":"100"}'


def while_of(name: str) -> str:
    return f"%w.{name} = (s32[], s32[]) while(%t), condition=%{name}_condition, body=%{name}_body"


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4,'c'=1] {'a','b'}", 8),
        ("{}", 8),
    ],
)
@pytest.mark.parametrize(
    ("shape", "kind", "sent"),
    [
        ("bf16[16,64]{1,0:T(8,128)(2,1)}", "all-gather", lambda n: 2048 * (n - 1) / n),
        ("f32[16,64]{1,0}", "reduce-scatter", lambda n: 4096 * (n - 1)),
        ("f32[16,64]{1,0}", "all-reduce", lambda n: 2 * 4096 * (n - 1) / n),
        ("(f32[16,64]{1,0}, s8[64]{0})", "all-reduce", lambda n: 2 * 4160 * (n - 1) / n),
        ("pred[64]{0}", "all-to-all", lambda n: 64 * (n - 1) / n),
        ("(bf16[16]{0}, bf16[16]{0}, u32[]{:S(2)})", "collective-permute-start", lambda n: (64 + 4) / 2),
    ],
)
def test_a_collective_sends_what_a_ring_would(groups, n, shape, kind, sent):
    found = cost_of(module(f"%x = {shape} {kind}(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"))
    assert found.sent == {kind.removesuffix("-start"): pytest.approx(sent(n))}
    assert found.wire == pytest.approx(sent(n)) and found.cycles == 0


def test_a_started_gather_has_its_argument_beside_its_result():
    line = "%x = (bf16[2,64], bf16[16,64]) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}"
    done = "%y = bf16[16,64] all-gather-done(%x)"
    assert cost_of(module(line, done)).wire == pytest.approx(2048 * 7 / 8)


def test_what_a_fusion_holds_counts_and_an_all_reduce_that_scatters_sends_half():
    inside = "%inside (p: f32[8]) -> f32[8] {\n  ROOT %r = f32[64] all-reduce(%p), replica_groups=[1,8]<=[8]\n}\n"
    fusion = '%f = f32[8] fusion(%p), kind=kCustom, calls=%inside, backend_config={"estimated_cycles":"7"}'
    text = module(fusion, others=inside)
    assert cost_of(text) == Cost(7.0, {"all-reduce": pytest.approx(2 * 256 * 7 / 8)})
    scattering = cost_of(text.replace("%inside", "%all-reduce-scatter.1"))
    assert scattering == Cost(7.0, {"reduce-scatter": pytest.approx(256 * 7 / 8)})


def test_loops_multiply_what_is_in_them():
    inner = loop("inner", KNOWN, 1, FUSED)
    text = module(while_of("outer"), others=inner + loop("outer", KNOWN, 4, while_of("inner")))
    assert cost_of(text).cycles == 3 * 12 * 100  # the outer one counts by fours
    unknown = module(while_of("outer"), FUSED, others=inner + loop("outer", UNKNOWN, 1, while_of("inner"), FUSED))
    assert [cost_of(unknown, times).cycles for times in ((), (0,), (1,), (5,))] == [1400, 100, 1400, 5 * 1300 + 100]
    both = loop("inner", UNKNOWN, 1, FUSED) + loop("outer", UNKNOWN, 1, while_of("inner"))
    nested = module(while_of("outer"), others=both)
    assert [cost_of(nested, times).cycles for times in ((1,), (1, 6), (2, 6), (2, 0))] == [100, 600, 1200, 0]


def test_what_stands_for_no_estimate_counts_nothing_and_a_choice_is_its_cheaper_branch():
    assert cost_of(module(*(FUSED.replace("100", cycles) for cycles in (str(1 << 60), "-1", "5")))).cycles == 5
    branches = "".join(
        f"%{name} (p: f32[4]) -> f32[4] {{\n  {FUSED.replace('100', cycles)}\n}}\n" for name, cycles in ("a9", "b2")
    )
    either = "%c = f32[4] conditional(%i, %p, %p), branch_computations={%a, %b}"
    assert cost_of(module(either, others=branches)).cycles == 2


def test_a_loop_that_counts_in_another_way_has_no_known_length():
    condition = [line for line in loop("odd", KNOWN, 1).split("}\n")[0].splitlines() if " = " in line]
    assert trips(condition, []) == 12
    assert trips([line.replace("LT", "NE") for line in condition], []) is None


@pytest.mark.parametrize("steps", [3, 5])
def test_the_collectives_of_a_compiled_module_are_found_through_a_scan(steps):
    """In the notation of the CPU's compiler."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("x",))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())

    def turn(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        all_of_it = jax.lax.with_sharding_constraint(x, whole)
        return jax.lax.with_sharding_constraint(jnp.sin(all_of_it) + 1, split), None

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.scan(turn, x, None, length=steps)[0]

    shape = jax.ShapeDtypeStruct((DEVICES * 128,), jnp.float32, sharding=split)
    text = jax.jit(run, out_shardings=split).lower(shape).compile().as_text()
    assert cost_of(text).sent == {"all-gather": pytest.approx(steps * 4 * 128 * (DEVICES - 1))}


def test_temporaries_are_what_is_allotted_in_the_devices_memory():
    """In the notation of the TPU's compiler: color 5 is the host's memory, color 1 the chip's own."""
    text = """
allocation 5: size 566231040, parameter 22, shape |f32[64,80,27648]| at ShapeIndex {}, maybe-live-out:
allocation 405: size 1024, thread-local:
allocation 595: size 10737418240, color 5, preallocated-temp:
 value: <4176 copy-start.35{0} @1> (size=48660480,offset=0): f32[152064,80]{0,1:T(8,128)S(1)}
allocation 597: size 13040976256, preallocated-temp:
allocation 599: size 50253824, color 1, preallocated-temp:
"""
    assert temporaries_of(text) == 13040976256
