"""What an operator takes and gives back while it runs, on the pieces that a device has: measured where a plan is squeezed.

Problem    a convolution may need as much again as it reads and makes (reordered operands, unfolded pictures). How much only its
           kernel knows, and a plan without it is refused as soon as it runs within its bytes.
Method     the operator runs once, forward and backward, on made-up numbers of the pieces' shapes while the native library counts
           allocations: the most that is alive, less what it leaves.                                     `workspace`
           Remembered by operator, shapes and other arguments.
Limits     operators of `KINDS`, for devices that are a CPU, on the CPU that plans; 0 elsewhere, where the library is missing,
           and for operators whose operands exceed `LARGEST` bytes, which planning must not allocate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.graph.graph import Ref, map_refs
from weft.graph.rewrite import operator
from weft.placement.layout import local_shape

if TYPE_CHECKING:
    from weft.planner.costs import Place
    from weft.planner.placed import PlacedGraph, View
    from weft.planner.prepared import Call

__all__ = ["workspace"]

KINDS = ("conv",)
LARGEST = 1 << 30  # bytes of operands

_known: dict[str, tuple[int, int]] = {}


@dataclass(frozen=True)
class _Piece:
    """A tensor that is to be made up."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def make(self) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        if self.dtype.is_floating_point:
            made.uniform_(0.1, 1.0).requires_grad_(self.requires_grad)
        else:
            made.zero_()
        return made


def workspace(placed: PlacedGraph, call: Call, view: View, place: Place) -> tuple[int, int]:
    """Bytes that a call takes while it runs forward, and while its backward does, on a device of a class."""
    if call.node.kind not in KINDS or not place.device.kind.startswith("cpu"):
        return 0, 0
    pieces: list[_Piece] = []
    numbers = iter(view.inputs)

    def piece(ref: Ref) -> _Piece:
        spec = placed.prepared.specs[ref]
        shape = local_shape(spec.shape, placed.placements(next(numbers)), placed.costs.mesh, place.position)
        pieces.append(_Piece(shape, spec.dtype, spec.requires_grad))
        return pieces[-1]

    arguments = map_refs((call.node.args, dict(call.node.kwargs)), piece)
    key = f"{call.node.target}{arguments}"
    if key not in _known:
        small = sum(each.nbytes for each in pieces) <= LARGEST
        _known[key] = _measured(operator(call.node.target), *_made(arguments)) if small else (0, 0)
    return _known[key]


def _made(tree: Any) -> Any:
    """The same arguments with tensors in place of pieces."""
    if isinstance(tree, _Piece):
        return tree.make()
    if isinstance(tree, (list, tuple)):
        return type(tree)(_made(item) for item in tree)
    return {key: _made(item) for key, item in tree.items()} if isinstance(tree, Mapping) else tree


def _measured(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Bytes beyond those that stay, forward and backward, with one thread, as processes of a plan have."""
    from weft.memory import native  # compiles a library when it is first used

    if native.problem() is not None:
        return 0, 0
    ledger, threads = native.ledger(), torch.get_num_threads()
    wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    torch.set_num_threads(1)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=()):
            result, most, left = ledger.peak_during(run, *args, **kwargs)
            forward, backward = most - left, 0
            if wanted and result.requires_grad:
                gradient = torch.ones_like(result)
                _, most, left = ledger.peak_during(torch.autograd.grad, result, wanted, gradient)
                backward = most - left
    finally:
        torch.set_num_threads(threads)
    return max(forward, 0), max(backward, 0)
