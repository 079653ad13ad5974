"""Probing finds what rows declare, knows what it cannot try, and remembers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.placement.row_examples import ELEMENTWISE, EXAMPLES, Example, r
from torch import Tensor

from weft.graph.graph import Node, Ref, TensorSpec
from weft.placement import probe
from weft.placement.layout import Partial, Replicate, Shard
from weft.placement.probe import TooManyToProbe, discover, discover_call, probed_row
from weft.placement.rows import row_of
from weft.placement.signature import Call, Signature
from weft.placement.verify import call_of, signatures_of

R, P = Replicate(), Partial()


def texts(found: set[Signature]) -> set[str]:
    return set(map(str, found))


def _single_tensor(example: Example) -> bool:
    """One tensor in, nothing random, and a row that runs the operator itself on the pieces."""
    if example.random or example.op.endswith("_"):
        return False
    call, _ = call_of(example.target, example.args, example.kwargs)
    row = row_of(call)
    makes_constants = example.op.startswith(("fill", "zeros", "ones", "full"))  # which would agree with any placement
    return len(call.inputs) == 1 and row is not None and row.local is None and not makes_constants


SINGLE = [example for example in (*EXAMPLES, *ELEMENTWISE) if _single_tensor(example)]


def check_superset(example: Example) -> None:
    call, _ = call_of(example.target, example.args, example.kwargs)
    declared = texts(set(signatures_of(call, row_of(call), 2, coarse=False)))
    whole = {s for s in declared if ",u" not in s and ",x" not in s}  # probing cuts whole indices
    found = texts(discover(example.target, example.args, example.kwargs, parts=(2,), cache=False))
    assert whole <= found, f"declared {whole - found}, found only {found}"


def test_results_that_are_all_alike_prove_nothing():
    """This loss is 0 unless its target is 1 or -1, which random numbers are not: any placement would seem right."""
    call, _ = call_of("aten.cosine_embedding_loss.default", (r(5, 7), r(5, 7), torch.ones(5), 0.0, 1))
    with pytest.raises(ValueError, match="constant"):
        discover_call(call, cache=False)


def test_there_are_many_single_tensor_operators():
    assert len(SINGLE) > 100


@pytest.mark.parametrize("example", SINGLE[::4], ids=str)
def test_probing_finds_a_superset_of_the_row(example):
    check_superset(example)


@pytest.mark.slow
@pytest.mark.parametrize("example", SINGLE, ids=str)
def test_probing_finds_a_superset_of_every_row(example):
    check_superset(example)


def test_finds_the_rules_of_a_linear_layer():
    found = discover("aten.linear.default", (r(4, 6), r(8, 6), r(8)), cache=False)
    assert texts(found) == {
        "R R R -> R", "S(0) R R -> S(0)", "R S(0) S(0) -> S(1)", "S(1) S(1) P -> P", "P R P -> P", "R P P -> P",
    }  # fmt: skip


def test_even_sizes_do_not_make_strided_pooling_splittable():
    found = discover("aten.max_pool1d.default", (r(4, 6, 8), [2], [2]), cache=False)
    assert texts(found) == {"R -> R", "S(0) -> S(0)", "S(1) -> S(1)"}


def test_training_batch_norm_is_not_split_by_batch():
    args = (r(4, 6, 8), r(6), r(6), None, None, True, 0.1, 1e-5, False)
    assert "S(0) R R -> S(0)" not in texts(discover("aten.batch_norm.default", args, cache=False))


def test_maxima_are_found():
    assert "S(1) -> P(max)" in texts(discover("aten.amax.default", (r(4, 6), [1]), cache=False))


def test_operators_that_need_positive_numbers():
    assert texts(discover("aten.log.default", (r(4, 6),), cache=False)) == {"R -> R", "S(0) -> S(0)", "S(1) -> S(1)"}


def test_too_many_combinations_ask_for_a_row():
    with pytest.raises(
        TooManyToProbe, match=r"aten\.cat\.default has 16384 combinations .* at most 2000\. Declare its row"
    ):
        discover("aten.cat.default", ([r(3, 5)] * 7,), cache=False)


@pytest.fixture(scope="module")
def custom():
    """An operator from elsewhere: y = W tanh(x), as users register them."""
    library = torch.library.Library("weft_test", "FRAGMENT")
    library.define("mix(Tensor x, Tensor w) -> Tensor")
    library.impl("mix", lambda x, w: x.tanh() @ w, "CompositeImplicitAutograd")
    yield "weft_test.mix.default"
    library._destroy()


def unknown_call(target: str) -> Call:
    specs = (TensorSpec((4, 6), torch.float32, True), TensorSpec((6, 8), torch.float32, True))
    node = Node("mix", "call", target, (Ref("x"), Ref("w")), outputs=(TensorSpec((4, 8), torch.float32, True),))
    return Call(node, specs)


def test_a_row_for_an_unknown_operator(custom, monkeypatch, tmp_path):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    call = unknown_call(custom)
    assert row_of(call) is None
    row = probed_row(call)
    found = set(signatures_of(call, row, 2, coarse=False))
    assert texts(found) == {"S(0) R -> S(0)", "R S(1) -> S(1)", "S(1) S(0) -> P", "R P -> P"}
    assert all(link.contiguous for link in row.links)


def test_what_was_found_is_read_from_disk(custom, monkeypatch, tmp_path):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    call = unknown_call(custom)
    probe.discover_call(call)
    assert not list(tmp_path.rglob("*.json"))  # a user's operator may change under its name
    call = Call(replace(call.node, target="aten.mm.default"), call.inputs)
    first = probe.discover_call(call)
    assert len(list(tmp_path.rglob("*.json"))) == 1

    def fail(*_: object) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr(probe, "_sample", fail)
    assert probe.discover_call(call) == first
    other = Call(call.node, (TensorSpec((6, 6), torch.float32), TensorSpec((6, 8), torch.float32)))
    with pytest.raises(AssertionError, match="probed again"):
        probe.discover_call(other)  # another pattern of equal sizes
    (file,) = tmp_path.rglob("*.json")
    file.write_text("[[")
    with pytest.raises(AssertionError, match="probed again"):
        probe.discover_call(call)  # a broken file is as good as none


def test_an_operator_that_fails_on_any_values():
    def broken(x: Tensor) -> Tensor:
        return torch.full_like(x, float("nan"))

    library = torch.library.Library("weft_test_nan", "FRAGMENT")
    library.define("broken(Tensor x) -> Tensor")
    library.impl("broken", broken, "CompositeImplicitAutograd")
    with pytest.raises(ValueError, match=r"weft_test_nan\.broken\.default"):
        discover("weft_test_nan.broken.default", (r(3, 5),), cache=False)
    library._destroy()


def test_signatures_survive_the_cache_format():
    signature = Signature((Shard(1, None, 2, 3), P), (Partial("max"), R))
    probe._write(file := probe.Path(probe.tempfile.mkdtemp()) / "x.json", {signature})
    assert probe._read(file) == {signature}
