"""Example calls of every operator that has a row: odd and uneven sizes, options, absent operands, broadcast dims.

`EXAMPLES` lists (target, args, kwargs) made from a fixed seed. Operators that work element by element get their examples from
their schema (`_elementwise`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.graph.rewrite import operator
from weft.placement.rows.pointwise import NONLINEAR


@dataclass(frozen=True)
class Example:
    """One call. `random`: results cannot be compared with the operator run whole."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    random: bool = False

    @property
    def op(self) -> str:
        return self.target.split(".")[1]

    def __str__(self) -> str:
        shapes = [
            "x".join(map(str, a.shape)) if isinstance(a, Tensor) else "list" if isinstance(a, list) else str(a)
            for a in self.args
        ]
        return f"{self.target}-{'-'.join(shapes)}"


_generator = torch.Generator().manual_seed(7)


def r(*shape: int) -> Tensor:
    """Random normal numbers."""
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def u(*shape: int) -> Tensor:
    """Random numbers in (0.1, 0.9)."""
    return torch.rand(shape, generator=_generator, dtype=torch.float64) * 0.8 + 0.1


def i(high: int, *shape: int) -> Tensor:
    """Random indices below `high`."""
    return torch.randint(high, shape, generator=_generator)


def b(*shape: int) -> Tensor:
    """Random truth values."""
    return torch.rand(shape, generator=_generator) < 0.6


def permutation(n: int) -> Tensor:
    return torch.randperm(n, generator=_generator)


def targets(classes: int, ignored: int, *shape: int) -> Tensor:
    """Random classes, some of them to be ignored."""
    chosen = i(classes, *shape)
    return torch.where(torch.rand(shape, generator=_generator) < 0.2, torch.full_like(chosen, ignored), chosen)


def _products() -> Iterator[Example]:
    call = _calls("aten")
    yield call("linear.default", r(5, 3, 6), r(9, 6), r(9))
    yield call("linear.default", r(5, 6), r(7, 6))
    yield call("linear.default", r(6), r(7, 6))
    yield call("addmm.default", r(9), r(5, 6), r(6, 9))
    yield call("addmm.default", r(5, 9), r(5, 6), r(6, 9), beta=0.5, alpha=2.0)
    yield call("addmm.default", r(5, 1), r(5, 6), r(6, 9))
    yield call("baddbmm.default", r(3, 1, 5), r(3, 4, 6), r(3, 6, 5))
    yield call("addbmm.default", r(4, 5), r(3, 4, 6), r(3, 6, 5))
    yield call("addmv.default", r(5), r(5, 7), r(7))
    yield call("matmul.default", r(3, 5, 6), r(6, 7))
    yield call("matmul.default", r(5, 1, 3, 6), r(4, 6, 7))
    yield call("matmul.default", r(6), r(3, 6, 7))
    yield call("matmul.default", r(3, 5, 6), r(6))
    yield call("matmul.default", r(7), r(7))
    yield call("mm.default", r(5, 6), r(6, 7))
    yield call("bmm.default", r(3, 5, 6), r(3, 6, 7))
    yield call("mv.default", r(5, 7), r(7))
    yield call("dot.default", r(7), r(7))
    yield call("vdot.default", r(7), r(7))
    yield call("outer.default", r(5), r(7))
    yield call("ger.default", r(5), r(7))
    yield call("einsum.default", "bhid,bhjd->bhij", [r(3, 4, 5, 3), r(3, 4, 7, 3)])
    yield call("einsum.default", "...k,nk", [r(3, 5, 6), r(7, 6)])
    yield call("einsum.default", "bi,ij,bj->b", [r(5, 3), r(3, 7), r(5, 7)])
    yield call("einsum.default", "ii->i", [r(5, 5)])
    yield call("tensordot.default", r(5, 3, 4), r(4, 7, 3), [1, -1], [2, 0])
    yield call("cdist.default", r(3, 5, 4), r(3, 7, 4), 2.0)
    yield call("bilinear.default", r(5, 3), r(5, 7), r(4, 3, 7), r(4))


def _views() -> Iterator[Example]:
    call = _calls("aten")
    yield call("view.default", r(5, 3, 12), [5, 3, 4, 3])
    yield call("view.default", r(5, 3, 4), [15, 4])
    yield call("view.default", r(15, 4), [5, 3, 4])
    yield call("reshape.default", r(6, 4), [8, 3])
    yield call("reshape.default", r(6, 10), [15, 4])
    yield call("reshape.default", r(7), [7, 1, 1])
    yield call("_unsafe_view.default", r(5, 12), [5, 2, 6])
    yield call("flatten.using_ints", r(5, 3, 4), 1, 2)
    yield call("unflatten.int", r(5, 12), 1, [3, 4])
    yield call("squeeze.dim", r(5, 1, 3), 1)
    yield call("unsqueeze.default", r(5, 3), -1)
    yield call("view_as.default", r(6, 4), r(3, 8))
    yield call("reshape_as.default", r(6, 4), r(24))
    yield call("ravel.default", r(5, 3))
    yield call("expand.default", r(5, 1, 3), [4, 5, 7, -1])
    yield call("broadcast_to.default", r(3), [5, 3])
    yield call("permute.default", r(5, 3, 4), [2, 0, -2])
    yield call("transpose.int", r(5, 3, 4), 1, -1)
    yield call("swapaxes.default", r(5, 3, 4), 0, -1)
    yield call("swapdims.default", r(5, 3, 4), 0, -1)
    yield call("t.default", r(5, 3))
    yield call("adjoint.default", r(5, 3, 4))
    yield call("mT.default", r(5, 3, 4))
    yield call("numpy_T.default", r(5, 3))
    yield call("movedim.int", r(5, 3, 4), 0, -1)
    yield call("movedim.intlist", r(5, 3, 4), [2, 0], [0, 1])
    yield call("moveaxis.int", r(5, 3, 4), -1, 0)
    yield call("split.Tensor", r(5, 12), 4, 1)
    yield call("split.Tensor", r(5, 11), 4, -1)
    yield call("split_with_sizes.default", r(5, 12), [6, 6], 1)
    yield call("unsafe_split.Tensor", r(5, 12), 6, 1)
    yield call("chunk.default", r(5, 12), 2, -1)
    yield call("unsafe_chunk.default", r(5, 12), 3, 1)
    yield call("tensor_split.sections", r(5, 12), 3, 1)
    yield call("cat.default", [r(5, 3), r(5, 3), r(5, 3)], -1)
    yield call("cat.default", [r(5, 3), r(5, 4)], 1)
    yield call("concat.default", [r(3, 5), r(3, 5)])
    yield call("concatenate.default", [r(3, 5), r(3, 5)], 1)
    yield call("stack.default", [r(5, 3), r(5, 3)], 1)
    yield call("unbind.int", r(5, 3, 4), 1)
    yield call("select.int", r(5, 7, 3), 1, 0)
    yield call("select.int", r(5, 7, 3), 1, -1)
    yield call("slice.Tensor", r(5, 12), 1, 6, 9223372036854775807)
    yield call("slice.Tensor", r(5, 12), 1, 0, 4)
    yield call("slice.Tensor", r(5, 12), 1, -3, 9223372036854775807)
    yield call("slice.Tensor", r(5, 12), -1, 1, 12, 3)
    yield call("slice.Tensor", r(5, 12), 0, 0, 9223372036854775807)
    yield call("narrow.default", r(5, 12), 1, 2, 5)
    yield call("diagonal.default", r(5, 3, 3), 0, 1, 2)
    yield call("pad.default", r(5, 3, 4), [1, 2])
    yield call("pad.default", r(5, 3, 4), [1, 2], "constant", 1.5)
    yield call("pad.default", r(5, 3, 4), [1, 2], "reflect")
    yield call("constant_pad_nd.default", r(5, 3, 4), [0, 0, 1, 0])
    yield call("reflection_pad1d.default", r(5, 3, 4), [1, 1])
    yield call("reflection_pad2d.default", r(5, 3, 4, 4), [1, 1, 0, 1])
    yield call("replication_pad1d.default", r(5, 3, 4), [1, 1])
    yield call("replication_pad2d.default", r(5, 3, 4, 4), [1, 1, 0, 1])
    yield call("flip.default", r(5, 3, 4), [1])
    yield call("roll.default", r(5, 3, 4), [1], [-1])
    yield call("roll.default", r(5, 3), [2])
    yield call("tril.default", r(3, 7, 5), -1)
    yield call("triu.default", r(7, 5), 1)
    yield call("repeat.default", r(5, 3), [2, 1, 3])
    yield call("tile.default", r(5, 3), [3])
    yield call("repeat_interleave.self_int", r(5, 3), 2, 1)
    yield call("repeat_interleave.self_int", r(5, 3), 2)
    yield call("unfold.default", r(5, 9), 1, 3, 2)
    yield call("expand_as.default", r(5, 1), r(3, 5, 7))
    yield call("view_as_complex.default", r(5, 3, 2))
    yield call("view_as_real.default", torch.complex(r(5, 3), r(5, 3)))
    yield call("meshgrid.indexing", [r(5), r(3), r(2)], indexing="xy")
    yield call("meshgrid.indexing", [r(5), r(3)], indexing="ij")
    yield call("hstack.default", [r(5, 3), r(5, 3)])
    yield call("vstack.default", [r(5, 3), r(4, 3)])
    yield call("slice_scatter.default", r(5, 7), r(5, 3), 1, 2, 5)
    yield call("select_scatter.default", r(5, 7), r(5), 1, 2)


def _reductions() -> Iterator[Example]:
    call = _calls("aten")
    yield call("sum.default", r(5, 3))
    yield call("sum.dim_IntList", r(5, 3, 4), [-1, 0], True)
    yield call("sum.dim_IntList", i(9, 5, 3), [1])
    yield call("nansum.default", r(5, 3), [1])
    yield call("mean.default", r(5, 3))
    yield call("mean.dim", r(5, 7, 4), [-2], True)
    yield call("mean.dim", r(5, 7, 4), [1, 2])
    yield call("logsumexp.default", r(5, 7), [-1])
    yield call("logsumexp.default", r(5, 7, 3), [0, 2], True)
    yield call("amax.default", r(5, 7), [1])
    yield call("amin.default", r(5, 7), [-1], True)
    yield call("max.default", r(5, 7))
    yield call("max.dim", r(5, 7), 1)
    yield call("max.other", r(5, 7), r(7))
    yield call("min.default", r(5, 7))
    yield call("min.dim", r(5, 7), -1, True)
    yield call("min.other", r(5, 7), r(5, 1))
    yield call("prod.dim_int", r(5, 7), 1)
    yield call("prod.default", r(5))
    yield call("any.dim", b(5, 7), 1)
    yield call("all.dim", b(5, 7), 1, True)
    yield call("argmax.default", r(5, 7), 1)
    yield call("argmin.default", r(5, 7), -1, True)
    yield call("count_nonzero.dim_IntList", b(5, 7), [1])
    yield call("var.correction", r(5, 7), [1], correction=1, keepdim=True)
    yield call("var.default", r(5, 7))
    yield call("std.dim", r(5, 7), [1], True)
    yield call("var_mean.correction", r(5, 7), [1], correction=0, keepdim=False)
    yield call("std_mean.dim", r(5, 7), [1])
    yield call("norm.ScalarOpt_dim", r(5, 7), 2, [1])
    yield call("norm.Scalar", r(5, 7))
    yield call("linalg_vector_norm.default", r(5, 7), 3, [-1], True)
    yield call("linalg_vector_norm.default", r(5, 7), float("inf"), [1])
    yield call("cumsum.default", r(5, 7), 1)
    yield call("cumprod.default", r(5, 7), 1)
    yield call("cummax.default", r(5, 7), 1)
    yield call("cummin.default", r(5, 7), 1)
    yield call("logcumsumexp.default", r(5, 7), 1)
    yield call("sort.default", r(5, 7))
    yield call("sort.stable", r(5, 7), stable=True, dim=0)
    yield call("argsort.default", r(5, 7), 0)
    yield call("topk.default", r(5, 7), 3)
    yield call("kthvalue.default", r(5, 7), 2, 1)
    yield call("median.dim", r(5, 7), 1)
    yield call("mode.default", i(3, 5, 7), 1)
    yield call("trace.default", r(5, 5))
    yield call("cosine_similarity.default", r(5, 7, 3), r(5, 7, 3), 1)
    yield call("pairwise_distance.default", r(5, 7), r(5, 7))
    yield call("softmax.int", r(5, 7, 3), 1)
    yield call("_softmax.default", r(5, 7), -1, False)
    yield call("log_softmax.int", r(5, 7, 3), -1)
    yield call("_log_softmax.default", r(5, 7), 0, False)
    yield call("special_softmax.default", r(5, 7), 1)
    yield call("special_log_softmax.default", r(5, 7), 1)


def _norms() -> Iterator[Example]:
    call = _calls("aten")
    yield call("layer_norm.default", r(5, 3, 7), [7], r(7), r(7), 1e-5)
    yield call("layer_norm.default", r(5, 3, 7), [3, 7])
    yield call("rms_norm.default", r(5, 3, 7), [7], r(7), 1e-5)
    yield call("native_layer_norm.default", r(5, 3, 7), [7], r(7), r(7), 1e-5)
    yield call("group_norm.default", r(5, 9, 4), 3, r(9), r(9))
    yield call("group_norm.default", r(5, 9, 4), 3)
    yield call("batch_norm.default", r(5, 3, 4), r(3), r(3), r(3), u(3), True, 0.1, 1e-5, False)
    yield call("batch_norm.default", r(5, 3, 4), None, None, None, None, True, 0.1, 1e-5, False)
    yield call("batch_norm.default", r(5, 3), r(3), r(3), r(3), u(3), False, 0.1, 1e-5, False)
    yield call("instance_norm.default", r(5, 3, 4), r(3), r(3), None, None, True, 0.1, 1e-5, False)
    yield call("_weight_norm.default", r(5, 3, 4), r(5, 1, 1), 0)
    yield call("_weight_norm.default", r(5, 3, 7), r(1, 1, 7), 2)
    yield call("_weight_norm.default", r(5, 3), r(1, 1), -1)


def _losses() -> Iterator[Example]:
    call = _calls("aten")
    for reduction in (0, 1, 2):
        yield call("mse_loss.default", r(5, 7), r(5, 7), reduction)
        yield call("cross_entropy_loss.default", r(7, 11), targets(11, -100, 7), None, reduction)
        yield call("cross_entropy_loss.default", r(7, 11), targets(11, 3, 7), u(11), reduction, 3, 0.2)
        yield call("cross_entropy_loss.default", r(5, 7, 3), u(5, 7, 3), u(7), reduction, -100, 0.1)
        yield call("nll_loss_nd.default", r(5, 7, 3), targets(7, -100, 5, 3), u(7), reduction)
    yield call("cross_entropy_loss.default", r(5, 7, 3), targets(7, -100, 5, 3), None, 1, -100, 0.1)
    yield call("cross_entropy_loss.default", r(7), i(7))
    yield call("nll_loss.default", r(7, 11), targets(11, -100, 7))
    yield call("nll_loss2d.default", r(5, 7, 3, 2), targets(7, -100, 5, 3, 2))
    yield call("l1_loss.default", r(5, 7), r(5, 7))
    yield call("smooth_l1_loss.default", r(5, 7), r(5, 7), 1, 0.5)
    yield call("huber_loss.default", r(5, 7), r(5, 7), 1, 0.5)
    yield call("soft_margin_loss.default", r(5, 7), r(5, 7))
    yield call("kl_div.default", r(5, 7), u(5, 7), 1, log_target=False)
    yield call("binary_cross_entropy.default", u(5, 7), u(5, 7), u(7))
    yield call("binary_cross_entropy_with_logits.default", r(5, 7), u(5, 7), None, u(7))
    yield call("poisson_nll_loss.default", r(5, 7), u(5, 7), True, False, 1e-8, 1)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    for reduction in (0, 1, 2):
        yield call("margin_ranking_loss.default", r(5), r(5), signs, 2.0, reduction)
        yield call("cosine_embedding_loss.default", r(5, 7), r(5, 7), signs, -0.9, reduction)
        yield call("triplet_margin_loss.default", r(5, 3, 7), r(5, 3, 7), r(5, 3, 7), 4.0, 2.0, 1e-6, True, reduction)
        yield call("multi_margin_loss.default", r(5, 7), i(7, 5), 1, 1.0, u(7), reduction)
    yield call("hinge_embedding_loss.default", r(5, 7), 2.0 * b(5, 7).double() - 1, 2.0)
    yield call("multilabel_margin_loss.default", r(5, 7), i(7, 5, 7))


def _attention() -> Iterator[Example]:
    call, name = _calls("aten"), "scaled_dot_product_attention.default"
    yield call(name, r(5, 4, 7, 3), r(5, 4, 7, 3), r(5, 4, 7, 3), None, 0.0, True)
    yield call(name, r(5, 4, 7, 3), r(5, 4, 9, 3), r(5, 4, 9, 2), b(5, 1, 7, 9) | torch.eye(7, 9, dtype=torch.bool))
    yield call(name, r(5, 4, 7, 3), r(5, 4, 9, 3), r(5, 4, 9, 2), r(4, 7, 9), scale=0.3)
    yield call(name, r(5, 4, 7, 3), r(5, 4, 9, 3), r(5, 4, 9, 2), r(7, 9))
    yield call(name, r(3, 6, 5, 3), r(3, 3, 5, 3), r(3, 3, 5, 3), None, 0.0, True, enable_gqa=True)
    yield call(name, r(3, 6, 5, 3), r(3, 3, 5, 3), r(3, 3, 5, 3), r(3, 6, 5, 5), 0.0, False, enable_gqa=True)
    yield call(name, r(5, 7, 3), r(5, 9, 3), r(5, 9, 3), None, 0.0, True)


def _convolutions() -> Iterator[Example]:
    call = _calls("aten")
    yield call("conv1d.default", r(5, 3, 9), r(7, 3, 3), r(7), [1], [1])
    yield call("conv2d.default", r(5, 4, 7, 7), r(6, 4, 3, 3), None, [2, 2], [1, 1])
    yield call("conv2d.default", r(5, 6, 7, 7), r(9, 2, 3, 3), r(9), [1, 1], [1, 1], [1, 1], 3)
    yield call("conv2d.default", r(3, 3, 10, 6), r(5, 3, 2, 2), r(5), [2, 2])
    yield call("conv2d.padding", r(3, 3, 7, 7), r(5, 3, 3, 3), r(5), [1, 1], "same")
    yield call("conv2d.default", r(3, 7, 7), r(5, 3, 3, 3), r(5))
    yield call("conv3d.default", r(3, 3, 3, 4, 4), r(5, 3, 2, 2, 2), r(5))
    yield call("conv_transpose1d.default", r(5, 3, 5), r(3, 7, 3), r(7), [2])
    yield call("conv_transpose2d.input", r(5, 6, 5, 5), r(6, 3, 2, 2), r(9), [2, 2], [0, 0], [0, 0], 3)
    yield call("conv_transpose3d.input", r(3, 3, 3, 3, 3), r(3, 5, 2, 2, 2), r(5))
    yield call("convolution.default", r(5, 6, 7), r(9, 2, 3), r(9), [1], [1], [1], False, [0], 3)
    yield call("convolution.default", r(5, 6, 7), r(6, 4, 3), r(4), [1], [1], [1], True, [0], 1)
    for n in (1, 2, 3):
        pixels = (7, 6, 5)[:n]
        yield call(f"max_pool{n}d.default", r(5, 3, *pixels), [2] * n)
        yield call(f"avg_pool{n}d.default", r(5, 3, *pixels), [2] * n)
        yield call(f"adaptive_avg_pool{n}d.default", r(5, 3, *pixels), [2] * n)
        yield call(f"adaptive_max_pool{n}d.default", r(5, 3, *pixels), [2] * n)
    yield call("max_pool1d_with_indices.default", r(5, 3, 7), [2])
    yield call("max_pool2d_with_indices.default", r(5, 3, 7, 6), [3, 3], [2, 2], [1, 1])
    yield call("max_pool3d_with_indices.default", r(5, 3, 4, 4, 4), [2, 2, 2])
    yield call("_adaptive_avg_pool2d.default", r(5, 3, 7, 6), [1, 1])
    yield call("_adaptive_avg_pool3d.default", r(5, 3, 4, 4, 4), [1, 1, 1])
    yield call("upsample_nearest1d.vec", r(5, 3, 4), None, [2.0])
    yield call("upsample_nearest2d.vec", r(5, 3, 4, 4), None, [2.0, 2.0])
    yield call("upsample_nearest3d.vec", r(5, 3, 2, 2, 2), [4, 4, 4], None)
    yield call("_upsample_nearest_exact2d.default", r(5, 3, 4, 4), [6, 6])
    yield call("upsample_linear1d.default", r(5, 3, 4), [7], False)
    yield call("upsample_bilinear2d.vec", r(5, 3, 4, 4), [7, 7], True, None)
    yield call("_upsample_bilinear2d_aa.default", r(5, 3, 4, 4), [7, 7], False)
    yield call("upsample_bicubic2d.default", r(5, 3, 4, 4), [7, 7], False)
    yield call("upsample_trilinear3d.default", r(5, 3, 2, 2, 2), [3, 3, 3], False)
    yield call("pixel_shuffle.default", r(5, 4, 3, 3), 2)
    yield call("pixel_unshuffle.default", r(5, 3, 4, 4), 2)
    yield call("channel_shuffle.default", r(5, 4, 3, 3), 2)


def _indexing() -> Iterator[Example]:
    call = _calls("aten")
    yield call("embedding.default", r(11, 7), i(11, 5, 3))
    yield call("embedding.default", r(11, 7), i(11, 5, 3), 3)
    for mode in (0, 1, 2):
        bags = (i(11, 9), torch.tensor([0, 2, 2, 6]))
        yield call(
            "embedding_bag.padding_idx", r(11, 7), *bags, False, mode, False, u(9) if not mode else None, False, 3
        )
    yield call("embedding.default", r(11, 7), i(11, 5, 3), -1, True)
    yield call("index_select.default", r(5, 7, 3), 1, i(7, 9))
    yield call("gather.default", r(5, 7), 1, i(7, 5, 3))
    yield call("gather.default", r(5, 7), -1, i(7, 3, 4))
    yield call("take_along_dim.default", r(5, 7), i(7, 5, 3), 1)
    yield call("scatter.src", r(5, 7), 1, torch.stack([permutation(7)[:3] for _ in range(5)]), r(5, 3))
    yield call("scatter.value", r(5, 7), 1, i(7, 5, 3), 0.0)
    yield call("scatter.value", r(5, 7), 1, i(7, 5, 3), 1.5)
    yield call("scatter_add.default", r(5, 7), 1, i(7, 5, 9), r(5, 9))
    yield call("scatter_reduce.two", r(5, 7), 1, i(7, 5, 3), r(5, 3), "amax")
    yield call("index_add.default", r(5, 7), 1, i(7, 9), r(5, 9))
    yield call("index_copy.default", r(5, 7), 1, permutation(7)[:3], r(5, 3))
    yield call("index_fill.int_Scalar", r(5, 7), 1, i(7, 3), 0.0)
    yield call("take.default", r(5, 7), i(35, 4, 3))
    yield call("index.Tensor", r(7, 5), [i(7, 9)])
    yield call("index.Tensor", r(5, 7, 3), [None, i(7, 4, 3) - 7])
    yield call("index.Tensor", r(5, 7, 3), [i(5, 4, 1), None, i(3, 3)])
    yield call("index.Tensor", r(5, 7, 3), [i(5, 4, 1), i(7, 3)])
    yield call("index.Tensor", r(5, 7), [b(5)])
    yield call("_unsafe_index.Tensor", r(7, 5), [i(7, 9)])
    yield call("index_put.default", r(7, 5), [permutation(7)[:3]], r(3, 5))
    yield call("index_put.default", r(7, 5), [i(7, 9)], r(9, 5), True)
    yield call("index_put.default", r(7, 5), [i(7, 9)], r(5), True)
    yield call("index_put.default", r(5, 7, 3), [None, permutation(7)[:4]], r(4, 3))
    yield call("index_put.default", r(7, 5), [i(7, 9), i(5, 9)], r(9), True)
    yield call("_unsafe_index_put.default", r(7, 5), [permutation(7)[:3]], r(3, 5))
    yield call("one_hot.default", i(5, 7, 3), 5)
    yield call("one_hot.default", i(5, 7))
    yield call("histc.default", u(11), 4, 0, 1)
    yield call("histc.default", u(11), 4)
    yield call("bucketize.Tensor", r(5, 7), r(3).sort().values)
    yield call("searchsorted.Tensor", r(3).sort().values, r(5, 7))
    yield call("isin.Tensor_Tensor", i(9, 5, 7), i(9, 3))
    yield call("nonzero.default", b(5, 7))
    yield call("masked_select.default", r(5, 7), b(5, 7))
    yield call("masked_scatter.default", r(5, 7), b(5, 7), r(40))
    yield call("_unique2.default", i(5, 9))
    yield call("bincount.default", i(5, 9))


def _creation() -> Iterator[Example]:
    call = _calls("aten")
    yield call("zeros.default", [5, 3])
    yield call("ones.default", [5, 3], dtype=torch.float64)
    yield call("full.default", [5, 3], 1.5, dtype=torch.float64)
    yield call("new_zeros.default", r(5, 3), [4, 7])
    yield call("new_ones.default", r(5, 3), [])
    yield call("new_full.default", i(5, 3), [7], 3)
    yield call("zeros_like.default", r(5, 3))
    yield call("ones_like.default", i(5, 3))
    yield call("full_like.default", r(5, 3), 2.0)
    yield call("arange.default", 11)
    yield call("arange.start_step", 1, 23, 3)
    yield call("linspace.default", 0.0, 1.0, 7, dtype=torch.float64)
    yield call("logspace.default", 0.0, 1.0, 7, dtype=torch.float64)
    yield call("eye.default", 7)
    yield call("hann_window.default", 7, dtype=torch.float64)
    yield call("tril_indices.default", 4, 5)
    yield call("triu_indices.default", 4, 5, 1)
    yield call("scalar_tensor.default", 2.0, dtype=torch.float64)
    for target, *args in (
        ("empty.memory_format", [5, 3]), ("new_empty.default", r(5, 3), [4, 7]), ("empty_like.default", r(5, 3)),
        ("rand.default", [5, 7]), ("randn.default", [5, 7]), ("randint.default", 9, [5, 7]), ("rand_like.default", r(5, 7)),
        ("randn_like.default", r(5, 7)), ("randint_like.default", r(5, 7), 9), ("bernoulli.default", u(5, 7)),
        ("normal.float_float", 0.0, 1.0, [5, 7]), ("rrelu.default", r(5, 7), 0.1, 0.3, True),
        ("dropout.default", r(5, 7), 0.4, True),
        ("native_dropout.default", r(5, 7), 0.4, True), ("feature_dropout.default", r(5, 7, 3), 0.4, True),
    ):  # fmt: skip
        yield Example(f"aten.{target}", tuple(args), random=True)
    yield call("dropout.default", r(5, 7), 0.4, False)
    yield call("dropout.default", r(5, 7), 0.0, True)


def _layers() -> Iterator[Example]:
    call = _calls("aten")

    def weights(gates: int, layers: int) -> list[Tensor]:
        sizes = [(gates * 4, 3 if layer == 0 else 4) for layer in range(layers)]
        return [t for n, m in sizes for t in (r(n, m), r(n, 4), r(n), r(n))]

    yield call("lstm.input", r(5, 3, 3), [r(2, 5, 4), r(2, 5, 4)], weights(4, 2), True, 2, 0.0, True, False, True)
    yield call("lstm.input", r(3, 5, 3), [r(1, 5, 4), r(1, 5, 4)], weights(4, 1), True, 1, 0.0, True, False, False)
    yield call("lstm_cell.default", r(5, 3), [r(5, 4), r(5, 4)], *weights(4, 1))
    yield call("gru_cell.default", r(5, 3), r(5, 4), *weights(3, 1))
    yield call("rnn_tanh_cell.default", r(5, 3), r(5, 4), *weights(1, 1))
    yield call("rnn_relu_cell.default", r(5, 3), r(5, 4), *weights(1, 1))
    yield call("gru.input", r(5, 3, 3), r(1, 5, 4), weights(3, 1), True, 1, 0.0, True, False, True)
    yield call("rnn_tanh.input", r(5, 3, 3), r(1, 5, 4), weights(1, 1), True, 1, 0.0, True, False, True)
    yield call("rnn_relu.input", r(5, 3, 3), r(1, 5, 4), weights(1, 1), True, 1, 0.0, True, False, True)


def _linear_elementwise() -> Iterator[Example]:
    call = _calls("aten")
    for name in ("add", "sub", "subtract", "rsub"):
        yield call(f"{name}.Tensor", r(5, 3, 4), r(3, 1))
    yield call("add.Tensor", r(5, 3), 1.5)
    yield call("add.Tensor", r(5, 3), 0)
    yield call("add.Tensor", i(9, 5, 3), i(9, 3))
    for name in ("mul", "multiply", "div", "divide", "true_divide"):
        yield call(f"{name}.Tensor", r(5, 3, 4), u(3, 1))
    yield call("mul.Tensor", r(5, 3), 1.5)
    yield call("div.Tensor_mode", r(5, 3), u(3), rounding_mode="floor")
    unary = """deg2rad neg negative positive clone contiguous alias lift_fresh_copy lift_fresh real conj conj_physical
    resolve_conj resolve_neg"""
    for name in unary.split():
        yield call(f"{name}.default", r(5, 3))
    yield call("imag.default", torch.complex(r(5, 3), r(5, 3)))
    yield call("_conj.default", torch.complex(r(5, 3), r(5, 3)))
    yield call("detach.default", r(5, 3))
    yield call("to.dtype", r(5, 3), torch.float64)
    yield call("to.dtype", r(5, 3), torch.int64)
    yield call("_to_copy.default", r(5, 3))
    yield call("type_as.default", r(5, 3), r(7))
    yield call("copy.default", r(5, 3), r(3))
    yield call("fill.Scalar", r(5, 3), 2.5)
    yield call("fill.Tensor", r(5, 3), r())
    yield call("where.self", b(5, 3), r(5, 3), r(3))
    yield call("where.ScalarOther", b(5, 3), r(5, 3), -1.5)
    yield call("where.ScalarSelf", b(5, 3), 0.0, r(5, 3))
    yield call("masked_fill.Scalar", r(5, 3), b(3), 0.0)
    yield call("masked_fill.Scalar", r(5, 3), b(5, 1), -3.5)
    yield call("masked_fill.Tensor", r(5, 3), b(5, 3), r())
    yield call("lerp.Scalar", r(5, 3), r(3), 0.3)
    yield call("lerp.Tensor", r(5, 3), r(5, 3), u(5, 1))
    yield call("addcmul.default", r(5, 3), r(5, 3), r(3), value=0.5)
    yield call("prelu.default", r(5, 3, 4), u(3))
    yield call("prelu.default", r(5, 3, 4), u(1))
    yield call("glu.default", r(5, 6), -1)


_WHOLE_NUMBERS = {"bitwise", "logical", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__"}


def _elementwise() -> Iterator[Example]:
    """An example for each operator of `NONLINEAR`, with arguments after its schema."""
    for name in NONLINEAR:
        packet = getattr(torch.ops.aten, name)
        overload = next(
            o for o in ("Tensor_Tensor", "Tensor", "Tensor_Scalar", "default", "Scalar") if o in packet.overloads()
        )
        target = f"aten.{name}.{overload}"
        integral = any(name.startswith(prefix) for prefix in _WHOLE_NUMBERS)
        args: list[Any] = []
        for number, argument in enumerate(operator(target)._schema.arguments):
            if argument.kwarg_only or argument.has_default_value():
                break
            kind = str(argument.type)
            shape = (5, 3) if number == 0 else (3,)
            if kind == "Tensor":
                domain = 1 if name in ("acosh",) else 0
                args.append(i(4, *shape) + 1 if integral else u(*shape) + domain)
            else:
                args.append(0.5)
        if name == "ldexp":
            args[1] = i(4, 3)
        if name in ("clamp", "clip"):
            target, args = f"aten.{name}.default", [r(5, 3), -0.5, 0.5]
        if name.endswith("_backward"):
            args[0], args[1] = r(5, 3), r(5, 3)
        yield Example(target, tuple(args))


def _in_place() -> Iterator[Example]:
    call = _calls("aten")
    yield call("add_.Tensor", i(9), 1)
    yield call("mul_.Tensor", r(5, 3), u(3))
    yield call("copy_.default", r(5, 3), r(5, 3))
    yield call("fill_.Scalar", r(5, 3), 2.0)
    yield call("zero_.default", r(5, 3))


def _calls(namespace: str) -> Callable[..., Example]:
    return lambda target, *args, **kwargs: Example(f"{namespace}.{target}", args, kwargs)


EXAMPLES: tuple[Example, ...] = tuple(
    example
    for group in (
        _products, _linear_elementwise, _views, _reductions, _norms, _losses, _attention, _convolutions, _indexing, _creation,
        _layers, _in_place,
    )
    for example in group()
)  # fmt: skip
ELEMENTWISE: tuple[Example, ...] = tuple(_elementwise())
