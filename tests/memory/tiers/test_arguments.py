"""Arguments that cannot be used: the error says which, what it was, and what to give instead; nothing is left open."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from tests.memory.tiers.training import ADAMW
from torch import nn

from weft.memory.tiers import DiskOptimizer, Tiered, Tiers, TiledLinear, tile

DISK = Tiers("disk", "host", "disk")
COMMON = {
    "a folder that is a file": ({"folder": "FILE"}, "it is a file; name a folder"),
    "a folder that is none": ({"folder": ""}, "folder must be the path of a folder"),
    "a number for a folder": ({"folder": 3}, "folder must be the path of a folder"),
    "resume in words": ({"resume": "no"}, "resume must be True or False, got 'no'"),
    "buffers in words": ({"buffers": "3"}, "buffers must be a whole number of at least 1, got '3'"),
    "no buffers": ({"buffers": 0}, "buffers must be a whole number of at least 1, got 0"),
    "half a buffer": ({"buffers": 2.5}, "buffers must be a whole number of at least 1, got 2.5"),
    "half a thread": ({"threads": 1.5}, "threads must be a whole number of at least 1, got 1.5"),
    "threads in words": ({"threads": "4"}, "threads must be a whole number of at least 1, got '4'"),
    "negative chunks": ({"chunk": -4}, "chunk: must be at least 1 bytes"),
    "chunks of nothing": ({"chunk": None}, "chunk: must be bytes"),
}
DISK_OPTIMIZER = {
    "an instance": ({"kind": torch.optim.AdamW([nn.Parameter(torch.zeros(1))])}, "got an object of type AdamW"),
    "a partial": (
        {"kind": partial(torch.optim.AdamW, lr=1.0)},
        "got an object of type partial; its options follow by name",
    ),
    "no optimizer in particular": ({"kind": torch.optim.Optimizer}, "must be an optimizer's class"),
    "a model": ({"params": nn.Linear(3, 4)}, r"pass model.parameters\(\)"),
}
TIERED = {
    "a class of models": ({"model": nn.Linear}, "model must be a torch.nn.Module, got the class Linear"),
    "a list": ({"model": [nn.Linear(3, 4)]}, "model must be a torch.nn.Module, got an object of type list"),
    "an instance": ({"optimizer": torch.optim.AdamW([nn.Parameter(torch.zeros(1))])}, "what makes one.*type AdamW"),
    "a name": ({"optimizer": "adamw"}, "what makes one.*type str"),
    "what makes none": ({"optimizer": lambda parameters: None}, "must make a torch optimizer .*NoneType"),
    "tiers in words": ({"tiers": "disk"}, "tiers must be Tiers, .*type str"),
    "a device of another kind": ({"device": "gpu"}, "device must be one of torch's, .*'gpu'"),
    "a group in words": ({"group": "world"}, "group must be a process group, .*'world'"),
    "groups in words": ({"groups": "all"}, "groups must be a list of dicts with 'params'"),
    "no groups": ({"groups": []}, "groups must be a list of dicts with 'params'"),
    "a group without parameters": ({"groups": [{"lr": 1.0}]}, "groups must be a list of dicts with 'params'"),
    "a group of a number": (
        {"groups": [{"params": 5}]},
        "'params' of a group must be parameters or their names, got int",
    ),
    "values without names": ({"values": [torch.zeros(3)]}, "values must be .*name, tensor. pairs"),
}


def refused(make, tmp_path, options, message):
    (tmp_path / "file").touch()
    if options.get("folder") == "FILE":
        options = {**options, "folder": tmp_path / "file"}
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=message):
        make({"folder": tmp_path / "run", **options})
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("case", {**COMMON, **DISK_OPTIMIZER})
def test_of_disk_optimizer(tmp_path, case):
    given = {"params": list(nn.Linear(3, 4).parameters()), "kind": torch.optim.AdamW}
    refused(lambda options: DiskOptimizer(**{**given, **options}), tmp_path, *{**COMMON, **DISK_OPTIMIZER}[case])


@pytest.mark.parametrize("case", {**COMMON, **TIERED})
def test_of_tiered(tmp_path, case):
    given = {"model": nn.Linear(3, 4), "optimizer": ADAMW, "tiers": DISK}
    refused(lambda options: Tiered(**{**given, **options}), tmp_path, *{**COMMON, **TIERED}[case])


@pytest.mark.parametrize("given", [None, nn.Conv2d(1, 1, 1), nn.Bilinear(2, 2, 2)], ids=lambda m: type(m).__name__)
def test_of_tile(given):
    with pytest.raises(ValueError, match=f"takes a torch.nn.Linear, got an object of type {type(given).__name__}"):
        tile(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [((4, 4, 1.5), "got 1.5"), ((4, 4, "2"), "got '2'"), ((4, 4, 5), "from 1 to 4"), ((0, 4), "at least 1, got 0"),
     ((4, 4.5), "at least 1, got 4.5")],
)  # fmt: skip
def test_of_a_tiled_linear(given, message):
    with pytest.raises(ValueError, match=message):
        TiledLinear(*given)


def test_groups_and_values_as_torch_takes_them(tmp_path):
    """A group of one parameter needs no list, as in torch's optimizers; values may be a state dict."""
    model = nn.Linear(3, 4)
    values = {"weight": torch.ones(4, 3), "bias": torch.zeros(4)}
    groups = [{"params": model.weight, "lr": 0.5}, {"params": "bias"}]
    with Tiered(model, ADAMW, DISK, tmp_path, groups=groups, values=values, keep_below=1) as tiered:
        assert torch.equal(tiered.read("weight"), values["weight"]) and torch.equal(tiered.read("bias"), values["bias"])
        assert [group["lr"] for group in tiered.optimizer.param_groups] == [0.5, 1e-2]
