"""Cost tables: signatures, FLOPs and bytes, medians, and measuring calls on made-up numbers."""

from __future__ import annotations

import pytest
import torch
from tests.memory.models import make, run
from torch.nn import functional as F

from weft.cluster.device import Device, Rate
from weft.memory.tracing.costs import CostTable, Like, Work, describe, gauge, measure_operators
from weft.memory.tracing.recorder import Recorder

aten = torch.ops.aten
TOY = Device("toy", "toy", 1, {"default": Rate({"float32": 1e9}, 1e8, 1e-6), "matmul": Rate({"float32": 4e9}, 1e8)})


def work(func, *args, **kwargs) -> Work:
    return describe(func, args, kwargs, func(*args, **kwargs))


def test_a_signature_says_what_costs():
    x, w = torch.randn(4, 6), torch.randn(6, 5)
    one = work(aten.mm.default, x, w)
    assert one.signature == "aten.mm.default(f32[4,6], f32[6,5])"
    assert one == work(aten.mm.default, x + 1, w)
    assert one.signature != work(aten.mm.default, x.half(), w.half()).signature
    assert one.signature != work(aten.mm.default, x, w.t().contiguous().t()).signature  # strides
    pool = lambda size: work(aten.max_pool2d_with_indices.default, torch.randn(1, 1, 8, 8), [size, size]).signature
    assert pool(2) != pool(4)
    scaled = lambda by: work(aten.mul.Scalar, x, by).signature
    assert scaled(0.3) == scaled(0.7)


@pytest.mark.parametrize(
    ("func", "args", "kind", "flops", "nbytes"),
    [
        (aten.mm.default, (torch.randn(4, 6), torch.randn(6, 5)), "matmul", 2 * 4 * 6 * 5, 4 * (24 + 30 + 20)),
        (aten.addmm.default, (torch.randn(5), torch.randn(4, 6), torch.randn(6, 5)), "matmul", 240, 4 * (5 + 24 + 30 + 20)),
        (aten.add.Tensor, (torch.randn(7), torch.randn(7)), "elementwise", 7, 4 * 21),
        (aten.add.Tensor, (torch.randn(7, 3), torch.randn(3).expand(7, 3)), "elementwise", 21, 4 * (21 + 3 + 21)),
        (aten.sum.dim_IntList, (torch.randn(7, 3), [0]), "norm", 21, 4 * (21 + 3)),
        (aten.zeros_like.default, (torch.randn(7, 3),), "elementwise", 21, 4 * 21),
        (aten.embedding.default, (torch.randn(9, 3), torch.zeros(5, dtype=torch.long)), "gather", 15, 4 * (27 + 15) + 40),
    ],
)  # fmt: skip
def test_flops_and_bytes(func, args, kind, flops, nbytes):
    found = work(func, *args)
    assert (found.kind, found.flops, found.nbytes, found.dtype) == (kind, flops, nbytes, "float32")


def test_attention_and_convolution_are_counted():
    q = torch.randn(2, 3, 8, 4)
    with Recorder() as recorder:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        F.conv2d(torch.randn(1, 2, 6, 6), torch.randn(5, 2, 3, 3))
    attention, convolution = [w for w in recorder.works if w.kind in ("attention", "conv")]
    assert attention.flops == 2 * 2 * (2 * 3 * 8 * 8 * 4) / 2
    assert convolution.flops == 2 * 5 * 2 * 9 * 16


def test_rates_are_the_rooflines():
    works = [Work("a", "matmul", 4e9, 1.0, "float32"), Work("b", "elementwise", 1.0, 1e8, "float32")]
    table = CostTable.from_rates(works, TOY)
    assert [table.of(w) for w in works] == pytest.approx([1.0, 1.000001])
    assert not table.measured and table.device == "toy"
    with pytest.raises(ValueError, match="no price of c for toy"):
        table.of(Work("c", "norm", 0, 0, "float32"))


def test_medians_and_filling_in():
    a, b = Work("a", "norm", 0, 0, "float32"), Work("b", "norm", 0, 0, "float32")
    table = CostTable.from_steps([((a, b, a), (1.0, 5.0, 3.0)), ((a, b, a), (2.0, 5.0, 100.0)), ((a,), (2.5,))], "cpu")
    assert dict(table.seconds) == {"a": 2.5, "b": 5.0} and table.measured
    both = CostTable("cpu", {"a": 1.0}, {"a": 7}).over(CostTable("x", {"a": 9.0, "b": 2.0}, {"b": 3}))
    assert (
        dict(both.seconds) == {"a": 1.0, "b": 2.0} and dict(both.workspace) == {"a": 7, "b": 3} and both.device == "cpu"
    )


def test_a_table_survives_a_file(tmp_path):
    table = CostTable("cpu", {"a": 1.5}, {"a": 7}, True)
    table.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == table
    (tmp_path / "old.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="measure again"):
        CostTable.load(tmp_path / "old.json")


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 4), torch.randn(3, 4).t(), torch.randn(5)[::2], torch.ones(2, 1).expand(2, 6), torch.tensor(3),
     torch.empty(0, 4), torch.ones(3, dtype=torch.bool), torch.randn(2, 2, dtype=torch.complex64)],
)  # fmt: skip
def test_made_up_tensors_have_the_geometry(tensor):
    made = Like(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype).make("cpu")
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


@pytest.mark.parametrize("name", ["gpt", "unet", "bilstm", "swin"])
def test_every_call_can_be_made_again_on_made_up_numbers(name):
    made = make(name)
    with Recorder(made.model, gauge=gauge()) as recorder:
        run(made)
    state = torch.get_rng_state()
    table = measure_operators(recorder.samples, repeats=1, effort=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(table.seconds) == {w.signature for w in recorder.works}
    if gauge() is not None:  # workspace depends on shapes alone
        alone = recorder.trace(CostTable("cpu", table.seconds, table.workspace))
        seen = recorder.trace()
        made.model.zero_grad()
        fake = Recorder(made.model)
        assert alone.peak == seen.peak
        with fake:
            run(made)
        from_table = fake.trace(table)
        for one, other in zip(from_table.ops, seen.ops, strict=True):
            assert abs(one.workspace - other.workspace) <= 32, one  # numbers that a mode wraps twice


def test_what_cannot_be_called_is_left_out():
    with Recorder() as recorder:
        torch.ones(3, 4).to_sparse() @ torch.ones(4, 2)
    table = measure_operators(recorder.samples)
    missing = [w.signature for w in recorder.works if w.signature not in table.seconds]
    assert missing and all("sparse" in s or "mm" in s for s in missing)
    full = table.over(CostTable.from_rates(recorder.works, TOY))
    assert all(full.of(w) >= 0 for w in recorder.works)
