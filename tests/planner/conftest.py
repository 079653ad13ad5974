"""Small captured models and plain clusters for the planner's tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from weft.cluster import Cluster, Device, Level, Link, Rate, Tier
from weft.graph import Graph, capture
from weft.nn import GPT, GPTOptions


def gpt(layers: int = 2, **options) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTOptions(vocabulary=40, context=16, layers=layers, heads=4, width=16, **options)).double()


def tokens(batch: int = 6, length: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"tokens": torch.randint(0, 40, (batch, length)), "targets": torch.randint(0, 40, (batch, length))}


@pytest.fixture(scope="session")
def gpt_graph() -> Graph:
    return capture(gpt(), tokens())


@pytest.fixture(scope="session")
def deep_graph() -> Graph:
    return capture(gpt(layers=5), tokens())


def plain_cluster(
    devices: int, *, flops: float = 1e9, bandwidth: float = 1e9, overhead: float = 0.0, link: float = 1e8, overlap: float = 1.0,
    latency: float = 0.0, memory: int = 1 << 30, offload: Tier | None = None, step: float = 0.0,
) -> Cluster:  # fmt: skip
    """Equal devices that run everything at one rate, joined by equal links."""
    rate = Rate({"float32": flops}, bandwidth, overhead)
    one = Device("d", "plain", memory, {"default": rate}, overlap=overlap, offload=offload, step=step)
    made = tuple(replace(one, name=f"d{i}") for i in range(devices))
    return Cluster(made, (Level("net", (tuple(range(devices)),), (Link(latency, link),)),))
