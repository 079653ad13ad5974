from __future__ import annotations

import argparse
import itertools

import pytest
import torch

from weft.cli import inputs, plan


def test_meshes():
    assert inputs.parse_mesh("8") == (8,)
    assert inputs.parse_mesh(" 2X4 ") == (2, 4)
    for text in ("", "0x2", "2x", "two", "2,4"):
        with pytest.raises(ValueError, match="mesh shape"):
            inputs.parse_mesh(text)


def test_optimizers():
    assert inputs.optimizer_class("AdamW") is torch.optim.AdamW
    assert inputs.optimizer_class("sgd") is torch.optim.SGD
    with pytest.raises(ValueError, match=r"did you mean .*adamw"):
        inputs.optimizer_class("adamx")


def arguments(**given):
    return argparse.Namespace(**{"target": None, "task": None, "data": None, "batch_size": None, "seed": 0, **given})


MODULE = """
import torch
model = torch.nn.Linear(4, 2)
def fixed(): return model, torch.ones(3, 4)
def with_loss(): return model, (torch.ones(3, 4), torch.zeros(3, 2)), torch.nn.functional.mse_loss
def loader(): return model, torch.utils.data.DataLoader(torch.arange(24.).view(6, 4), batch_size=2)
def once(): return model, iter([torch.ones(3, 4), torch.zeros(3, 4)])
def nothing(): return None
def not_a_model(): return 3, torch.ones(3, 4)
def bad_loss(): return model, torch.ones(3, 4), 7
def bad_batch(): return model, 7
def empty(): return model, iter(())
def fails(): raise KeyError("oops")
number = 5
"""


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "weft_cli_made.py"
    path.write_text(MODULE)
    return lambda name: inputs.load_job(arguments(target=f"{path}:{name}"))


def test_a_fixed_batch_is_used_again_and_again(made):
    job = made("fixed")
    assert job.loss is None
    assert all(batch is job.batch for batch in itertools.islice(job.batches(), 3))


def test_a_loss_comes_along(made):
    assert made("with_loss").loss is torch.nn.functional.mse_loss


def test_a_loader_starts_again(made):
    job = made("loader")
    assert job.batch.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(list(itertools.islice(job.batches(), 7))) == 7


def test_an_iterator_keeps_its_first_batch(made):
    job = made("once")
    assert [float(batch.sum()) for batch in job.batches()] == [12.0, 0.0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "must return"), ("not_a_model", "must return"), ("bad_loss", "cannot be called"),
        ("bad_batch", "batch of type int"), ("empty", "end at once"),
        ("fails", "raised KeyError: 'oops'"), ("number", "not a function"), ("fixd", "did you mean fixed"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_function_is_said(made, name, says):
    with pytest.raises(ValueError, match=says):
        made(name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "say what to train"),
        ({"target": "a:b", "task": "language-model"}, "one of the two"),
        ({"target": "nocolon"}, "MODULE:FUNCTION"),
        ({"target": "not_there_at_all:f"}, "no module"),
        ({"target": "not_there.py:f"}, "no file"),
        ({"target": "a:b", "data": "x"}, "--data goes with --task"),
        ({"task": "langage-model"}, "did you mean language-model"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(given, says):
    with pytest.raises(ValueError, match=says):
        inputs.load_job(arguments(**given))


def test_a_module_whose_own_import_fails_says_so(tmp_path):
    (tmp_path / "weft_cli_broken.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        inputs.load_job(arguments(target=f"{tmp_path / 'weft_cli_broken.py'}:f"))


def test_recomputation_can_be_ruled_out(monkeypatch):
    asked = []
    monkeypatch.setattr("weft.planner.plan", lambda *args, **options: asked.append(options.get("recompute", True)))
    parser = argparse.ArgumentParser()
    plan.add_options(parser)
    for words in ([], ["--no-recompute"]):
        given = parser.parse_args(words)
        given.cluster, given.processes = None, 2
        plan.find(given, inputs.Job(torch.nn.Linear(4, 2), torch.ones(3, 4), lambda: iter(())))
    assert asked == [True, False]


def test_cluster_or_processes():
    for wrong in ({"cluster": "x.yaml", "processes": 2}, {"cluster": None, "processes": 0}):
        with pytest.raises(ValueError, match=r"not both|at least 1"):
            inputs.load_cluster(argparse.Namespace(**wrong))
    assert len(inputs.load_cluster(argparse.Namespace(cluster=None, processes=3))) == 3
