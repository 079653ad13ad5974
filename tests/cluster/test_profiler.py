"""`weft profile`: a real run, what it makes of measurements, and what happens when a process fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from weft.cluster import KINDS, Cluster, ClusterError, ProfileError, costs, profile, profiler
from weft.cluster.probes import operator_probes
from weft.memory.tiers import copies


@pytest.mark.slow
def test_a_quick_profile_of_this_machine(tmp_path):
    cluster, report = profile(processes=2, quick=True, offload=str(tmp_path), copies=copies)
    assert len(cluster) == 2 and cluster.uniform and len(cluster.hosts) == 1
    device = cluster[0]
    assert set(device.rates) == set(KINDS)
    assert 0 <= device.overlap <= 1
    for kind, rate in device.rates.items():
        assert 0 <= rate.overhead < 0.1, kind
        assert {"float32", "float64", "bfloat16"} <= set(rate.flops), kind
    assert 1e8 < device.rates["matmul"].flops["float32"] < 1e13
    assert 1e6 < cluster.link(0, 1).bandwidth < 1e12 and cluster.link(0, 1).latency < 0.1
    tier = device.offload
    assert (
        tier == cluster[1].offload and (tier.name, tier.folder) == ("disk", str(tmp_path)) and tier.capacity > 1 << 20
    )
    assert 1e6 < tier.bandwidth < 1e11 and 0 <= tier.overlap <= 1 and len(report.collectives["disk copies"]) == 8
    assert str(tmp_path) in str(report)
    assert set(report.operators) == set(KINDS)
    assert {name.split()[-1] for name in report.collectives} >= {"send", "all_reduce", "all_gather"}
    cluster.save(tmp_path / "cluster.yaml", str(report))
    assert Cluster.load(tmp_path / "cluster.yaml") == cluster
    assert json.loads(json.dumps(report.to_dict()))["processes"] == 2
    assert "median error" in str(report)


def result(host: str, slowness: float = 1.0, **changes) -> dict:
    """What `measure` would return on a machine of 1e10 FLOP/s, 1e9 bytes/s and 1e-5 s a call."""
    operators = []
    for probe in operator_probes(quick=True):
        phases = [(phase.calls, phase.flops, phase.nbytes) for phase in probe.phases]
        seconds = slowness * sum(calls * 1e-5 + max(flops / 1e10, nbytes / 1e9) for calls, flops, nbytes in phases)
        operators.append((probe.kind, probe.label, phases, seconds))
    dtypes = {"float32": 1.0, "float64": 0.5, "bfloat16": 0.1, "float16": 0.1}
    base = {
        "host": host,
        "kind": "cpu-core",
        "machine": "toy x2",
        "device": "cpu",
        "memory": 4 << 30,
        "overlap": 0.5,
        "disturbance": 0.0,
    }
    return {**base, "operators": operators, "dtypes": dtypes, "links": [], **changes}


def rows(level: str, ranks: list[int], latency: float, bandwidth: float) -> list[tuple]:
    found = []
    for name in ("all_reduce", "all_gather"):
        messages, fraction = profiler.collective_shape(name, len(ranks))
        found += [
            (level, name, n, ranks, messages * latency + fraction * n / bandwidth) for n in (1 << 10, 1 << 16, 1 << 22)
        ]
    return found


def test_measurements_become_a_cluster():
    network = rows("network", [0, 2], 1e-4, 1e8)
    results = [
        result("alpha", links=rows("host", [0, 1], 1e-5, 1e9) + network),
        result("alpha", memory=3 << 30, links=rows("host", [0, 1], 1e-5, 1e9)),
        result("beta", slowness=2.0, links=network),
    ]
    cluster, report = profiler.assemble(results)
    assert [level.name for level in cluster.levels] == ["host", "network"]
    assert cluster.link(0, 1).bandwidth == pytest.approx(1e9, rel=0.01)
    assert cluster.link(0, 1).latency == pytest.approx(1e-5, rel=0.01)
    assert cluster.link(1, 2).bandwidth == pytest.approx(1e8, rel=0.01) and cluster.link(1, 2).shared
    assert cluster[0].memory == cluster[1].memory == 3 << 30  # alike, and neither promises more than both have
    assert cluster[0].same_as(cluster[1]) and not cluster[0].same_as(cluster[2])
    alpha, beta = (cluster[rank].rates["matmul"].flops["float32"] for rank in (0, 2))
    assert alpha == pytest.approx(1e10, rel=0.1) and beta == pytest.approx(0.5e10, rel=0.1)
    assert cluster[0].rates["matmul"].flops["float64"] == pytest.approx(alpha / 2, rel=0.01)
    assert report.error("alpha cpu-core matmul") < 0.05
    assert costs.all_reduce(cluster, (0, 1), 1 << 22) == pytest.approx(2e-5 + (1 << 22) / 1e9, rel=0.02)


def test_a_single_process_has_no_links():
    cluster, report = profiler.assemble([result("alpha")])
    assert len(cluster) == 1 and cluster.levels == () and report.collectives == {}


def test_a_process_that_dies_is_named_and_the_others_end(monkeypatch, tmp_path):
    (tmp_path / "dying.py").write_text(
        "import sys, time\nif sys.argv[2] == '1':\n    sys.exit('no such instruction')\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(profiler, "WORKER", "dying")
    begin = time.monotonic()
    with pytest.raises(ProfileError, match="process 1 ended with status 1") as caught:
        profile(processes=2, quick=True)
    assert "no such instruction" in str(caught.value) and caught.value.rank == 1
    assert time.monotonic() - begin < 30  # did not wait for the one that sleeps


def test_a_process_that_hangs_is_ended(monkeypatch, tmp_path):
    (tmp_path / "hanging.py").write_text(
        "import os, time\nopen(os.path.join(os.path.dirname(__file__), 'pid'), 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(profiler, "WORKER", "hanging")
    with pytest.raises(ProfileError, match="process 0 did not finish within 3 s"):
        profile(processes=1, quick=True, timeout=3.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_bad_arguments():
    with pytest.raises(ClusterError, match="processes must be >= 1, got 0"):
        profile(processes=0)


SCRIPT = """
import sys
from weft.cluster import profile
cluster, report = profile(quick=True, host=sys.argv[1])
cluster.save(sys.argv[2])
"""


@pytest.mark.slow
def test_under_torchrun_on_two_hosts(tmp_path):
    """Two processes as torchrun starts them, which say that they are on different hosts."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, f"host{rank}", str(tmp_path / f"{rank}.yaml")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=200) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    one, two = (Cluster.load(tmp_path / f"{rank}.yaml") for rank in range(2))
    assert one == two and one.hosts == ("host0", "host1")
    assert [level.name for level in one.levels] == ["network"] and one.link(0, 1).shared
