"""Random operators: equal where values are replicated or partial, independent where sharded; torch's own generator rests."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from tests.placement.row_examples import EXAMPLES, r

from weft.placement.layout import Mesh, Partial, Replicate, Shard
from weft.placement.rows import row_of
from weft.placement.signature import Local, Signature
from weft.placement.verify import call_of, run_pieces, signatures_of

R, P = Replicate(), Partial()


def unary(placement) -> Signature:
    return Signature((placement,), (placement,))


def test_replicated_dropout_agrees_and_sharded_does_not():
    x = torch.ones(40, 50, dtype=torch.float64)
    mesh = Mesh((2, 2))
    _, (out,) = run_pieces("aten.dropout.default", (x, 0.3, True), signatures=[unary(Shard(0)), unary(R)], mesh=mesh)
    assert torch.equal(out[0, 0], out[0, 1]) and torch.equal(out[1, 0], out[1, 1])
    assert not torch.equal(out[0, 0], out[1, 0])
    for piece in out.values():
        kept = piece != 0
        assert 0.6 < kept.double().mean() < 0.8
        assert torch.allclose(piece[kept], torch.tensor(1 / 0.7, dtype=torch.float64))


def test_dropout_of_partial_terms_is_dropout_of_their_sum():
    x = r(40, 50)
    (terms,), (out,) = run_pieces("aten.dropout.default", (x, 0.4, True), signatures=[unary(P)], mesh=Mesh((3,)))
    whole = sum(out.values())
    kept = whole != 0
    assert torch.allclose(whole[kept], x[kept] / 0.6)
    assert torch.equal(out[0,] != 0, out[1,] != 0)
    gradient = torch.autograd.grad(out[1,].sum(), terms[1,])[0]
    assert torch.allclose(gradient, kept.double() / 0.6)


@pytest.mark.parametrize("training", [True, False])
def test_attention_with_dropout_leaves_torch_generator_alone(training):
    q, k, v = r(4, 2, 6, 3), r(4, 2, 6, 3), r(4, 2, 6, 3)
    before = torch.get_rng_state()
    cut = Signature((Shard(0),) * 3, (Shard(0),))
    whole = Signature((R,) * 3, (R,))
    _, (out,) = run_pieces(
        "aten.scaled_dot_product_attention.default",
        (q, k, v, None, 0.5 * training, True),
        signatures=[cut, whole],
        mesh=Mesh((2, 2)),
    )
    assert torch.equal(out[0, 0], out[0, 1]), "replicated devices drop the same"
    assert torch.equal(torch.get_rng_state(), before)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(out[0, 0], plain[:2]) != training


def test_recurrent_dropout_agrees_where_replicated():
    weights = [t for n in (3, 4) for t in (r(16, n), r(16, 4), r(16), r(16))]
    states = [r(2, 5, 4), r(2, 5, 4)]
    signature = Signature((R,) * 11, (R,) * 3)
    args = (r(5, 7, 3), states, weights, True, 2, 0.5, True, False, True)
    before = torch.get_rng_state()
    _, outputs = run_pieces("aten.lstm.input", args, signatures=[signature], mesh=Mesh((2,)))
    assert all(torch.equal(out[0,], out[1,]) for out in outputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.random], ids=str)
def test_random_rows_run_on_pieces(example):
    """Shapes, agreement of copies, and torch's generator, for every random or uninitialised operator and signature."""
    call, _ = call_of(example.target, example.args, example.kwargs)
    row = row_of(call)
    mesh = Mesh((2,), weights=((3, 1),))
    before = torch.get_rng_state()
    whole = Signature((R,) * len(call.inputs), (R,) * len(call.outputs))
    for signature in (whole, *signatures_of(call, row, 2, (3, 1))):
        _, outputs = run_pieces(example.target, example.args, example.kwargs, signatures=[signature], mesh=mesh)
        for number, pieces in enumerate(outputs):
            shape, placement = call.outputs[number].shape, signature.outputs[number]
            if isinstance(placement, Shard):
                assert sum(piece.shape[placement.dim] for piece in pieces.values()) == shape[placement.dim]
            elif "empty" not in example.op:
                assert pieces[0,].shape == shape and torch.equal(pieces[0,] != 0, pieces[1,] != 0)
                assert placement == P or torch.equal(pieces[0,], pieces[1,])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_call_draws_anew():
    """A node's local program uses a new seed of its stream each time."""
    x, seeds = r(50), iter(range(10))

    here = Mock(spec=Local)
    here.random_stream.return_value = lambda: next(seeds)
    row = row_of(call_of("aten.dropout.default", (x, 0.5, True))[0])
    run = row.local(here)
    first, second = run(x, 0.5, True), run(x, 0.5, True)
    assert not torch.equal(first, second)
    seeds = iter(range(10))
    assert torch.equal(run(x, 0.5, True), first)
