"""Boxing: move a value from one placement to another on one mesh, differentiably.

    box(x, src, dst, comms, shape)      once
    compile_boxing(src, dst, shape, comms) -> Boxing        many times: steps are chosen and prepared once

The steps are `boxing_steps.steps`, their programs `boxing_ops`; a value on another device set is moved by
`boxing_between.box_between`. Backward is the exact adjoint, step by step, so that for placements of sums the gradient of a value
placed X arrives placed dual(X): the adjoint of X -> Y is dual(Y) -> dual(X).

A boxing that has nothing to do returns its argument itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from weft.placement.boxing_ops import Adjoint, Op, build
from weft.placement.boxing_steps import Step, steps
from weft.placement.comms import Comms
from weft.placement.layout import Placements, local_shape

__all__ = ["Boxing", "box", "compile_boxing", "steps"]


@final
class Boxing:
    """A prepared move of local tensors; made by `compile_boxing`.

    Attributes:
        steps: what it does, for people and for the cost model.
        identity: nothing is to be done.
    """

    __slots__ = ("steps", "ops", "identity")

    def __init__(self, steps: tuple[Step, ...], ops: Sequence[Op]):
        self.steps, self.ops = steps, tuple(ops)
        self.identity = not self.ops

    def __call__(self, x: Tensor) -> Tensor:
        """The local piece after the move, differentiable."""
        for op in self.ops:
            x = op(x)
        return x

    def run(self, x: Tensor) -> Tensor:
        """The local piece after the move, not recorded by autograd."""
        for op in self.ops:
            x = op.run(x)
        return x

    def dual(self) -> Boxing:
        """The adjoint: takes the gradient of the new piece to that of the old one.

        Raises ValueError when used on a step out of Partial(max) or Partial(min), which is not linear.
        """
        return Boxing(self.steps, [op.op if isinstance(op, Adjoint) else Adjoint(op) for op in reversed(self.ops)])

    def __repr__(self) -> str:
        return f"Boxing({'; '.join(map(str, self.steps)) or 'nothing to do'})"


def compile_boxing(src: Placements, dst: Placements, shape: Sequence[int], comms: Comms) -> Boxing:
    """Prepare the move of a value of the given whole shape from `src` to `dst` on the mesh of `comms`.

    All devices of the mesh must run the same boxings in the same order.

    Raises:
        ValueError: a placement does not fit the shape or the mesh.
    """
    key = (src, dst, tuple(shape))
    made = comms.boxings.get(key)
    if made is None:
        path = steps(*key[:2], comms.mesh, key[2])
        made = comms.boxings[key] = Boxing(path, [build(step, key[2], comms) for step in path])
    return made


def box(x: Tensor, src: Placements, dst: Placements, comms: Comms, shape: Sequence[int]) -> Tensor:
    """This device's piece of a value under placements `dst`, given its piece under `src`.

    Args:
        x: the local piece, of shape `layout.local_shape(shape, src, ...)`.
        shape: shape of the whole value.
    Raises:
        ValueError: a placement does not fit the shape or the mesh, or x is not a piece of the shape under `src`.
        PeerLost: another process did not answer.
    """
    expected = local_shape(shape, src, comms.mesh, comms.coordinates)
    if tuple(x.shape) != expected:
        raise ValueError(
            f"box: rank {comms.rank} holds a piece of shape {tuple(x.shape)}, but its piece of {tuple(shape)} under "
            f"{' '.join(map(str, src))} on mesh {comms.mesh.shape} has shape {expected}"
        )
    return compile_boxing(src, dst, shape, comms)(x)
