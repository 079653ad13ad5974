"""The operators that `weft profile` times are counted as the graph counts them, which is how plans are priced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weft.cluster.probes import ModuleProbe, OperatorProbe, operator_probes
from weft.graph import capture

PROBES = [probe for probe in operator_probes(quick=False) if isinstance(probe, OperatorProbe)]


class Once(nn.Module):
    """One call of a probe, with its operands as parameters; an index comes from the batch."""

    def __init__(self, probe: OperatorProbe):
        super().__init__()
        self.call, self.indexed = probe.call, bool(probe.integers)
        floats = probe.shapes[:-1] if self.indexed else probe.shapes
        self.operands = nn.ParameterList([torch.zeros(shape, device="meta") for shape in floats])

    def forward(self, index):
        return self.call(*self.operands, *([index] if self.indexed else [])).sum()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.label)
def test_counts_agree_with_the_graph(probe):
    index = torch.zeros(probe.shapes[-1] if probe.integers else (1,), dtype=torch.int64)
    graph = capture(Once(probe), (index,))
    calls = [node for node in graph.calls if node.kind == probe.kind]
    node = calls[0]
    assert len(calls) == 1 or calls[1].op == "sum"
    cost = node.cost
    assert (cost.flops_forward, cost.flops_backward) == pytest.approx(probe.flops, rel=0.15)
    assert (cost.bytes_forward, cost.bytes_backward) == pytest.approx(probe.nbytes, rel=0.15)


@pytest.mark.parametrize("probe", operator_probes(quick=True), ids=lambda probe: probe.label)
def test_every_probe_runs(probe):
    if isinstance(probe, ModuleProbe) or sum(phase.nbytes for phase in probe.phases) < 4e6:
        probe.build(torch.device("cpu"))()


def test_every_kind_has_samples_of_several_sizes():
    from weft.cluster import KINDS

    for quick in (True, False):
        sizes: dict[str, set[float]] = {}
        for probe in operator_probes(quick):
            sizes.setdefault(probe.kind, set()).add(sum(phase.nbytes for phase in probe.phases))
        assert set(sizes) == set(KINDS)
        assert all(len(found) >= 2 for found in sizes.values())
