"""`weft` from a shell: results on standard output, one line for an error, exit codes that mean something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from weft import paths
from weft.cli import main, parser, reference

ROOT = Path(__file__).parents[1]
MODEL = """
import torch
def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    return model, (torch.randn(8, 16), torch.randint(4, (8,))), torch.nn.functional.cross_entropy
"""


def weft(*words, folder, timeout=240):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "weft", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mymodel.py").write_text(MODEL)
    return tmp_path


COMMANDS = ("plan", "memory", "train", "profile", "export", "systems", "bench", "cite")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_suffices(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"weft {command}" in text
    assert "--json" in text


def test_every_option_has_a_help():
    for action in parser()._actions:
        for command in (getattr(action, "choices", None) or {}).values():
            assert all(option.help for option in command._actions), command.prog


def test_the_reference_is_the_one_in_the_docs():
    assert (ROOT / "docs" / "cli.md").read_text() == reference.page(), "run: make docs"


@pytest.mark.parametrize("words", [[], ["fly"], ["plan", "--no-such-option"], ["train", "--steps", "many"]])
def test_bad_usage_is_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan"], "say what to train"),
        (["plan", "--task", "langage-model"], "did you mean language-model"),
        (["plan", "nothing_here:f"], "no module"),
        (["plan", "--task", "language-model", "--memory", "lots"], "memory: must be"),
        (["plan", "--task", "language-model", "--mesh", "2by4"], "not a mesh shape"),
        (["plan", "--task", "language-model", "--strategy", "zero-9"], "strategy must be one of"),
        (["plan", "--task", "language-model", "--cluster", "not-there.yaml"], "not-there.yaml"),
        (["plan", "--task", "language-model", "--save", "no/folder/plan.json"], "no folder"),
        (["memory"], "say what to train"),
        (["memory", "--task", "language-model", "--budget", "lots"], "--budget: must be bytes"),
        (["memory", "--task", "language-model", "--budget=-1GiB"], "--budget: must be at least 1 bytes"),
        (["memory", "--task", "language-model", "--offload", "fast"], "--offload must be bytes per second"),
        (["memory", "--task", "language-model", "--save", "plan.json"], "say which with --budget"),
        (["memory", "--task", "language-model", "--picture", "no/folder/memory.html"], "no folder"),
        (["memory", "--task", "language-model", "--optimizer", "adamm"], "did you mean"),
        (["memory", "--task", "language-model", "--device", "A100-80G"], "did you mean"),
        (["train", "--task", "language-model", "--steps", "0"], "--steps must be at least 1"),
        (["train", "--task", "language-model", "--lr", "-1"], "--lr must be a positive number"),
        (["train", "--task", "language-model", "--curve", "loss.png"], "name it .svg"),
        (["train", "--task", "language-model", "--curve", "no/folder/loss.svg"], "no folder"),
        (["train", "--task", "language-model", "--plan", "not-there.json"], "not-there.json"),
        (["train", "--task", "language-model", "--plan", "plan.json", "--mesh", "2"], "is for the search of a plan"),
        (["train", "--task", "language-model", "--checkpoint-every", "5"], "needs --checkpoint DIR"),
        (
            ["train", "--task", "language-model", "--checkpoint", "/dev/null/x"],
            "--checkpoint /dev/null/x: /dev/null is a file",
        ),
        (["train", "--task", "language-model", "--log-dir", "/dev/null"], "--log-dir /dev/null: that is a file"),
        (["train", "--task", "language-model", "--resume", "no-folder"], "no checkpoint at no-folder"),
        (["plan", "--task", "language-model", "--page", "no/folder/plan.html"], "--page no/folder/plan.html"),
        (["profile", "--processes", "0"], "--processes must be at least 1"),
        (["export", "not-there", "x.safetensors"], "no checkpoint"),
        (["systems", "perpetuum-mobile"], "no system is about"),
        (["bench"], "say which systems"),
        (["bench", "oneflw"], "did you mean oneflow"),
        (["bench", "oneflow", "--seeds", "0"], "--seeds must be at least 1"),
        (["bench", "oneflow", "--record", "--folder", "/dev/null/x"], "--folder /dev/null/x: /dev/null is a file"),
        (["cite", "zeroo-sharding"], "did you mean zero-sharding"),
        (["cite", "."], ".: not a plan but a folder"),
    ],
)
def test_bad_input_is_2_and_one_message(words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.startswith("weft: ")
    assert "Traceback" not in told.err
    assert told.out == ""


def test_debug_shows_the_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no module"):
        main(["plan", "nothing_here:f", "--debug"])


def test_a_run_that_fails_is_1(capsys, monkeypatch):
    from weft.cli import cite

    def fail(what):
        raise RuntimeError("rank 1 died")

    monkeypatch.setattr(cite, "_papers", fail)
    assert main(["cite", "oneflow"]) == 1
    assert capsys.readouterr().err == "weft: rank 1 died\n"


def test_interrupted_is_130(capsys, monkeypatch):
    from weft.cli import cite

    def interrupt(what):
        raise KeyboardInterrupt

    monkeypatch.setattr(cite, "_papers", interrupt)
    assert main(["cite", "oneflow"]) == 130


def test_systems(capsys):
    assert main(["systems", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"oneflow", "zero-sharding"} <= {system["name"] for system in found}
    assert main(["systems", "optimizer", "state"]) == 0
    assert "zero-sharding" in capsys.readouterr().out


@pytest.fixture
def quick_system(monkeypatch):
    """A catalogue entry that takes no time; claims met for seed 0 and missed on the median of three."""
    from weft.bench import Claim, Row, System, value
    from weft.cli import catalogue

    system = System(
        name="quick", title="Quick", paper="arXiv:0000.00000", solves="nothing", use=("weft.plan",), baselines=("theirs",),
        claims=(Claim("seconds", value("seconds", "ours"), at_most=1.5),), tests=("tests/test_cli.py",),
    )  # fmt: skip
    monkeypatch.setattr(catalogue, "entry", lambda name: (system, lambda seed: [Row("ours", seconds=1.0 + seed)]))
    return system


def test_bench_exit_code_says_whether_claims_are_met(quick_system, capsys, tmp_path):
    assert main(["bench", "quick", "--folder", str(tmp_path)]) == 0
    assert "1 of 1 claims met" in capsys.readouterr().out
    assert main(["bench", "quick", "--seeds", "3", "--folder", str(tmp_path)]) == 1
    assert "missed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_bench_records(quick_system, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("weft.bench.record.differing", lambda *_: [])  # whatever is being edited here
    assert main(["bench", "quick", "--record", "--json", "--folder", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == printed[0]
    assert printed[0]["claims"] == [{"text": "seconds", "bound": "≤ 1.5", "value": 1.0, "met": True}]
    assert main(["bench", "quick", "--folder", str(tmp_path)]) == 0
    assert "the record of" in capsys.readouterr().out


def test_cite_a_system(capsys):
    assert main(["cite", "oneflow", "zero-sharding"]) == 0
    text = capsys.readouterr().out
    assert "arXiv:2110.15032" in text
    assert "arXiv:1910.02054" in text
    assert main(["cite", "oneflow", "--bibtex"]) == 0
    assert "@article{oneflow," in capsys.readouterr().out


def test_every_system_is_cited_by_its_authors_and_year():
    from weft.bench import every_system
    from weft.cli import cite

    for system in every_system():
        (paper,) = cite._papers(system.name)
        assert re.fullmatch(r"[A-Z][^\d]+", paper.authors) and 2015 <= paper.year <= 2026, paper
        entry = cite.bibtex(paper)
        assert "author = {" in entry and not re.search(r"author = \{[^}]*(,|\d|et al)", entry), entry
    (paper,) = cite._papers("fedfix-async")
    assert (paper.authors, paper.journal, paper.year) == ("Fraboni, Vidal, Kameni, Lorenzi", "JMLR 24 (110)", 2023)
    assert cite._papers("coop")[0].authors == "Zhang et al."


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where not even root can write")
@pytest.mark.parametrize(
    ("check", "beside"), [(paths.to_file, False), (paths.to_folder, False), (paths.to_folder, True)]
)
def test_where_nothing_can_be_written(check, beside, tmp_path):
    options = {"beside": True} if beside else {}
    with pytest.raises(ValueError, match="--out /proc/x: nothing can be written in /proc"):
        check("--out", "/proc/x", **options)
    check("--out", tmp_path / "new", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "says"),
    [([8.0, 0.1, 0.2], "in 3 steps and 9.0 s; a step takes 200 ms"), ([8.0], "in 1 step and 9.0 s; a step is")],
)
def test_the_first_step_is_not_the_usual_one_and_losses_are_as_they_were(seconds, says, tmp_path, capsys):
    from weft.cli import train

    losses = [2.0, 1.5, 1.0][: len(seconds)]
    plan = SimpleNamespace(prediction=SimpleNamespace(seconds=0.1), mesh=SimpleNamespace(size=2))
    arguments = SimpleNamespace(curve=str(tmp_path / "loss.svg"), task="any", target=None, json=False)
    train.report(arguments, plan, losses, seconds, 9.0, 100)
    told = capsys.readouterr().out
    assert says in told and f"loss 2.0000 -> {losses[-1]:.4f}" in told
    assert ("tokens/s" in told) == (len(seconds) > 1)
    assert f"loss 2.000 to {losses[-1]:.3f}" in Path(arguments.curve).read_text()


def test_a_module_alone_lists_commands(folder):
    done = weft("--help", folder=folder)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mymodel", raising=False)
    return folder


def test_plan_saves_draws_and_says_json(here, capsys):
    assert main(["plan", "mymodel:build", "--save", "plan.json", "--page", "plan.html", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((here / "plan.json").read_text())
    page = (here / "plan.html").read_text()
    assert "<html" in page.lower()
    assert not re.findall(r"(?:src|href)=.https?://", page)
    assert main(["cite", "plan.json", "--json"]) == 0
    assert {paper["key"] for paper in json.loads(capsys.readouterr().out)} >= {"oneflow", "adamw"}


def test_cite_tells_what_a_plan_uses(here, capsys):
    keys = {}
    for strategy in ("dp", "zero-3", "tp"):
        assert main(["plan", "mymodel:build", "--strategy", strategy, "--save", f"{strategy}.json", "--json"]) == 0
        capsys.readouterr()
        assert main(["cite", f"{strategy}.json", "--json"]) == 0
        keys[strategy] = {paper["key"] for paper in json.loads(capsys.readouterr().out)}
    assert "ddp" in keys["dp"]
    assert not {"zero", "megatron"} & keys["dp"]
    assert "zero" in keys["zero-3"]
    assert "megatron" in keys["tp"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mesh", "3"], "the mesh has 3 devices, the cluster only 2"),
        (["--strategy", "dp,tp"], "2 devices cannot be arranged"),
    ],
)
def test_plan_refuses_what_cannot_be(here, capsys, words, says):
    assert main(["plan", "mymodel:build", "--processes", "2", *words]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") <= 3
    assert told.out == ""


DEEP = """
import torch
def build():
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Dropout(0.1)) for _ in range(6)]
    return torch.nn.Sequential(*layers), (torch.randn(256, 32), torch.randint(32, (256,))), torch.nn.functional.cross_entropy
"""


@pytest.fixture
def deep(here, monkeypatch):
    (here / "deep.py").write_text(DEEP)
    monkeypatch.delitem(sys.modules, "deep", raising=False)
    return "deep:build"


def test_memory_says_what_a_step_holds(deep, capsys):
    assert main(["memory", deep, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fixed"] < found["least"] < found["peak"]
    assert sum(found["by_category"].values()) == found["peak"]
    assert found["by_category"]["optimizer"] >= 2 * found["by_category"]["parameter"]  # AdamW's two moments
    assert main(["memory", deep, "--optimizer", "none", "--json"]) == 0
    assert "optimizer" not in json.loads(capsys.readouterr().out)["by_category"]


WRITTEN = """
import torch
def build():
    net = torch.nn.Sequential(torch.nn.InstanceNorm2d(8, affine=True, track_running_stats=True), torch.nn.SiLU(inplace=True))
    return net, (torch.randn(4, 8, 6, 6), torch.zeros(4, 8, 6, 6)), torch.nn.functional.mse_loss
"""


def test_memory_says_what_a_trace_could_not_see(here, monkeypatch, capsys):
    (here / "written.py").write_text(WRITTEN)
    monkeypatch.delitem(sys.modules, "written", raising=False)
    for words in ([], ["--budget", "1GiB"]):
        assert main(["memory", "written:build", *words]) == 0
        assert capsys.readouterr().out.count("views are written in place") == 1
    assert main(["memory", "written:build", "--json"]) == 0
    assert "views are written in place" in json.loads(capsys.readouterr().out)["notes"][0]


def test_memory_fits_a_step_into_a_budget(deep, capsys):
    from weft.memory.planning.memory_plan import MemoryPlan

    assert main(["memory", deep, "--json"]) == 0
    free = json.loads(capsys.readouterr().out)
    budget = (free["least"] + free["peak"]) // 2
    words = ["memory", deep, "--budget", str(budget), "--explain", "--picture", "memory.html", "--save", "plan.json.z"]
    assert main(words) == 0
    told = capsys.readouterr()
    for said in (
        "slower, least possible",
        "recompute",
        "largest of",
        "what other budgets would cost",
        "weft.memory.limit(",
    ):
        assert said in told.out
    assert "tracing" in told.err  # progress is not a result
    page = Path("memory.html").read_text()
    assert "budget" in page
    assert not re.findall(r"(?:src|href)=.https?://", page)
    plan = MemoryPlan.load("plan.json.z")
    assert plan.budget == budget
    assert plan.reserved <= budget
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["repeated"] > 0
    assert found["plan"]["reserved"] <= budget
    overheads = [other["overhead"] for other in found["others"]]
    assert overheads == sorted(overheads)  # less memory never costs less time


def test_memory_refuses_what_cannot_be(deep, capsys):
    assert main(["memory", deep, "--budget", "50KiB"]) == 2
    told = capsys.readouterr()
    assert "does not fit in" in told.err
    assert "The least that will do is" in told.err
    assert told.out == ""


def test_memory_for_a_device_that_is_not_here(deep, capsys):
    assert main(["memory", deep, "--device", "A100-80GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "A100-80GB"
    assert found["seconds"] > 0


def test_train_by_a_saved_plan_then_export(here, capsys):
    import torch
    from safetensors.torch import load_file

    assert main(["plan", "mymodel:build", "--save", "plan.json"]) == 0
    words = "--plan plan.json --steps 4 --lr 0.01 --curve loss.svg --checkpoint saved --json"
    capsys.readouterr()
    assert main(["train", "mymodel:build", "--plan", "plan.json", "--processes", "3"]) == 2
    assert "is for 2 processes, not 3" in capsys.readouterr().err
    assert main(["train", "mymodel:build", *words.split()]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == len(told["losses"]) == 4
    assert told["last_loss"] < told["first_loss"]
    assert (here / "loss.svg").read_text().startswith("<svg")
    assert main(["export", "saved", "model.safetensors"]) == 0

    import mymodel

    model = mymodel.build()[0]
    before = model[0].weight.clone()
    model.load_state_dict(load_file("model.safetensors"))
    assert not torch.equal(before, model[0].weight)


@pytest.mark.slow
def test_train_in_a_shell_prints_plan_and_outcome(folder):
    done = weft("train", "mymodel:build", "--steps", "2", "--processes", "2", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout
    assert "step 2/2" in done.stderr
