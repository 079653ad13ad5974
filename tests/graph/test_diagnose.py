"""What cannot be captured is refused with the line of the user's code and what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from weft.errors import CaptureError
from weft.graph import capture


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("limits", torch.zeros(2))


class Branches(Base):
    def forward(self, x):
        y = self.linear(x)
        if y.sum() > 0:  # here
            y = y * 2
        return y.sum()


class Loops(Base):
    def forward(self, x):
        for _ in range(int(x.abs().max())):  # here
            x = self.linear(x)
        return x.sum()


class ReadsBuffer(Base):
    def forward(self, x):
        low = float(self.limits[0])  # here
        return self.linear(x).clamp(low, low + 1).sum()


class Selects(Base):
    def forward(self, x):
        y = self.linear(x)
        return y[y > 0].sum()  # here


class FindsIndices(Base):
    def forward(self, x):
        y = self.linear(x)
        rows = y.nonzero()[:, 0]  # here
        return y[rows].sum()


class LeavesTorch(Base):
    def forward(self, x):
        y = self.linear(x)
        return y.sum() * float(y.detach().numpy().sum())  # here


class WritesBehindTorch(Base):
    def forward(self, x):
        y = self.linear(x)
        y.data.mul_(2)  # here
        return y.sum()


class WritesParameter(Base):
    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.mul_(2)  # here
        return self.linear(x).sum()


class WritesWithoutGradient(Base):
    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            y.mul_(2)  # here
        return y.sum()


class Casts(Base):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x).sum()  # here


class Controls(Base):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,)).sum()  # here


class Maps(Base):
    def forward(self, x):
        return torch.vmap(self.linear)(x).sum()  # here


class Aligns(Base):
    def forward(self, x):
        scores = self.linear(x)[:, None].log_softmax(-1)
        return nn.functional.ctc_loss(scores, torch.ones(1, 2).long(), (4,), (2,))  # here


class Breaks(Base):
    def forward(self, x):
        return self.reshaped(self.linear(x)).sum()

    def reshaped(self, y):
        return self.linear(y.reshape(3, 4))  # here


class Misses(Base):
    def forward(self, x):
        return self.missing(x).sum()  # here


CASES = {
    Branches: "takes a number out of a tensor",
    Loops: "takes a number out of a tensor",
    ReadsBuffer: "takes a number out of a tensor",
    Selects: "size of a tensor depends",
    FindsIndices: "size of a tensor depends",
    LeavesTorch: "left torch",
    WritesBehindTorch: "left torch",
    WritesParameter: "writes the parameter 'linear.weight'",
    WritesWithoutGradient: "writes to a tensor that needs gradients",
    Casts: "turns autocast on",
    Controls: "control flow",
    Maps: "torch.func transforms",
    Aligns: "size of a tensor depends",
    Breaks: "Breaks raised RuntimeError",
    Misses: "has no attribute 'missing'",
}


@pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
def test_the_offending_line_is_named(model: Callable[[], nn.Module], capfd):
    with pytest.raises(CaptureError) as caught:
        capture(model(), torch.ones(4, 3))
    error = caught.value
    assert CASES[model] in str(error)
    assert "test_diagnose.py:" in error.where, error.where
    assert error.code.endswith("# here")
    assert error.code in str(error) and error.todo in str(error) and error.todo.endswith(".")
    assert "Traceback" not in "".join(capfd.readouterr())
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_distributions_do_not_look_at_values_that_are_not_there(monkeypatch):
    # torch.compile, if a test before has used it, leaves this off
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)

    class Policy(Base):
        def forward(self, x):
            return -torch.distributions.Normal(self.linear(x), 1.0).log_prob(x).mean()

    assert capture(Policy(), torch.ones(4, 3)).calls
    assert torch.distributions.Distribution._validate_args  # as before


def test_a_missing_argument_is_said_without_a_line():
    with pytest.raises(CaptureError, match=r"unexpected keyword argument 'y'"):
        capture(Branches(), {"y": torch.ones(4, 3)})


def test_errors_of_the_loss_are_not_the_models():
    def loss(output, target):
        raise KeyError("boom")

    with pytest.raises(CaptureError, match="the loss raised KeyError"):
        capture(torch.nn.Linear(4, 3), (torch.ones(2, 4), torch.ones(2)), loss)
