"""Fits recover the figures behind noisy samples, and alpha-beta fits collectives that others measured on real clusters."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from weft.cluster import LINKS, Cluster, costs
from weft.cluster.fit import CollectiveSample, OperatorSample, Phase, fit_link, fit_rate
from weft.cluster.profiler import collective_shape

DATA = Path(os.environ.get("WEFT_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data")) / "planner"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no measured planner data here (set WEFT_DATA)")


def samples(overhead: float, rate: float, bandwidth: float, noise: float, seed: int = 0) -> list[OperatorSample]:
    random, found = np.random.default_rng(seed), []
    for flops, nbytes in ((1e3, 1e3), (1e7, 1e5), (1e8, 1e6), (1e9, 1e6), (1e5, 1e7), (1e6, 1e8), (1e9, 1e8)):
        phases = (Phase(2, flops, nbytes), Phase(2, 2 * flops, 2 * nbytes))
        seconds = sum(p.calls * overhead + max(p.flops / rate, p.nbytes / bandwidth) for p in phases)
        found.append(OperatorSample(f"{flops:g}/{nbytes:g}", phases, seconds * random.lognormal(0, noise)))
    return found


def test_a_roofline_is_recovered_exactly_without_noise():
    rate, fit = fit_rate("matmul", samples(1e-5, 5e10, 1e10, 0.0))
    assert rate.overhead == pytest.approx(1e-5, rel=1e-3)
    assert rate.flops["float32"] == pytest.approx(5e10, rel=1e-3)
    assert rate.bandwidth == pytest.approx(1e10, rel=1e-3)
    assert fit.error < 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_a_roofline_is_recovered_through_noise_and_an_outlier(seed):
    found = samples(1e-5, 5e10, 1e10, 0.05, seed)
    found[seed] = OperatorSample("outlier", found[seed].phases, 5 * found[seed].seconds)
    rate, fit = fit_rate("matmul", found)
    clean, _ = fit_rate("matmul", samples(1e-5, 5e10, 1e10, 0.05, seed))
    assert rate.flops["float32"] == pytest.approx(5e10, rel=0.5)
    assert fit.error < 0.3
    assert clean.bandwidth == pytest.approx(1e10, rel=0.2)
    assert clean.flops["float32"] == pytest.approx(5e10, rel=0.2)


def test_a_roof_that_no_sample_touches_does_not_slow_anything():
    only_bytes = [OperatorSample(f"{n:g}", (Phase(1, 0.0, n),), 1e-5 + n / 1e10) for n in (1e3, 1e5, 1e7, 1e8)]
    rate, fit = fit_rate("gather", only_bytes)
    assert fit.error < 1e-2 and rate.flops["float32"] > 0
    assert rate.bandwidth == pytest.approx(1e10, rel=1e-2)


def test_a_link_is_recovered():
    rows = [CollectiveSample(f"{m} {n}", m, n, m * 2e-5 + n / 3e9) for m in (1, 3, 6) for n in (1e3, 1e5, 1e7, 1e8)]
    link, fit = fit_link("host", rows)
    assert link.latency == pytest.approx(2e-5, rel=1e-3)
    assert link.bandwidth == pytest.approx(3e9, rel=1e-3)
    assert fit.error < 1e-3


def test_shapes_of_collectives_are_those_of_the_cost_functions():
    assert collective_shape("all_reduce", 4) == (6, 1.5)
    assert collective_shape("all_gather", 4) == (3, 0.75)
    assert collective_shape("reduce_scatter", 2) == (1, 0.5)
    assert collective_shape("all_to_all", 4) == (3, 3 / 16)
    assert collective_shape("broadcast", 4) == (2, 2)
    assert collective_shape("send", 2) == (1, 1)


def vtrain(gpu: str, count: int) -> list[tuple[float, float]]:
    """(bytes, seconds) of all-reduces within one node, 1 MiB to 1 GiB (vTrain's measurements)."""
    with open(DATA / "vtrain" / f"allreduce_{gpu}_{count}gpu.csv", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and row[0].isdigit()]
    return [(float(row[0]), float(row[3]) * 1e-9) for row in rows]


@needs_data
@pytest.mark.parametrize("gpu", ["a100", "v100"])
@pytest.mark.parametrize("count", [2, 4, 5, 7, 8])
def test_alpha_beta_fits_measured_all_reduces(gpu, count):
    messages, fraction = collective_shape("all_reduce", count)
    rows = vtrain(gpu, count)[::16]
    _, fit = fit_link(gpu, [CollectiveSample(f"{n}", messages, fraction * n, t) for n, t in rows])
    assert fit.error < 0.03
    assert max(fit.errors) < 0.3


@needs_data
@pytest.mark.parametrize(("gpu", "kind"), [("a100", "A100-40GB"), ("v100", "V100-32GB")])
def test_library_links_are_near_measured_ones(gpu, kind):
    cluster = Cluster.homogeneous(kind, 8)
    for nbytes, seconds in vtrain(gpu, 8)[63::64]:  # 64 MiB to 1 GiB
        assert costs.all_reduce(cluster, range(8), nbytes) == pytest.approx(seconds, rel=0.15)
    assert cluster.link(0, 1) in LINKS.values()


@needs_data
@pytest.mark.parametrize("count", [2, 4, 16])
def test_alpha_beta_fits_each_measured_collective(count):
    table = json.loads((DATA / "nnscaler" / f"mi200_collectives_{count}.json").read_text())
    for name, (sizes, seconds) in table.items():
        collective = name.replace(" ", "_")
        messages, fraction = collective_shape(collective, count)
        rows = [
            CollectiveSample(f"{n}", messages, fraction * n * 2**20, t) for n, t in zip(sizes, seconds, strict=True)
        ]
        _, fit = fit_link(name, rows)
        assert fit.error < 0.15, name
