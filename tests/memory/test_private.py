"""What weft.memory relies on and torch does not document: each promise of private.py, by itself."""

from __future__ import annotations

import gc

import torch

from weft.memory import private
from weft.memory.private import Tie, bytes_of, empty_out, fill, hollow, over, shaped, storage_of, swap, tie_of, tied


def test_this_torch_can_do_it():
    assert private.TIES and private.SWAPS and private.problem() == ""
    private.require()


def test_a_tie_lives_as_long_as_the_bytes():
    rung = []
    x = torch.ones(3, requires_grad=True)
    y = (x * 2).exp()  # autograd keeps the result
    tie = tied(Tie, storage_of(y), lambda t: rung.append(t is tie))
    view, total = y[1:], y.sum()
    assert tie_of(y) is tie_of(view) is tie
    del y
    gc.collect()
    del view
    assert tie() is not None and not rung
    total.backward()
    assert rung == [True] and tie() is None


def test_emptied_storages_keep_their_views_and_their_place_in_the_graph():
    x = torch.arange(6.0, requires_grad=True)
    y = x.exp()
    view, expected = y[2:4], y.detach().clone()
    there = storage_of(y)
    held = torch.UntypedStorage(there.nbytes())
    bytes_of(held).copy_(bytes_of(there))
    empty_out(there)
    assert there.nbytes() == 24 and y.view(2, 3).select(0, 1).as_strided((2,), (1,)).shape == (2,)
    fill(there, held)
    assert torch.equal(y, expected) and torch.equal(view, expected[2:4])
    y.sum().backward()
    assert torch.equal(x.grad, expected)


def test_swap_and_over():
    a, b = torch.zeros(4), torch.ones(4)
    swap(storage_of(a), storage_of(b))
    assert a.tolist() == [1.0] * 4 and b.tolist() == [0.0] * 4
    c = shaped(over(a.data_ptr(), a.device, 16), torch.float32, (2,), (2,), 1)
    c.fill_(7)
    assert a.tolist() == [1.0, 7.0, 1.0, 7.0]
    assert hollow(100, a.device).nbytes() == 100


def test_without_swapping_bytes_are_copied(monkeypatch):
    monkeypatch.setattr(private, "SWAPS", False)
    x = torch.arange(4.0)
    empty_out(storage_of(x))
    assert storage_of(x).nbytes() == 0
    fill(storage_of(x), storage_of(torch.ones(4)))
    assert x.tolist() == [1.0] * 4
    assert "cannot exchange" in private.problem()


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(private, "TIES", False)
    try:
        private.require()
    except RuntimeError as error:
        assert torch.__version__ in str(error) and "weft.memory.limit" in str(error)
    else:
        raise AssertionError("no error")


def test_below_nothing_casts_and_nobody_watches():
    x = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), private.below():
        y = x @ x
    assert y.dtype == torch.float32 and not y.requires_grad
