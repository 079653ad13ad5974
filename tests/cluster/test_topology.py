"""Devices, levels, links of pairs, and clusters made from the library."""

from __future__ import annotations

import math
import pickle

import pytest

from weft.cluster import DEVICES, KINDS, LINKS, Cluster, ClusterError, Device, Level, Link, Rate


def toy(name: str = "d", **changes) -> Device:
    return Device(
        **{"name": name, "kind": "toy", "memory": 10, "rates": {"default": Rate({"float32": 1e9}, 1e8)}, **changes}
    )


def test_seconds_is_a_roofline_with_overhead():
    matmul = Rate({"float32": 1e9, "bfloat16": 4e9}, 1e8, overhead=1e-6)
    device = toy(rates={"matmul": matmul, "elementwise": Rate({"float32": 1e8}, 1e8)})
    assert device.seconds("matmul", 2e9, 1e6) == pytest.approx(2 + 1e-6)  # bound by FLOPs
    assert device.seconds("matmul", 2e9, 1e9) == pytest.approx(10 + 1e-6)  # bound by bytes
    assert device.seconds("matmul", 2e9, 1e6, "bfloat16") == pytest.approx(0.5 + 1e-6)
    assert device.seconds("matmul", 2e9, 1e6, "float64") == pytest.approx(2 + 1e-6)  # not listed: as float32
    assert device.seconds("matmul", 2e9, 1e6, calls=5) == pytest.approx(2 + 5e-6)
    assert device.seconds("conv", 1e8, 0) == pytest.approx(1)  # no rate of its own: elementwise
    assert device.seconds("view", 1e9, 1e9) == device.seconds("none", 1e9, 1e9) == 0


def test_links_are_those_of_the_innermost_group_that_holds_both():
    inner, slow, outer, special = Link(1e-6, 1e11), Link(1e-6, 1e10), Link(1e-5, 1e9), Link(1e-3, 1e6)
    levels = (Level("host", ((0, 1), (2, 3, 4)), (inner, slow)), Level("network", ((0, 1, 2, 3, 4),), (outer,)))
    cluster = Cluster(tuple(toy(f"d{i}") for i in range(5)), levels, {(4, 0): special})
    assert cluster.link(0, 1) == cluster.link(1, 0) == inner
    assert cluster.link(2, 4) == slow
    assert cluster.link(1, 2) == outer
    assert cluster.link(0, 4) == cluster.link(4, 0) == special
    assert cluster.link(3, 3).seconds(1e9) == 0
    assert cluster.split((0, 2, 3, 1)) == [(0, 1), (2, 3)]
    assert cluster.ordered((3, 1, 2, 0)) == (0, 1, 2, 3)
    with pytest.raises(IndexError):
        cluster.link(0, 5)


def test_a_pair_may_have_a_link_for_each_direction():
    up, down = Link(0.0, 1e6), Link(0.0, 1e7)
    cluster = Cluster((toy("a"), toy("b")), (Level("all", ((0, 1),), (Link(0.0, 1.0),)),), {(0, 1): up, (1, 0): down})
    assert (cluster.link(0, 1), cluster.link(1, 0)) == (up, down)


def test_subset_keeps_links_and_renumbers():
    cluster = Cluster.homogeneous("A100-80GB", 8, hosts=2)
    part = cluster.subset((7, 0, 1))
    assert [device.name for device in part] == ["host1-3", "host0-0", "host0-1"]
    assert part.link(1, 2) == cluster.link(0, 1)
    assert part.link(0, 1) == cluster.link(7, 0)


def test_clusters_are_values():
    one, two = (Cluster.homogeneous("V100-16GB", 4, hosts=2) for _ in range(2))
    assert one == two and hash(one) == hash(two) and one is not two
    assert one != Cluster.homogeneous("V100-16GB", 4, hosts=4)
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one and copy.link(0, 1) == one.link(0, 1) and hash(copy) == hash(one)


def test_local_is_instant_and_deterministic():
    cluster = Cluster.local(processes=3)
    assert len(cluster) == 3 and cluster == Cluster.local(processes=3) and cluster.uniform
    assert cluster.hosts == ("localhost",)
    assert cluster[0].memory == Cluster.local(processes=1)[0].memory // 3
    assert cluster.link(0, 2) == LINKS["loopback"]
    assert Cluster.local(processes=2, memory=5)[1].memory == 5
    assert Cluster.local(processes=1).levels


@pytest.mark.parametrize("kind", DEVICES)
def test_every_library_device_is_usable(kind):
    cluster = Cluster.homogeneous(kind, 4, hosts=2)
    device = cluster[0]
    assert device.memory > 1 << 30
    assert set(KINDS) <= set(device.rates)
    for operator in KINDS:
        assert 0 < device.seconds(operator, 1e9, 1e6) < 10
        for dtype in ("float64", "bfloat16", "float16"):
            assert device.seconds(operator, 1e9, 1e6, dtype) > 0
    assert device.seconds("matmul", 1e12, 0) <= device.seconds("matmul", 1e12, 0, "float64")
    assert 0 < cluster.link(0, 1).bandwidth < math.inf


def test_newer_devices_and_links_are_faster():
    big = (1e13, 1e9, "float16")
    order = ["P100", "V100-32GB", "A100-80GB", "H100", "B200"]
    seconds = [DEVICES[kind].seconds("matmul", *big) for kind in order]
    assert seconds == sorted(seconds, reverse=True)
    for family in (["nvlink1", "nvlink2", "nvlink3", "nvlink4", "nvlink5"], ["pcie3", "pcie4", "pcie5"],
                   ["ethernet-1g", "ethernet-10g", "ethernet-25g", "ethernet-100g"],
                   ["wan", "infiniband-edr", "infiniband-hdr", "infiniband-ndr"]):  # fmt: skip
        speeds = [LINKS[name].bandwidth for name in family]
        assert speeds == sorted(speeds)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Link(-1.0, 1.0), "latency must be a finite number >= 0"),
        (lambda: Link(0.0, -5.0), "bandwidth must be > 0"),
        (lambda: Link(0.0, math.nan), "bandwidth must be > 0"),
        (lambda: Rate({}, 1.0), "flops must name at least one dtype"),
        (lambda: Rate({"float32": 0.0}, 1.0), "flops of float32 must be a finite number > 0"),
        (lambda: Rate({"float32": 1.0}, math.inf), "bandwidth must be a finite number > 0"),
        (lambda: toy(memory=0), "memory must be a finite number > 0"),
        (lambda: toy(overlap=1.5), r"overlap must be in \[0, 1\]"),
        (lambda: toy(rates={"matmul": Rate({"float32": 1.0}, 1.0)}), "must have an entry 'elementwise' or 'default'"),
        (lambda: Cluster(()), "at least one device"),
        (lambda: Cluster((toy("a"), toy("a"))), "both called 'a'"),
        (lambda: Cluster((toy("a"), toy("b"))), "leaves 2 groups apart"),
        (lambda: Cluster((toy("a"), toy("b")), (Level("l", ((0,),), (Link(0, 1),)),)), r"misses \[1\]"),
        (lambda: Cluster((toy("a"),), (Level("l", ((0, 0),), (Link(0, 1),)),)), r"repeats \[0\]"),
        (lambda: Cluster(tuple(toy(c) for c in "abc"), (
            Level("x", ((0, 1), (2,)), (Link(0, 1),) * 2), Level("y", ((0,), (1, 2)), (Link(0, 1),) * 2))), "cuts through"),
        (lambda: Cluster((toy("a"),), (), {(0, 1): Link(0, 1)}), "between devices 0 and 1"),
        (lambda: Cluster.homogeneous("A100-80BG", 2), "did you mean A100-80GB"),
        (lambda: Cluster.homogeneous("T4", 2, link="nvlik3"), "did you mean nvlink3"),
        (lambda: Cluster.homogeneous("T4", 3, hosts=2), "positive multiple of hosts"),
        (lambda: Cluster.local(processes=0), "processes must be >= 1"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(make, said):
    with pytest.raises(ClusterError, match=said):
        make()


def test_names_are_forgiving():
    assert Cluster.homogeneous("a100_80gb", 1)[0].kind == "A100-80GB"


def test_importing_the_package_imports_no_torch_and_no_solver():
    import subprocess
    import sys

    code = "import sys, weft.cluster; sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'highspy')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
