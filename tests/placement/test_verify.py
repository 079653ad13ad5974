"""The verifier accepts what is true (test_rows) and catches what is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.placement.row_examples import ELEMENTWISE, EXAMPLES, r, u

from weft.placement.layout import Mesh, Partial, Replicate, Shard
from weft.placement.rows import row_of
from weft.placement.rows.softmax import plain_log_sum_exp
from weft.placement.signature import Link, Position, Row, Signature
from weft.placement.verify import VerificationError, call_of, deal_out, put_together, signatures_of, verify

R, P = Replicate(), Partial()
TWO, THREE = Mesh((2,)), Mesh((3,))


def sig(*placements, outputs=1) -> Signature:
    return Signature(tuple(placements[:-outputs]), tuple(placements[-outputs:]))


BARE = Row()  # the operator itself on the pieces
MUTANTS = {
    "softmax over its cut dim without communication": ("aten.softmax.int", (r(5, 7), 1), sig(Shard(1), Shard(1)), BARE),
    "relu is linear": ("aten.relu.default", (r(5, 7),), sig(P, P), BARE),
    "transpose keeps the dim": ("aten.transpose.int", (r(6, 6), 0, 1), sig(Shard(0), Shard(0)), BARE),
    "a product is linear in both factors at once": ("aten.mul.Tensor", (r(5), r(5)), sig(P, P, P), BARE),
    "a bias is added once per term": (
        "aten.linear.default",
        (r(5, 6), r(7, 6), r(7)),
        sig(Shard(1), Shard(1), R, P),
        BARE,
    ),
    "the contracted dim gives the whole": ("aten.linear.default", (r(5, 6), r(7, 6)), sig(Shard(1), Shard(1), R), BARE),
    "training batch-norm by pieces of the batch": (
        "aten.batch_norm.default",
        (r(6, 3, 4), r(3), r(3), None, None, True, 0.1, 1e-5, False),
        sig(Shard(0), R, R, Shard(0)),
        BARE,
    ),
    "a mean of pieces of unlike size": ("aten.mean.dim", (r(5, 7), [0]), sig(Shard(0), P), BARE),
    "a causal mask without the offset": (
        "aten.scaled_dot_product_attention.default",
        (r(2, 2, 6, 3), r(2, 2, 6, 3), r(2, 2, 6, 3), None, 0.0, True),
        sig(Shard(2), R, R, Shard(2)),
        BARE,
    ),
    "a vocabulary split without masking": (
        "aten.embedding.default",
        (r(8, 3), torch.tensor([[0, 3], [1, 2]])),
        sig(Shard(0), R, P),
        BARE,
    ),
    "cross-entropy averages over its own rows": (
        "aten.cross_entropy_loss.default",
        (r(5, 7), torch.tensor([1, 2, -100, 4, 0])),
        sig(Shard(0), Shard(0), P),
        BARE,
    ),
    "heads cut apart by a view": ("aten.view.default", (r(5, 12), [5, 3, 4]), sig(Shard(1), Shard(1)), None),
    "keys cut like queries": (
        "aten.scaled_dot_product_attention.default",
        (r(2, 2, 6, 3), r(2, 2, 6, 3), r(2, 2, 6, 3)),
        sig(Shard(2), Shard(2), Shard(2), Shard(2)),
        BARE,
    ),
    "a sum is a maximum": ("aten.sum.dim_IntList", (r(5, 7), [1]), sig(Shard(1), Partial("max")), BARE),
    "layer norm over its cut dim": ("aten.layer_norm.default", (r(5, 7), [7]), sig(Shard(1), Shard(1)), BARE),
    "pooling windows cut apart": (
        "aten.max_pool1d.default",
        (r(2, 3, 9), [3], [1], [1]),
        sig(Shard(2), Shard(2)),
        BARE,
    ),
    "zeros are replicated terms": ("aten.zeros.default", ([5, 3],), Signature((), (Shard(0),)), BARE),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    target, args, signature, row = MUTANTS[mutant]
    with pytest.raises(VerificationError, match="does not hold"):
        verify(target, args, signatures=[signature], mesh=TWO, row=row)


def test_a_forward_that_is_right_with_a_backward_that_is_not():
    """A replicated result whose cotangent is taken for whole, where it is one of terms: gradients are off."""

    def local(here):
        group = here.group(0)
        return lambda x, dims: plain_log_sum_exp(x, (1,), (group,)).squeeze(1) + (x - x.detach()).sum(1)

    row = Row((Link("k", (Position(0, 1),)),), local=local)
    with pytest.raises(VerificationError, match="gradient of operand 0"):
        verify("aten.logsumexp.default", (r(5, 7), [1]), signatures=[sig(Shard(1), R)], mesh=TWO, row=row)


_CLAIMS = [e for e in EXAMPLES if not e.random and any(isinstance(a, torch.Tensor) for a in e.args)]


@pytest.mark.parametrize("example", _CLAIMS, ids=str)
def test_a_cut_is_never_the_whole(example):
    """Each row with the output of a cut link, or the sum that one owes, declared whole."""
    call, _ = call_of(example.target, example.args, example.kwargs)
    row = row_of(call)
    for link in row.links[:2]:
        if not link.inputs or not (link.outputs or link.reduce) or "like" in example.op or "new_" in example.op:
            continue
        broken = replace(row, links=(replace(link, outputs=(), reduce=None),), linear=(), extra=(), added=())
        (signature,) = signatures_of(call, broken, 2, coarse=False)
        with pytest.raises(VerificationError):
            verify(example.target, example.args, example.kwargs, signatures=[signature], mesh=TWO, row=row)


# linear in their first operand, as far as random numbers tell; their rows do not use it
_LINEAR = ("ldexp", "xlogy", "nan_to_num", "nextafter", "gelu_backward", "tanh_backward", "threshold_backward")
_NONLINEAR = [e for e in ELEMENTWISE if e.args[0].is_floating_point() and e.op not in _LINEAR]


@pytest.mark.parametrize("example", _NONLINEAR, ids=str)
def test_nonlinear_operators_are_not_linear(example):
    call, _ = call_of(example.target, example.args, example.kwargs)
    if not call.outputs[0].dtype.is_floating_point:
        pytest.skip("no sum of truth values")
    signature = Signature((P, *(R for _ in call.inputs[1:])), (P,))
    with pytest.raises(VerificationError):
        verify(example.target, example.args, example.kwargs, signatures=[signature], mesh=THREE, row=row_of(call))


def test_constant_operands_are_refused():
    with pytest.raises(ValueError, match=r"operand 1 of .* is constant"):
        verify("aten.linear.default", (r(5, 6), torch.zeros(7, 6)), signatures=[sig(R, R, R)], mesh=TWO)


def test_error_names_operator_signature_and_sizes():
    with pytest.raises(VerificationError) as caught:
        verify("aten.relu.default", (r(5, 7),), signatures=[sig(P, P)], mesh=TWO, row=BARE)
    assert caught.value.target == "aten.relu.default" and caught.value.signature == "P -> P"
    assert "[5, 7]" in str(caught.value) and "(2,)" in str(caught.value)


def test_errors_of_local_programs_are_reported():
    def local(_):
        return lambda *args: 1 / 0

    with pytest.raises(VerificationError, match="ZeroDivisionError"):
        verify("aten.relu.default", (r(5, 7),), signatures=[sig(R, R)], mesh=TWO, row=Row(local=local))


PLACEMENTS = (
    (P, Shard(0)), (Shard(0), P), (Shard(0), Shard(0)), (R, P), (Partial("max"), R), (Partial("min"), Shard(1)),
    (Partial("avg"), R),
)  # fmt: skip


@pytest.mark.parametrize("placements", PLACEMENTS, ids=lambda placements: " ".join(map(str, placements)))
def test_dealing_out_and_putting_together_are_inverse(placements):
    x = u(7, 5)
    mesh = Mesh((2, 3), weights=((3, 1), None))
    pieces = deal_out(x, placements, mesh, torch.Generator().manual_seed(0))
    together, spread = put_together(pieces, x.shape, placements, mesh)
    assert spread == 0 and torch.allclose(together, x, atol=1e-12)
