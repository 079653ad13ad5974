"""Prove a signature: the operator on the whole against the local programs on the pieces, forward and backward.

Problem    a signature claims that pieces of the operands, each run by itself, give the pieces of the outputs. A wrong claim
           trains silently to something else.
Method     cut random operands as claimed, run the p local programs side by side (one thread each, so that those that
           communicate can), put the outputs together, and compare with the operator run whole; then do the same with
           gradients under the dual rule:                                                          `verify`
               a value that is            Shard     Replicate            Partial
               has a cotangent            Shard     Partial              Replicate
           A Partial operand is dealt out in random terms, and so is the cotangent of a Replicate output: a program that
           relied on how a sum is split would fail.                                               `deal_out`, `put_together`
Guarantee  none but numeric: random operands in float64, a few sizes. Uneven sizes, 2 and 3 parts and unequal weights are the
           caller's choice (`signatures_of` lists what a row claims); constant operands are refused, since a zero bias
           makes wrong claims look right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.graph.graph import Node, Ref, TensorSpec, map_refs
from weft.graph.rewrite import operator
from weft.placement.comms import Comms, run_threads, thread_comms
from weft.placement.layout import (
    Mesh,
    Partial,
    Placement,
    Placements,
    Replicate,
    Shard,
    deal,
    intervals,
    local_shape,
    take,
)
from weft.placement.rows import row_of
from weft.placement.signature import Call, Local, Row, Signature, linear_signature, link_signature

__all__ = ["VerificationError", "call_of", "deal_out", "put_together", "run_pieces", "signatures_of", "verify"]

Position = tuple[int, ...]  # of a device in the mesh
_NORMS_WITH_BUFFERS = ("batch_norm", "instance_norm")


class VerificationError(WeftError, ValueError):
    """A signature that is not what it claims: `target`, `signature` (as text), and `what` differs, in words."""

    def __init__(self, target: str, signature: str, what: str):
        super().__init__(target, signature, what)
        self.target, self.signature, self.what = target, signature, what

    def __str__(self) -> str:
        return f"{self.target}: the signature {self.signature} does not hold: {self.what}. Correct the operator's row."


def call_of(target: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> tuple[Call, list[Tensor]]:
    """The `Call` that a row function sees, and its operands, from arguments that hold tensors.

    The operator is run once on copies to learn its outputs.
    """
    tensors: list[Tensor] = []

    def name(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            tensors.append(tree)
            return Ref(f"operand{len(tensors) - 1}")
        if isinstance(tree, (list, tuple)):
            return type(tree)(name(item) for item in tree)
        return tree

    named_args, named_kwargs = name(tuple(args)), {key: name(value) for key, value in (kwargs or {}).items()}
    node = Node(name="call", role="call", target=target, args=named_args, kwargs=named_kwargs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = _flat(_apply(operator(target), node, [t.detach().clone() for t in tensors]))
    node = Node(
        name="call",
        role="call",
        target=target,
        args=named_args,
        kwargs=named_kwargs,
        outputs=tuple(TensorSpec(tuple(out.shape), out.dtype, out.is_floating_point()) for out in outputs),
    )
    return Call(node, tuple(TensorSpec(tuple(t.shape), t.dtype, t.is_floating_point()) for t in tensors)), tensors


def _apply(run: Callable[..., Any], node: Node, operands: Sequence[Tensor]) -> Any:
    given = iter(operands)
    args, kwargs = map_refs((node.args, dict(node.kwargs)), lambda _: next(given))
    return run(*args, **kwargs)


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def signatures_of(
    call: Call, row: Row, parts: int, weights: Sequence[float] | None = None, *, coarse: bool = True
) -> Iterator[Signature]:
    """Every signature that a row claims over `parts` devices: each link by single indices, and linear groups.

    With `coarse`, each link also in units of 2 or 3 and in 2 or 3 blocks, where the index has a size for that.
    """
    for link in row.links:
        specs, first = [*((call.inputs, p) for p in link.inputs), *((call.outputs, p) for p in link.outputs)][0]
        extent = specs[first.operand].shape[first.dim] // (first.outer * first.inner)
        cuts = [(1, 1)]
        if coarse:
            cuts += [(1, u) for u in (2, 3) if extent % u == 0][:1]
            cuts += [(b, 1) for b in (2, 3) if extent % b == 0 and not link.contiguous][:1]
        for blocks, unit in cuts:
            if extent % (blocks * unit) == 0 and min(deal(extent // (blocks * unit), parts, weights)) > 0:
                yield link_signature(call, row, link, blocks, unit)
    for group in row.linear:
        yield linear_signature(call, row, group)
    yield from row.extra


def verify(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    signatures: Sequence[Signature],
    mesh: Mesh,
    row: Row | None = None,
    seed: int = 0,
    tolerance: float = 1e-9,
) -> float:
    """The largest relative error of the local programs' outputs and gradients against the operator run whole.

    Args:
        target, args, kwargs: the call, with tensors as operands. Floating point ones are taken in float64.
        signatures: one per axis of the mesh, outermost first.
        mesh: its shape and weights say how operands are cut.
        row: whose local program to run; by default the operator's own row (the operator itself, if it has none).
        seed: of the random terms of Partial operands, and of the cotangents.
    Raises:
        VerificationError: an output or gradient differs by more than `tolerance` of its largest entry, or has another
            shape than its placement says, or a local program raises.
        ValueError: a floating point operand of several elements is constant: random ones are needed.
    """
    args, kwargs = _widen(tuple(args)), _widen(dict(kwargs or {}))
    call, operands = call_of(target, args, kwargs)
    for number, operand in enumerate(operands):
        if operand.is_floating_point() and operand.numel() > 1 and bool((operand == operand.flatten()[0]).all()):
            raise ValueError(
                f"verify: operand {number} of {target} is constant; constant operands hide errors, give random ones"
            )
    row = row if row is not None else (row_of(call) or Row())
    return _Trial(call, operands, tuple(signatures), mesh, row, seed, tolerance).run()


def run_pieces(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    signatures: Sequence[Signature],
    mesh: Mesh,
    row: Row | None = None,
    seed: int = 0,
) -> tuple[list[dict[Position, Tensor]], list[dict[Position, Tensor]]]:
    """The local operands and the local outputs of a call, each by number and position: to look at what cannot be compared.

    Outputs are recorded by autograd, down to the local operands.
    """
    call, operands = call_of(target, args, kwargs)
    row = row if row is not None else (row_of(call) or Row())
    return _Trial(call, operands, tuple(signatures), mesh, row, seed, 0.0).pieces()


def _widen(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().double() if tree.is_floating_point() else tree.detach()
    if isinstance(tree, (list, tuple)):
        return type(tree)(_widen(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _widen(value) for key, value in tree.items()}
    return torch.float64 if tree in (torch.float32, torch.bfloat16, torch.float16) else tree


class _Trial:
    """One proof: `run` compares outputs, then gradients, then what operands were changed to."""

    def __init__(
        self,
        call: Call,
        operands: list[Tensor],
        signatures: tuple[Signature, ...],
        mesh: Mesh,
        row: Row,
        seed: int,
        tolerance: float,
    ):
        self.call, self.operands, self.signatures, self.mesh, self.row = call, operands, signatures, mesh, row
        self.tolerance, self.learned = tolerance, frozenset[int]()
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: list[Placements] = [tuple(s.inputs[i] for s in signatures) for i in range(len(operands))]
        self.outputs: list[Placements] = [tuple(s.outputs[i] for s in signatures) for i in range(len(call.outputs))]

    def run(self) -> float:
        self.learned = self._differentiable()
        changed = self._leaves(self.operands)
        wanted = _flat(_apply(operator(self.call.node.target), self.call.node, changed))
        learned = sorted(self.learned)
        through = [i for i, out in enumerate(wanted) if out.requires_grad]
        cotangents = {i: torch.randn(wanted[i].shape, dtype=wanted[i].dtype, generator=self.generator) for i in through}
        gradients = self._vjp(
            [wanted[i] for i in through], [changed[i] for i in learned], [cotangents[i] for i in through]
        )

        positions = self.mesh.positions()
        leaves, made = self._run_local()
        error = 0.0
        for i, whole in enumerate(wanted):
            pieces = {at: made[at][i].detach() for at in positions}
            error = max(error, self._compare(f"output {i}", whole.detach(), pieces, self.outputs[i]))
        for i, (before, after) in enumerate(zip(self.operands, changed, strict=True)):
            if not torch.equal(before, after.detach()):
                pieces = {at: leaves[at][i].detach() for at in positions}
                error = max(error, self._compare(f"operand {i} after the call", after.detach(), pieces, self.inputs[i]))
        if not through or not learned:
            return error

        seeds = {
            i: deal_out(
                cotangents[i], _duals(self.outputs[i]), self.mesh, self.generator, {at: made[at][i] for at in positions}
            )
            for i in through
        }
        found = self._everywhere(lambda comms: self._backward(comms.coordinates, leaves, made, through, learned, seeds))
        for number, i in enumerate(learned):
            pieces = {at: found[at][number] for at in positions}
            error = max(
                error, self._compare(f"gradient of operand {i}", gradients[number], pieces, _duals(self.inputs[i]))
            )
        return error

    def pieces(self) -> tuple[list[dict[Position, Tensor]], list[dict[Position, Tensor]]]:
        self.learned = self._differentiable()
        leaves, made = self._run_local()
        return (
            [{at: leaves[at][i] for at in leaves} for i in range(len(self.operands))],
            [{at: made[at][i] for at in made} for i in range(len(self.call.outputs))],
        )

    def _run_local(self) -> tuple[dict[Position, list[Tensor]], dict[Position, list[Tensor]]]:
        """Local operands and local outputs by position."""
        dealt = [deal_out(x, p, self.mesh, self.generator) for x, p in zip(self.operands, self.inputs, strict=True)]
        leaves = {at: self._leaves([pieces[at] for pieces in dealt]) for at in self.mesh.positions()}
        return leaves, self._everywhere(lambda comms: self._forward(comms, leaves))

    def _leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of operands, of which the differentiable ones ask for gradients."""
        return [x.detach().clone().requires_grad_(number in self.learned) for number, x in enumerate(tensors)]

    def _differentiable(self) -> frozenset[int]:
        """Operands that torch gives a gradient; buffers that the operator writes to are not among them."""
        call = self.call
        written = {call.operand(3), call.operand(4)} if call.node.op in _NORMS_WITH_BUFFERS else set()
        floating = [n for n, x in enumerate(self.operands) if x.is_floating_point() and n not in written]

        def works(learned: Sequence[int]) -> bool:
            leaves = [x.detach().clone().requires_grad_(n in learned) for n, x in enumerate(self.operands)]
            try:
                with torch.random.fork_rng(devices=[]):
                    outputs = _flat(_apply(operator(call.node.target), call.node, leaves))
                through = [out for out in outputs if out.requires_grad]
                self._vjp(through, [leaves[n] for n in learned], [torch.zeros_like(out) for out in through])
            except RuntimeError:
                return False
            return True

        if works(floating):
            return frozenset(floating)
        return frozenset(n for n in floating if works([n]))

    @staticmethod
    def _vjp(outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        if not outputs:
            return [torch.zeros_like(leaf) for leaf in leaves]
        if not leaves:
            return []
        found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]

    def _everywhere(self, work: Callable[[Comms], Any]) -> dict[Position, Any]:
        """`work` of every device by position: side by side where a local program may communicate."""
        positions = self.mesh.positions()
        try:
            if self.row.local is None:
                return {comms.coordinates: work(comms) for comms in thread_comms(self.mesh)}
            return dict(zip(positions, run_threads(self.mesh, work, timeout=30.0), strict=True))
        except Exception as error:
            raise self._wrong(f"a local program raised {type(error).__name__}: {error}") from error

    def _forward(self, comms: Comms, leaves: dict[Position, list[Tensor]]) -> list[Tensor]:
        here = _Here(self, comms)
        run = operator(self.call.node.target) if self.row.local is None else self.row.local(here)
        return _flat(_apply(run, self.call.node, leaves[comms.coordinates]))

    def _backward(
        self,
        at: Position,
        leaves: dict[Position, list[Tensor]],
        made: dict[Position, list[Tensor]],
        through: list[int],
        learned: list[int],
        seeds: dict[int, dict[Position, Tensor]],
    ) -> list[Tensor]:
        outputs = [(made[at][i], seeds[i][at]) for i in through if made[at][i].requires_grad]
        return self._vjp([out for out, _ in outputs], [leaves[at][i] for i in learned], [seed for _, seed in outputs])

    def _compare(self, what: str, whole: Tensor, pieces: dict[Position, Tensor], placements: Placements) -> float:
        for at, piece in pieces.items():
            shape = local_shape(whole.shape, placements, self.mesh, at)
            if tuple(piece.shape) != shape:
                raise self._wrong(f"{what} at {at} has shape {list(piece.shape)} in place of {list(shape)}")
            if piece.dtype != whole.dtype:
                raise self._wrong(f"{what} at {at} is {piece.dtype} in place of {whole.dtype}")
        together, spread = put_together(pieces, whole.shape, placements, self.mesh)
        scale = max(1.0, float(whole.abs().max())) if whole.is_floating_point() and whole.numel() else 1.0
        error = max(_distance(together, whole), spread) / scale
        if not error <= self.tolerance:
            raise self._wrong(f"{what} is off by {error:.3g} of its largest entry")
        return error

    def _wrong(self, what: str) -> VerificationError:
        sizes = ", ".join(str(list(x.shape)) for x in self.operands)
        where = f"on operands {sizes} over {self.mesh.shape} devices, weights {self.mesh.weights}"
        return VerificationError(self.call.node.target, " x ".join(map(str, self.signatures)), f"{where}, {what}")


def _duals(placements: Placements) -> Placements:
    """Placement of the cotangent, with the kind of Partial kept for `deal_out` to route."""
    return tuple(Partial() if isinstance(p, Replicate) else Replicate() if p == Partial() else p for p in placements)


def deal_out(
    whole: Tensor,
    placements: Placements,
    mesh: Mesh,
    generator: torch.Generator,
    values: Mapping[Position, Tensor] | None = None,
) -> dict[Position, Tensor]:
    """Local tensors, by position, that make up a whole tensor; Partial ones are random terms.

    With `values` (the outputs of which `whole` is a cotangent), Partial(max), Partial(min) and Partial(avg) stand for how
    such an output's cotangent is dealt: to the devices that hold the extremum, or in equal shares.
    """
    others = [axis for axis, p in enumerate(placements) if not isinstance(p, Shard)]
    found: dict[Position, Tensor] = {}

    def spread(piece: Tensor, at: dict[int, int], axes: list[int]) -> Iterator[tuple[dict[int, int], Tensor]]:
        if not axes:
            yield at, piece
            return
        axis, rest = axes[0], axes[1:]
        p = placements[axis]
        size = mesh.shape[axis]
        if isinstance(p, Replicate):
            below = list(spread(piece, at, rest))  # drawn once: all devices of the axis hold the same
            for i in range(size):
                for more, term in below:
                    yield {**more, axis: i}, term
            return
        assert isinstance(p, Partial)
        for i, term in enumerate(_terms(piece, p, size, generator, values is not None)):
            yield from spread(term, {**at, axis: i}, rest)

    for shard_at in itertools.product(*(range(1 if axis in others else n) for axis, n in enumerate(mesh.shape))):
        held = take(
            whole, tuple(Replicate() if axis in others else p for axis, p in enumerate(placements)), mesh, shard_at
        )
        for at, term in spread(held, {}, others):
            position = tuple(at.get(axis, shard_at[axis]) for axis in range(mesh.ndim))
            found[position] = term
    extremes = {
        axis: p.reduce for axis, p in enumerate(placements) if isinstance(p, Partial) and p.reduce in ("max", "min")
    }
    if values is not None and extremes:
        _route(found, values, extremes)
    return found


def _terms(piece: Tensor, p: Partial, size: int, generator: torch.Generator, is_cotangent: bool) -> list[Tensor]:
    if is_cotangent and p.reduce != "sum":
        return [piece / size if p.reduce == "avg" else piece] * size  # extrema are routed afterwards
    if p.reduce in ("max", "min"):
        sign = 1 if p.reduce == "max" else -1
        noise = [torch.rand(piece.shape, dtype=torch.float64, generator=generator).to(piece.dtype) for _ in range(size)]
        holder = torch.randint(size, piece.shape, generator=generator)
        return [torch.where(holder == i, piece, piece - sign * (n + 0.1)) for i, n in enumerate(noise)]
    if not (piece.is_floating_point() or piece.is_complex()):
        first = [torch.randint(-5, 6, piece.shape, generator=generator).to(piece.dtype) for _ in range(size - 1)]
    else:
        first = [torch.randn(piece.shape, dtype=piece.dtype, generator=generator) for _ in range(size - 1)]
    scale = size if p.reduce == "avg" else 1
    return [*first, scale * piece - sum(first)] if first else [piece]


def _route(found: dict[Position, Tensor], values: Mapping[Position, Tensor], extremes: Mapping[int, str]) -> None:
    """Give an extremum's cotangent to the devices along its axes that hold it, in equal shares."""

    def line(at: Position) -> Position:
        return tuple(-1 if axis in extremes else i for axis, i in enumerate(at))

    reduce = set(extremes.values())
    assert len(reduce) == 1, "a maximum of minima depends on the order of the axes"
    for here in {line(at) for at in found}:
        members = [at for at in found if line(at) == here]
        stacked = torch.stack([values[at].detach() for at in members])
        winners = stacked == (stacked.amax(0) if reduce == {"max"} else stacked.amin(0))
        for at, mine in zip(members, winners / winners.sum(0), strict=True):
            found[at] = found[at] * mine


def put_together(
    pieces: Mapping[Position, Tensor], shape: Sequence[int], placements: Placements, mesh: Mesh
) -> tuple[Tensor, float]:
    """The whole that local tensors make up, and how far those that ought to be equal differ."""
    current, spread = dict(pieces), 0.0
    for kinds in ((Partial,), (Replicate,)):
        for axis, p in enumerate(placements):
            if not isinstance(p, kinds):
                continue
            lines: dict[Position, list[Tensor]] = {}
            for at, piece in current.items():
                lines.setdefault((*at[:axis], 0, *at[axis + 1 :]), []).append(piece)
            if isinstance(p, Replicate):
                spread = max([spread, *(_distance(line[0], other) for line in lines.values() for other in line[1:])])
            current = {at: _reduced(line, p) for at, line in lines.items()}
    first = next(iter(current.values()))
    whole = torch.empty(tuple(shape), dtype=first.dtype)
    for at, piece in current.items():
        _write(whole, piece, [intervals(n, dim, placements, mesh, at) for dim, n in enumerate(shape)])
    return whole, spread


def _reduced(line: list[Tensor], p: Placement) -> Tensor:
    if isinstance(p, Replicate):
        return line[0]
    assert isinstance(p, Partial)
    stacked = torch.stack(line)
    if p.reduce == "sum":
        return stacked.sum(0, dtype=line[0].dtype)
    return {"max": lambda: stacked.amax(0), "min": lambda: stacked.amin(0), "avg": lambda: stacked.mean(0)}[p.reduce]()


def _write(whole: Tensor, piece: Tensor, held: list[list[tuple[int, int]]]) -> None:
    """Put a local piece in its place: `held` has the ranges of each dim."""
    index = [torch.cat([torch.arange(low, high) for low, high in ranges]) for ranges in held]
    if not index:
        whole.copy_(piece)
        return
    grids = [i.view([-1 if d == dim else 1 for d in range(len(index))]) for dim, i in enumerate(index)]
    whole[tuple(grids)] = piece


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number and the other is."""
    if not a.numel():
        return 0.0
    a, b = a.detach(), b.detach()
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    gap = (a - b).abs().masked_fill(same, 0.0)
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


class _Here(Local):
    """`Local` for one device of a trial."""

    def __init__(self, trial: _Trial, comms: Comms):
        self.node = trial.call.node
        self._trial, self._comms, self._at = trial, comms, comms.coordinates

    def _shape(self, spec: TensorSpec, placements: Placements) -> tuple[int, ...]:
        return local_shape(spec.shape, placements, self._trial.mesh, self._at)

    def _range(self, spec: TensorSpec, placements: Placements, dim: int) -> tuple[int, int]:
        held = intervals(spec.shape[dim], dim, placements, self._trial.mesh, self._at)
        if len(held) != 1:
            raise ValueError(f"dim {dim} is cut in blocks, but the local program needs one range per device")
        return held[0]

    def input_shape(self, operand: int) -> tuple[int, ...]:
        return self._shape(self._trial.call.inputs[operand], self._trial.inputs[operand])

    def output_shape(self, output: int = 0) -> tuple[int, ...]:
        return self._shape(self._trial.call.outputs[output], self._trial.outputs[output])

    def input_range(self, operand: int, dim: int) -> tuple[int, int]:
        return self._range(self._trial.call.inputs[operand], self._trial.inputs[operand], dim)

    def output_range(self, output: int, dim: int) -> tuple[int, int]:
        return self._range(self._trial.call.outputs[output], self._trial.outputs[output], dim)

    def axes_of_input(self, operand: int, dim: int) -> tuple[int, ...]:
        return _cutting(self._trial.inputs[operand], dim)

    def axes_of_output(self, output: int, dim: int) -> tuple[int, ...]:
        return _cutting(self._trial.outputs[output], dim)

    def group(self, axis: int) -> Any:
        return self._comms.group(axis)

    def random_stream(self) -> Callable[[], int]:
        sharded = {
            axis for placements in self._trial.outputs for axis, p in enumerate(placements) if isinstance(p, Shard)
        }
        seeds = itertools.count(hash(tuple(i for axis, i in enumerate(self._at) if axis in sharded)) & 0xFFFFFFFF)
        return lambda: next(seeds)


def _cutting(placements: Placements, dim: int) -> tuple[int, ...]:
    return tuple(axis for axis, p in enumerate(placements) if isinstance(p, Shard) and p.dim == dim)
