from __future__ import annotations

import json
import math

import pytest

from weft.bench import report
from weft.bench.harness import run_system
from weft.bench.meters import loopback_bytes, tensor_bytes
from weft.bench.record import commit, find_records, machine, read_record, versions, write_record
from weft.bench.system import Claim, Row, System, value

SYSTEM = System(
    name="oneflow", title="T", paper="arXiv:1", solves="s", use=("weft.plan",), baselines=(),
    claims=(Claim("a", value("x", "m"), at_most=1), Claim("b", value("y", "m"), at_most=1)), tests=("t",),
)  # fmt: skip


@pytest.fixture
def record():
    return run_system(SYSTEM, lambda seed: [Row("m", x=0.5, never=math.inf)]).to_record()


def test_round_trip(record, tmp_path):
    path = write_record(record, tmp_path / "made")
    assert path.name == f"oneflow-{record['machine']['name']}.json"
    assert read_record(path) == record
    assert find_records(path.parent, "oneflow") == [record]
    assert find_records(path.parent, "other") == []
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]


def test_a_missed_measure_is_recorded_as_null(record):
    assert [(c["value"], c["met"]) for c in record["claims"]] == [(0.5, True), (None, False)]
    assert record["rows"] == [{"method": "m", "x": 0.5, "never": None}]
    json.dumps(record, allow_nan=False)


def test_facts(record):
    assert machine()["cores"] >= 1
    assert machine()["memory"] > 2**28
    assert {"python", "torch"} <= set(versions())
    assert isinstance(commit(), str)
    assert record["date"].count("-") == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"system": "x"}', "\x00"])
def test_a_damaged_record_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a benchmark record"):
        read_record(path)


def test_newest_first(record, tmp_path):
    for day, name in (("2026-01-01", "a"), ("2026-03-01", "b"), ("2026-02-01", "c")):
        write_record({**record, "date": day, "machine": {**record["machine"], "name": name}}, tmp_path)
    assert [r["date"] for r in find_records(tmp_path)] == ["2026-03-01", "2026-02-01", "2026-01-01"]


def test_readme_table(record, tmp_path):
    write_record(record, tmp_path)
    table = report.numbers(tmp_path)
    name = record["system"]
    assert f"| [{name}](docs/systems.md#{name}) | 1 of 2 | a | ≤ 1 | 0.5 |" in table
    assert f"Missed so far:\n\n- {name}: b: not measured, bound ≤ 1" in table
    page = report.systems_page(tmp_path)
    assert "| a | ≤ 1 | 0.5 | met |" in page
    assert "| b | ≤ 1 | not measured | **missed** |" in page
    readme = f"# x\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.readme_with(readme, table)
    assert "old" not in new
    assert new.startswith("# x\n")
    assert new.endswith("after\n")
    assert report.readme_with(new, table) == new
    with pytest.raises(ValueError, match="README needs"):
        report.readme_with("# x", table)


def test_a_picture_that_lies_beside_its_record_is_shown(record, tmp_path):
    name = next(s.name for s in report.every_system() if s.axes is not None)
    path = write_record({**record, "system": name}, tmp_path / "benchmarks")
    assert "![" not in report.systems_page(tmp_path / "benchmarks")
    path.with_suffix(".svg").write_text("<svg/>")
    assert f"](../benchmarks/{path.stem}.svg)" in report.systems_page(tmp_path / "benchmarks")


def test_nothing_recorded(tmp_path):
    assert "make bench" in report.numbers(tmp_path)
    assert "make bench" in report.numbers(tmp_path / "not there")


def test_loopback_counter():
    table = "Inter-|   Receive\n face |bytes\n    lo: 1234 5 0 0\n  eth0: 9 9\n"
    assert loopback_bytes(table) == 1234
    with pytest.raises(RuntimeError, match="lo"):
        loopback_bytes("eth0: 1 2\n")
    assert loopback_bytes() >= 0


def test_tensor_bytes_counts_a_storage_once():
    import torch

    whole = torch.zeros(10, 10)
    assert tensor_bytes([whole, whole[2:], whole.view(-1), torch.zeros(3)]) == 412


def test_peak_bytes_sees_what_is_gone_again():
    import torch

    from weft.bench.meters import peak_bytes

    with peak_bytes() as found:
        kept = torch.zeros(1000)
        gone = torch.zeros(5000)
        del gone
    assert found.peak == 24000
    assert found.end == 4000
    assert kept.numel() == 1000


def test_a_window_counts_only_itself_and_what_lives_then():
    import torch

    from weft.bench.meters import peak_bytes

    with peak_bytes() as found:
        torch.zeros(50_000)
        kept = torch.zeros(1000)
        with found.window():
            torch.zeros(2000)
        torch.zeros(70_000)
    assert found.peak == 12_000
    assert kept.numel() == 1000
