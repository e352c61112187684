"""Names of slices mean the same as Google's, and a wrong name is answered with the nearest."""

import pytest

from retool_jax.errors import UserError
from retool_jax.slices import CHIPS, TOPOLOGIES, named


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "devices", "topology"),
    [
        ("v5p-8", 4, 1, 4, "v5p:2x2x1"),
        ("v5p-64", 32, 8, 32, "v5p:2x4x4"),
        ("v5p-128", 64, 16, 64, "v5p:4x4x4"),
        ("v6e-8", 8, 1, 8, "v6e:2x4"),
        ("v6e-64", 64, 16, 64, "v6e:8x8"),
        ("v5e-256", 256, 64, 256, "v5e:16x16"),
        ("tpu7x-8", 4, 1, 8, "tpu7x:2x2x1"),
        ("tpu7x-128", 64, 16, 128, "tpu7x:4x4x4"),
        ("h100-8", 8, 1, 8, ""),
        ("h100-32", 32, 4, 32, ""),
        ("h200-4", 4, 1, 4, ""),
        ("cpu-8", 8, 1, 8, ""),
        ("cpu-16", 16, 1, 16, ""),
    ],
)
def test_a_name_says_how_many_chips_hosts_and_devices_there_are(name, chips, hosts, devices, topology):
    found = named(name)
    assert (found.chips, found.hosts, found.devices, found.topology) == (chips, hosts, devices, topology)
    assert found.of_host * found.hosts == devices


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5p-60", "did you mean v5p-64? there are: v5p-8, v5p-16"),
        ("v6e-2000", "did you mean v6e-256?"),
        ("v5p", "did you mean v5p-8?"),
        ("v7x-8", "did you mean tpu7x? kinds are: "),
        ("h100-12", "h100-1 to h100-8 are on one host; larger sizes are multiples of 8"),
        ("cpu-0", "cpu-1 to cpu-8 are on one host"),
        ("", "kinds are: v5e, v5p, v6e, tpu7x, h100, h200, cpu"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, meant):
    with pytest.raises(UserError, match=f"no slice is called '{name}'") as caught:
        named(name)
    assert meant in str(caught.value)


def test_every_topology_has_as_many_chips_as_its_name_says():
    for kind, sizes in TOPOLOGIES.items():
        for size in sizes:
            found, product = named(f"{kind}-{size}"), 1
            for side in found.shape:
                product *= side
            assert product == found.chips and len(found.shape) == 3
            assert found.devices == size or (found.chips == found.devices == size // 2 and kind == "v5p")


def test_a_chip_with_a_peak_has_all_that_times_are_computed_from():
    for name, chip in CHIPS.items():
        assert all(value > 0 for value in chip[3:7]) == (chip.flops > 0), name
        # 8 or 4 arrays of 128 x 128 products and sums, or 4 of 256 x 256, at each cycle
        assert chip.clock_hz == 0 or chip.flops / chip.devices / chip.clock_hz == pytest.approx(
            {"v5e": 1 << 17, "v5p": 1 << 18}.get(name, 1 << 19), rel=0.01
        )
