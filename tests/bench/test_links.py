"""Ranks on links of a chosen speed: tables and errors everywhere, the real thing where it is permitted."""

from __future__ import annotations

import subprocess
import time

import pytest

from weft.bench import links
from weft.bench.links import LinksNotPermitted, Wire, interface_bytes, namespaces, on_links, why_not

TABLE = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
 weft0:    4321      10    0    0    0     0          0         0     1234       9    0    0    0     0       0          0
"""


def test_bytes_of_the_interface():
    assert interface_bytes(TABLE) == (4321, 1234)
    with pytest.raises(RuntimeError, match="on_links"):
        interface_bytes("lo: 1")


def test_wires():
    assert Wire().rules("x") == []
    (rule,) = Wire(1e8).rules("x")
    assert rule[rule.index("rate") + 1] == "100000000bit" and "tbf" in rule
    assert str(Wire(1e7, 0.02)) == "10 Mbit/s, 20 ms"
    with pytest.raises(ValueError, match="rate"):
        Wire(10.0)
    with pytest.raises(ValueError, match="delay"):
        Wire(None, -1.0)


def test_without_permission_it_says_so(monkeypatch):
    def refused(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Operation not permitted")

    monkeypatch.setattr(links.subprocess, "run", refused)
    with pytest.raises(LinksNotPermitted, match="need root"), namespaces(2, Wire()):
        pass
    assert "Operation not permitted" in why_not()


def exchange_bytes(count):
    import torch
    import torch.distributed as dist

    def quiet():  # what is left in sockets and queues has crossed the wire
        dist.barrier()
        time.sleep(0.5)

    x = torch.ones(count)
    dist.all_reduce(x)
    quiet()
    before, began = interface_bytes()[1], time.perf_counter()
    dist.all_reduce(x)
    seconds = time.perf_counter() - began
    quiet()
    return seconds, interface_bytes()[1] - before


@pytest.mark.slow
@pytest.mark.parametrize("wire", [Wire(2e7), Wire(2e7, 0.02)])
def test_a_wire_is_as_slow_as_it_says(wire):
    if why := why_not(wire):
        pytest.skip(why)
    count = 125_000  # 500 kB each way at 20 Mbit/s: 0.2 s, and headers
    for seconds, sent in on_links("tests.bench.test_links:exchange_bytes", 2, wire, {"count": count}, 120):
        assert 4 * count < sent < 4.6 * count
        assert seconds > 0.15 + 2 * wire.delay  # less than the rate allows would be a broken bucket


@pytest.mark.slow
def test_a_rank_that_fails_is_reported_and_nothing_is_left_behind():
    if why := why_not():
        pytest.skip(why)
    with pytest.raises(RuntimeError, match="no_such_function"):
        on_links("tests.bench.test_links:no_such_function", 2, Wire(), {}, 60)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"weft{__import__('os').getpid()}x" not in left


def reported(codec):
    """(bytes that left the interface, bytes that the exchange says it sent) in some steps of DDP."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from weft.comm.codecs.plain import Identity
    from weft.comm.codecs.top_k import TopK
    from weft.comm.ddp import attach
    from weft.comm.exchange import Exchange
    from weft.comm.topology import AllGather

    exchange = Exchange(TopK(0.1), select=lambda spec: True) if codec == "top-k" else Exchange(Identity())
    if codec == "gather":
        exchange = Exchange(topology=AllGather())
    ddp = DistributedDataParallel(nn.Sequential(*[nn.Linear(512, 512) for _ in range(6)]))
    handle = attach(ddp, exchange)
    for step in range(5):
        if step == 2:  # buckets are rebuilt and compared by now
            dist.barrier()
            before, told = interface_bytes()[1], handle.exchange.report()
        ddp(torch.randn(4, 512)).square().mean().backward()
    dist.barrier()
    return interface_bytes()[1] - before, handle.exchange.report().nbytes * 5 - told.nbytes * 2


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["identity", "gather", "top-k"])
def test_the_report_counts_what_the_interface_sends(codec):
    if why := why_not():
        pytest.skip(why)
    for sent, told in on_links("tests.bench.test_links:reported", 2, Wire(), {"codec": codec}, 120):
        assert sent == pytest.approx(told, rel=0.05)
