from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import pytest

from weft.bench import report
from weft.bench.harness import judged_anew, run_system
from weft.bench.meters import loopback_bytes, tensor_bytes
from weft.bench.record import (
    check_committed,
    commit,
    differing,
    find_records,
    machine,
    read_record,
    versions,
    write_record,
)
from weft.bench.system import Claim, Results, Row, System, constants, ratio, value

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


@pytest.fixture
def repository(tmp_path):
    """A committed repository with a package in it; its root and the package's folder."""
    sources = tmp_path / "src" / "weft"
    sources.mkdir(parents=True)
    for path in (sources / "__init__.py", tmp_path / "README.md"):
        path.write_text("\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    return tmp_path, sources


def git(folder, *words):
    who = ["-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, timeout=60)


def test_records_are_of_committed_code(repository):
    root, sources = repository
    clean = check_committed(root / "benchmarks", sources)
    assert len(clean) == 10
    (root / "README.md").write_text("changed\n")
    assert differing(sources=sources) == ["README.md"] and commit(sources=sources) == clean + "+"
    with pytest.raises(ValueError, match=r"README\.md differs .*commit or stash first"):
        check_committed(root / "benchmarks", sources)
    (sources / "__init__.py").write_text("changed = 1\n")
    with pytest.raises(ValueError, match=r"README\.md, src/weft/__init__\.py differ from"):
        check_committed(root / "benchmarks", sources)
    git(root, "commit", "-q", "-a", "-m", "y")
    assert check_committed(root / "benchmarks", sources) == commit(sources=sources) != clean


def test_new_files_count_where_weft_would_import_them(repository):
    root, sources = repository
    (root / "scratch.txt").write_text("x")
    assert differing(sources=sources) == []
    (sources / "new.py").write_text("x = 1\n")
    assert differing(sources=sources) == ["src/weft/new.py"]


def test_other_records_do_not_count(repository):
    """A run of several systems writes some before others; they are tracked."""
    root, sources = repository
    folder = root / "benchmarks"
    folder.mkdir()
    (folder / "a.json").write_text("1")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "y")
    (folder / "a.json").write_text("2")
    assert differing(sources=sources) == ["benchmarks/a.json"]
    assert check_committed(folder, sources) == commit(folder, sources) and "+" not in commit(folder, sources)


def test_outside_a_repository_no_commit_is_named(tmp_path, repository):
    root, sources = repository
    installed = root / "site-packages" / "weft"  # within a repository, but not of it
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert check_committed(root / "benchmarks", installed) == ""


def test_where_git_cannot_say_nothing_is_recorded(repository, monkeypatch):
    root, sources = repository
    (root / ".git" / "index").write_bytes(b"not an index")
    monkeypatch.setattr("weft.bench.record._tracked", lambda sources: True)
    with pytest.raises(ValueError, match="git cannot tell"):
        check_committed(root / "benchmarks", sources)
    assert commit(sources=sources) == ""


def test_bench_refuses_to_record_changed_files(monkeypatch, tmp_path, capsys):
    from weft.bench import record as records
    from weft.cli import main

    ran = []
    monkeypatch.setattr(records, "differing", lambda *_: ["src/weft/plan.py"])
    monkeypatch.setattr("weft.cli.catalogue.run_system", lambda *_: ran.append(1))
    assert main(["bench", "masha", "--record", "--folder", str(tmp_path / "made")]) == 2
    assert "src/weft/plan.py differs" in capsys.readouterr().err
    assert not ran and not list(tmp_path.glob("made/*"))


def test_claims_are_judged_anew_on_recorded_rows(record):
    assert judged_anew(record, SYSTEM) == record
    claims = (
        SYSTEM.claims[0],
        Claim("c", ratio("x", "m", "m"), at_least=2),
        Claim("d", value("never", "m"), at_least=1),
    )
    judged = judged_anew(record, dataclasses.replace(SYSTEM, claims=claims))
    assert [(c["text"], c["value"], c["met"]) for c in judged["claims"]] == [
        ("a", 0.5, True), ("c", 1.0, False), ("d", None, False)
    ]  # fmt: skip
    assert judged["judged"] == record["date"] and judged["rows"] == record["rows"]


def test_records_are_brought_up_to_date_without_a_run(record, tmp_path, capsys):
    folder = tmp_path / "benchmarks"
    path = write_record(record, folder)
    gone = write_record({**record, "system": "gone"}, folder)
    before = gone.read_text()
    assert report.reevaluate(folder) == [path]
    assert [c["text"] for c in read_record(path)["claims"]] == [c.text for c in report.entry("oneflow")[0].claims]
    assert not any(c["met"] for c in read_record(path)["claims"])
    assert gone.read_text() == before and "no system gone" in capsys.readouterr().err
    assert report.reevaluate(folder) == []


def test_recorded_claims_are_what_their_rows_say():
    folder = Path(__file__).parents[2] / "benchmarks"
    for recorded in find_records(folder):
        assert judged_anew(recorded, report.entry(recorded["system"])[0]) == recorded, (
            f"{recorded['system']}: run python -m weft.bench.report --reevaluate"
        )


def test_a_seed_without_a_number_leaves_none():
    rows = [Row.from_dict({"method": "m", "x": x}) for x in (1.0, None, 3.0)]
    assert math.isnan(Results(rows)["m", "x"])


def test_settings_are_the_constants_of_the_code(record):
    assert record["settings"]["weft.bench.systems.placement.oneflow"] == {"ROUNDS": 12}
    assert constants("weft.bench.unlike_clients")["DRAWS"] == 3
    assert "TARGET" in constants("weft.bench.unlike_clients") and "RIVAL" not in constants("weft.bench.stragglers")
    assert constants("weft.bench.robust_peers:Peers")["steps"] == 300
    for system in report.every_system():
        assert all(constants(place) for place in system.settings), system.name


def test_a_page_tells_commit_repeats_and_what_belongs_beside(record, tmp_path, monkeypatch):
    system = dataclasses.replace(
        SYSTEM, repeats="x is a mean of three", beside=lambda r: [f"x is {r['m', 'x']}, of {r.methods}"]
    )
    added = [{"what": "n", "date": "2026-02-01", "commit": ""}]
    write_record({**record, "commit": "0123456789+", "judged": "2026-03-01", "added": added}, tmp_path)
    monkeypatch.setattr(report, "every_system", lambda: [system])
    page = report.systems_page(tmp_path)
    assert (
        "commit 0123456789 with changes; 1 run, in which x is a mean of three; n added 2026-02-01, no commit known;"
        in page
    )
    assert "claims judged anew on these rows 2026-03-01:" in page
    assert "- x is 0.5, of ['m']" in page


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
