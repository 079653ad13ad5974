"""Cluster files: what they mean, round trips, and errors by line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from tests.cluster.test_costs import clusters

from weft.cluster import DEVICES, KINDS, LINKS, Cluster, ClusterError, Tier
from weft.cluster.units import nbytes_of, quantity

LAB = """\
name: lab
kinds:
  edge-core: {like: cpu-core, memory: 2 GiB, rates: {matmul: {flops: 20 GFLOP/s}}, offload: {to: disk, type: pcie3, latency: 0}}
  asic:
    memory: 16e9
    overlap: 0.5
    rates:
      default: {flops: {float32: 1 TFLOP/s, bfloat16: 8e12}, bandwidth: 100 GB/s, overhead: 2 us}
devices:
  - {device: A100-80GB, count: 4, host: alpha}
  - {device: V100-16GB, count: 2, host: beta, offload: {to: host, type: pcie3, latency: 50 us, capacity: 64 GiB, overlap: 0.75}}
  - device: edge-core
    name: edge
    host: edge
    overlap: 0.1
  - asic
levels:
  - {by: host, link: nvlink3, links: {beta: pcie3}}
  - name: rack
    groups: [[alpha, beta], [edge, localhost-0]]
    link: infiniband-hdr
  - {name: world, link: {latency: 20 ms, bandwidth: 100 Mbit/s, shared: true}}
links:
  - {between: [edge, alpha-0], type: wan, latency: 1 ms}
  - {between: [0, 5], link: pcie4}
"""


@pytest.fixture
def lab(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(LAB)
    return path


def test_what_a_file_means(lab):
    cluster = Cluster.load(lab)
    assert cluster.name == "lab" and len(cluster) == 8
    assert [device.name for device in cluster] == [
        "alpha-0", "alpha-1", "alpha-2", "alpha-3", "beta-0", "beta-1", "edge", "localhost-0",
    ]  # fmt: skip
    assert cluster.link(0, 3) == LINKS["nvlink3"] and cluster.link(4, 5) == LINKS["pcie3"]
    assert cluster.link(1, 4) == cluster.link(6, 7) == LINKS["infiniband-hdr"]
    assert cluster.link(1, 6).bandwidth == 12.5e6 and cluster.link(1, 6).shared
    assert cluster.link(6, 0).latency == 1e-3 and cluster.link(0, 5) == LINKS["pcie4"]
    edge, asic = cluster[6], cluster[7]
    assert edge.kind == "edge-core" and edge.overlap == 0.1 and edge.memory == 2 << 30
    assert edge.rate("matmul").flops["float32"] == 20e9
    assert edge.rate("norm") == cluster.subset([6])[0].rate("norm")
    assert asic.memory == 16_000_000_000 and asic.rate("conv").flops_of("bfloat16") == 8e12
    assert asic.rate("conv").overhead == 2e-6
    assert (
        cluster[4].offload
        == cluster[5].offload
        == Tier(LINKS["pcie3"].bandwidth, 50 * 1e-6, 64 << 30, "host", "", 0.75)
    )
    assert (
        edge.offload == Tier(LINKS["pcie3"].bandwidth, name="disk")
        and asic.offload is None
        and not cluster[4].same_as(DEVICES["V100-16GB"])
    )


def test_round_trips(lab, tmp_path):
    cluster = Cluster.load(lab)
    cluster.save(tmp_path / "again.yaml", comment="measured today\n\nby hand")
    assert (tmp_path / "again.yaml").read_text().startswith("# measured today\n#\n# by hand\nname: lab")
    assert Cluster.load(tmp_path / "again.yaml") == cluster
    assert Cluster.from_dict(json.loads(json.dumps(cluster.to_dict()))) == cluster


@settings(max_examples=40)
@given(clusters())
def test_any_cluster_round_trips(cluster):
    assert Cluster.from_dict(cluster.to_dict()) == cluster


def test_devices_of_one_kind_with_unlike_figures_round_trip(tmp_path):
    slow = {"like": "cpu-core", "kind": "cpu-core", "memory": "1 GiB"}
    busy = {"like": "cpu-core", "kind": "cpu-core", "step": "20 ms"}
    cluster = Cluster.from_dict(
        {
            "kinds": {"slow": slow, "busy": busy},
            "devices": ["cpu-core", "slow", "busy"],
            "levels": [{"link": "loopback"}],
        }
    )
    assert [device.kind for device in cluster] == ["cpu-core"] * 3 and not cluster.uniform
    assert cluster[2].step == 0.02 and cluster.subset([0, 1]).devices[0].step == cluster[1].step
    cluster.save(tmp_path / "c.yaml")
    assert Cluster.load(tmp_path / "c.yaml") == cluster


def test_merge_keys_and_anchors(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "kinds:\n  a: &a {like: T4, memory: 8 GiB}\n  b: {<<: *a, overlap: 0.5}\n"
        "devices: [a, b]\nlevels: [{link: pcie3}]\n"
    )
    cluster = Cluster.load(path)
    assert cluster[1].memory == 8 << 30 and cluster[1].overlap == 0.5 and cluster[1].kind == "b"


# (text of LAB, what takes its place, line of the error, what it says)
MISTAKES = [
    ("A100-80GB", "A100-80G", 10, "no device is called 'A100-80G'; did you mean A100-80GB"),
    ("- asic", "- asik", 16, "no device is called 'asik'; did you mean asic"),
    ("100 Mbit/s", "-5", 22, "bandwidth must be > 0 bytes per second, got -5"),
    ("20 ms", "-1", 22, "latency must be a finite number >= 0"),
    ("link: nvlink3", "link: nvlnk3", 18, "no link is called 'nvlnk3'; did you mean nvlink3"),
    ("overlap: 0.1", "step: -1", 15, "step must be a finite number >= 0 (seconds), got -1"),
    ("overlap: 0.1", "overlap: 2", 15, "overlap must be in [0, 1], got 2"),
    ("latency: 1 ms", "latncy: 1 ms", 24, "has no 'latncy'; did you mean latency?"),
    ("like: cpu-core", "like: cpu-cor", 3, "did you mean cpu-core?"),
    ("20 GFLOP/s", "-20 GFLOP/s", 3, "flops of float32 must be a finite number > 0"),
    ("20 GFLOP/s", "20 GFLP", 3, "'GFLP' in '20 GFLP' is not a unit of FLOP/s; write for example 312 TFLOP/s"),
    ("100 GB/s", "fast", 8, "bandwidth: must be bytes per second, for example 25 GB/s or 200 Gbit/s, got 'fast'"),
    ("bandwidth: 100 GB/s, ", "", 8, "bandwidth is missing"),
    ("[edge, localhost-0]", "[edg, localhost-0]", 20, "no device or host is called 'edg'; did you mean edge?"),
    ("name: edge", "name: alpha-0", 13, "two devices are called 'alpha-0'"),
    ("[alpha, beta], ", "", 17, "must hold every device once, but it misses [0, 1, 2, 3, 4, 5]"),
    ("{by: host", "{by: hst", 18, "by must be host"),
    ("count: 4", "count: 0", 10, "count must be a whole number >= 1, got 0"),
    ("kinds:", "kids:", 2, "a cluster file has no 'kids'; did you mean kinds?"),
    ("memory: 2 GiB", "memory: -2 GiB", 3, "memory must be a finite number > 0"),
    ("memory: 16e9", "momory: 16e9", 5, "has no 'momory'; did you mean memory?"),
    ("matmul:", "matmull:", 3, "rates has no 'matmull'; did you mean matmul?"),
    ("name: lab", "name: [lab", 2, "not YAML"),
    ("    host: edge\n", "    host: edge\n    host: other\n", 15, "'host' is given twice"),
    ("name: rack", "name: rack\n    by: host", 20, "by must be host, and stand without groups"),
    ("between: [0, 5]", "between: [0, beta]", 25, "between must name two devices"),
    ("between: [0, 5]", "between: [0, 55]", 25, "there is no device 55; devices are 0..7"),
    ("link: pcie4", "link: pcie4, latency: 1", 25, "give either link: NAME or latency and bandwidth"),
    ("bfloat16: 8e12", "bloat16: 8e12", 8, "flops has no 'bloat16'; did you mean bfloat16"),
    ("shared: true", "shared: 3", 22, "shared must be true or false, got 3"),
    ("to: disk", "to: tape", 3, "to must be host or disk, got 'tape'"),
    ("to: disk", "to: host", 3, "the host's memory is that of a cpu-core itself; offload to: disk"),
    ("to: disk, ", "", 3, "to is missing (host or disk)"),
    ("capacity: 64 GiB", "capacity: 0", 11, "capacity must be > 0 bytes, got 0"),
    ("overlap: 0.75", "overlap: 2", 11, "overlap must be in [0, 1], got 2"),
    ("capacity: 64 GiB", "shared: true", 11, "offload has no 'shared'"),
]


@pytest.mark.parametrize(("text", "mistake", "line", "said"), MISTAKES, ids=[row[1].strip() for row in MISTAKES])
def test_errors_name_the_line(lab, text, mistake, line, said):
    assert text in LAB
    lab.write_text(LAB.replace(text, mistake, 1))
    with pytest.raises(ClusterError) as caught:
        Cluster.load(lab)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{lab}:{line}: ")


@pytest.mark.parametrize(
    ("data", "where", "said"),
    [
        ({}, "devices", "a list of at least one device is needed"),
        ([], "cluster", "must be a mapping"),
        ({"devices": "T4"}, "devices", "must be a list"),
        ({"devices": ["T4", {"device": "T4", "memory": -1}]}, "devices[1].memory", "memory must be"),
        ({"devices": [{"name": "x"}]}, "devices[0]", "device is missing"),
        ({"devices": ["T4", "T4"]}, "cluster", "say what joins the devices"),
        ({"devices": ["T4", "T4"], "levels": [{}]}, "levels[0]", "have no link"),
        ({"devices": ["T4"], "kinds": {"x": {"overlap": 1}}}, "kinds.x", "memory is missing"),
        ({"devices": ["T4", "T4"], "levels": [{"link": {"latency": 1}}]}, "levels[0].link", "bandwidth is missing"),
    ],
)
def test_errors_name_the_place_in_a_dictionary(data, where, said):
    with pytest.raises(ClusterError, match=re.escape(said)) as caught:
        Cluster.from_dict(data)
    assert caught.value.where == where


def test_errors_survive_pickling():
    import pickle

    error = ClusterError("lab.yaml:3", "memory must be positive")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "lab.yaml:3: memory must be positive"


def test_a_file_that_is_empty_binary_or_missing(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    with pytest.raises(ClusterError, match="at least one device"):
        Cluster.load(path)
    path.write_bytes(b"\x00\x01")
    with pytest.raises(ClusterError, match="not YAML"):
        Cluster.load(path)
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ClusterError, match="not YAML"):
        Cluster.load(path)
    path.write_text("devices: &d [*d]\n")
    with pytest.raises(ClusterError):
        Cluster.load(path)
    with pytest.raises(FileNotFoundError):
        Cluster.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("80 GiB", "bytes", 80 * 2**30), ("1.5GB", "bytes", 1.5e9), (7, "bytes", 7), ("7", "bytes", 7), ("1e9", "bytes", 1e9),
        ("25 GB/s", "bytes per second", 25e9), ("200 Gbit/s", "bytes per second", 25e9), ("10 Gbps", "bytes per second", 1.25e9),
        ("5 us", "seconds", 5e-6), ("5 µs", "seconds", 5e-6), (".5 ms", "seconds", 5e-4), ("312 TFLOP/s", "FLOP/s", 3.12e14),
        ("-3", "a plain number", -3), ("inf", "bytes per second", float("inf")),
    ],
)  # fmt: skip
def test_quantities(text, dimension, value):
    assert quantity(text, dimension) == pytest.approx(value)


@pytest.mark.parametrize("text", ["GiB", "80 Gib", "80 GiB/s", True, None, "8 0", "", float("nan"), [1]])
def test_what_is_not_a_quantity(text):
    with pytest.raises(ValueError, match="80 GiB"):
        quantity(text, "bytes")
    with pytest.raises(ValueError, match=r"chunk: .*80 GiB"):
        nbytes_of(text, "chunk")


@pytest.mark.parametrize(("size", "nbytes"), [("6GiB", 6 * 2**30), ("1.7", 1), (1, 1), (2.5e3, 2500)])
def test_sizes(size, nbytes):
    assert nbytes_of(size, "chunk") == nbytes


@pytest.mark.parametrize("size", [0, 0.5, -1, "-3 GiB", float("inf"), "inf", float("-inf")])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"chunk: must be at least 1 bytes and finite, for example 80 GiB, got "):
        nbytes_of(size, "chunk")
    assert nbytes_of(0.5, "chunk", least=0) == 0


def test_a_measured_tier_is_written_and_read_back(tmp_path):
    tier = Tier(9e8, 1e-4, 1e12, "disk", "/fast/disk", 0.625)
    cluster = Cluster((replace(DEVICES["cpu-core"], name="a", host="h", offload=tier),), ())
    cluster.save(tmp_path / "cluster.yaml")
    assert Cluster.load(tmp_path / "cluster.yaml")[0].offload == tier


def test_the_documentation_holds():
    import yaml

    text = (Path(__file__).resolve().parents[2] / "docs" / "cluster-file.md").read_text(encoding="utf-8")
    first, kinds, tiers, pairs = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    assert len(Cluster.from_dict(first)) == 6
    below = [device.offload for device in Cluster.from_dict(tiers)]
    assert below == [Tier(LINKS["pcie4"].bandwidth, LINKS["pcie4"].latency, 200 << 30, "host")] * 4 + [
        Tier(5e8, 100 * 1e-6, name="disk")
    ]
    devices = [{"device": "edge-core", "host": "edge"}, {"device": "asic", "host": "alpha"}, *["T4"] * 4]
    whole = {**kinds, **pairs, "devices": devices, "levels": [{"link": "ethernet-10g"}]}
    assert Cluster.from_dict(whole).link(0, 1).latency == 1e-3
    for name in (*DEVICES, *KINDS):
        assert name in text, f"docs/cluster-file.md does not mention {name}"
    with pytest.raises(ClusterError) as caught:
        Cluster.homogeneous("A100-80G", 1)
    assert str(caught.value) in text
