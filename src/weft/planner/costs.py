"""What operators and boxings cost on one mesh of one cluster: the one cost model behind search, price, memory and bound.

    piece of a value on a device       fraction of its elements that the device holds          `Costs.fraction`
    operator                           slowest device: its share of FLOPs, its bytes           `Costs.operators`
    boxing, forward and backward       `boxing_cost` of it and of its dual                     `Costs.boxing`
    the same for whole tables          curves over bytes, interpolated                         `Costs.box_table`
    many small parameter tensors       one flat tensor per bucket                              `Costs.flat`

Devices at different places of a mesh differ in their pieces (odd sizes, weights) and perhaps in kind. One device per *class*
of equal ones is enough: on a mesh of like devices without weights the first has the largest piece of everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weft.cluster import costs as collectives
from weft.graph.graph import Node, TensorSpec
from weft.placement.boxing_cost import LOCAL, boxing_cost, in_memory
from weft.placement.boxing_steps import lacking, steps
from weft.placement.layout import Mesh, Partial, Placement, Placements, Replicate, Shard, deal, dual
from weft.placement.signature import Row, Signature

if TYPE_CHECKING:
    from weft.cluster import Cluster, Device

__all__ = ["Boxing", "Costs", "State", "dtype_name"]

State = tuple[Signature, ...]  # one signature per mesh axis


def dtype_name(spec: TensorSpec) -> str:
    """`float32` for `torch.float32`: the names under which devices list their rates."""
    return str(spec.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Boxing:
    """Seconds and bytes on the wire of one boxing, forward and (its dual) backward."""

    forward: float = 0.0
    backward: float = 0.0
    nbytes: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


FREE = Boxing()


@dataclass(frozen=True)
class Place:
    """A class of devices: one of them, and how many."""

    rank: int
    position: tuple[int, ...]
    device: Device
    ranks: tuple[int, ...]


class Costs:
    """The cost model on one mesh. Everything is memoised; make one per (cluster, mesh)."""

    def __init__(self, cluster: Cluster, mesh: Mesh):
        self.cluster, self.mesh = cluster, mesh
        self.places = _places(cluster, mesh)
        self.whole: Placements = (Replicate(),) * mesh.ndim
        self._fractions: dict[tuple[tuple[int, ...], Placements], NDArray[np.float64]] = {}
        self._boxings: dict[tuple, Boxing] = {}
        self._rates: dict[tuple[str, str], NDArray[np.float64]] = {}
        self._curves = _Curves(cluster, mesh)
        self._rates_of_flat: dict[
            tuple[Placements, Placements], float
        ] = {}  # bytes on the wire per byte of a flat tensor

    # ---- sizes of pieces

    def fraction(self, shape: Sequence[int], placements: Placements) -> NDArray[np.float64]:
        """Fraction of a tensor's elements that a device of each class holds."""
        key = (tuple(shape), placements)
        if key not in self._fractions:
            self._fractions[key] = np.array([self._piece(key[0], placements, place.position) for place in self.places])
        return self._fractions[key]

    def _piece(self, shape: tuple[int, ...], placements: Placements, position: tuple[int, ...]) -> float:
        held = 1.0
        for dim in {p.dim for p in placements if isinstance(p, Shard)}:
            count = units = 0
            for axis, p in enumerate(placements):
                if isinstance(p, Shard) and p.dim == dim:
                    if not units:
                        count = units = max(1, shape[dim] // (p.unit * p.blocks))
                    count = deal(count, self.mesh.shape[axis], p.weights or self.mesh.weights[axis])[position[axis]]
            held *= count / units
        return held

    def nbytes(self, spec: TensorSpec, placements: Placements) -> float:
        """Bytes of the largest piece of a value."""
        return spec.nbytes * float(self.fraction(spec.shape, placements).max())

    # ---- operators

    def work(self, specs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], state: State) -> NDArray[np.float64]:
        """Fraction of an operator's FLOPs that a device of each class does under a state.

        A mesh axis along which any output, or else any operand, is Shard cuts the work by that shard's share; the others do
        not cut it. Axes whose shard is found on the same tensor are cut together, so that nested cuts round as they do.
        """
        on: dict[tuple[str, int], list[Placement]] = {}
        for axis, signature in enumerate(state):
            where = _cut_of(signature)
            if where is not None:
                side, number = where
                placements = on.setdefault(where, list(self.whole))
                placements[axis] = (signature.outputs if side == "out" else signature.inputs)[number]
        share = np.ones(len(self.places))
        for (side, number), placements in on.items():
            share = share * self.fraction((outputs if side == "out" else specs)[number].shape, tuple(placements))
        return share

    def seconds(
        self, kind: str, flops: NDArray[np.float64], nbytes: NDArray[np.float64], dtype: str, calls: int = 1
    ) -> NDArray[np.float64]:
        """Seconds on a device of each class, for its own FLOPs and bytes; both of shape (..., classes)."""
        if kind in ("view", "none"):
            return np.zeros(np.shape(flops))
        if (kind, dtype) not in self._rates:
            rates = [(place.device.rate(kind), dtype) for place in self.places]
            self._rates[kind, dtype] = np.array(
                [(r.overhead, 1.0 / r.flops_of(t), 1.0 / r.bandwidth) for r, t in rates]
            ).T
        overhead, per_flop, per_byte = self._rates[kind, dtype]
        return calls * overhead + np.maximum(flops * per_flop, nbytes * per_byte)

    def operators(
        self, node: Node, specs: Sequence[TensorSpec], states: Sequence[State]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of a call under each of some states: seconds of forward, of backward, share of the work; (states, classes).

        `specs` are those of its operands. FLOPs follow the cut; bytes follow the local pieces of operands and outputs.
        A gather reads only rows that are asked for, so its traffic follows the cut, but for backward's dense gradient
        of the table.
        """
        share = np.array([self.work(specs, node.outputs, state) for state in states])
        if node.kind in ("view", "none"):
            return np.zeros_like(share), np.zeros_like(share), share
        operands = [
            self._pieces(spec, [tuple(s.inputs[i] for s in state) for state in states]) for i, spec in enumerate(specs)
        ]
        results = [
            self._pieces(spec, [tuple(s.outputs[i] for s in state) for state in states])
            for i, spec in enumerate(node.outputs)
        ]
        whole = float(sum(spec.nbytes for spec in (*specs, *node.outputs))) or 1.0
        traffic = sum(operands, np.zeros_like(share)) + sum(results, np.zeros_like(share))
        cost, traffic = node.cost, traffic / whole
        moved = cost.bytes_backward * traffic
        if node.kind == "gather":
            table = max(range(len(specs)), key=lambda i: specs[i].nbytes, default=0)
            dense = specs[table].nbytes if specs and specs[table].requires_grad else 0
            moved, traffic = cost.bytes_backward * share, share
            if cost.bytes_backward >= dense > 0:
                moved = (cost.bytes_backward - dense) * share + operands[table]
        dtype = dtype_name(node.outputs[0]) if node.outputs else "float32"
        forward = self.seconds(node.kind, cost.flops_forward * share, cost.bytes_forward * traffic, dtype)
        if not any(spec.requires_grad for spec in node.outputs):
            return forward, np.zeros_like(share), share
        return forward, self.seconds(node.kind, cost.flops_backward * share, moved, dtype), share

    def _pieces(self, spec: TensorSpec, placements: Sequence[Placements]) -> NDArray[np.float64]:
        """Bytes of a value's pieces under each of some placements: (placements, classes)."""
        return spec.nbytes * np.array([self.fraction(spec.shape, p) for p in placements])

    def inner(self, row: Row, state: State, trains: bool) -> Boxing:
        """The all-reduces that an operator's local program makes by itself (a split softmax, a synchronised batch norm)."""
        seconds = nbytes = 0.0
        for link in row.links:
            if not link.reduced:
                continue
            for axis, signature in enumerate(state):
                if _cuts_link(signature, link):
                    owed = (*self.whole[:axis], Partial(), *self.whole[axis + 1 :])
                    for size in link.reduced if trains else link.reduced[:1]:
                        one = self.boxing((max(1, size // 4),), 4, owed, self.whole)
                        seconds, nbytes = seconds + one.forward, nbytes + one.nbytes
        return Boxing(seconds, 0.0, nbytes)

    # ---- boxing

    def boxing(
        self, shape: tuple[int, ...], itemsize: int, source: Placements, target: Placements, grad: bool = False
    ) -> Boxing:
        """Cost of moving a value to another placement, and of moving its gradient back if it has one."""
        if source == target:
            return FREE
        key = (shape, itemsize, source, target, grad)
        found = self._boxings.get(key)
        if found is None:
            there = boxing_cost(source, target, shape, itemsize, self.mesh, self.cluster)
            found = Boxing(there.seconds, 0.0, there.nbytes)
            if grad:
                back = self.boxing(shape, itemsize, _dual(target), _dual(source))
                found = Boxing(found.forward, back.forward, found.nbytes + back.nbytes)
            self._boxings[key] = found
        return found

    def box_table(
        self, spec: TensorSpec, sources: Sequence[Placements], targets: Sequence[Placements]
    ) -> NDArray[np.float64]:
        """Seconds, there and (if the value has a gradient) back, of boxing a value from each source to each target.

        Pieces count as even here, and costs are interpolated between a few sizes: fast enough for tables of thousands.
        """
        there = self._curves.table(sources, targets, spec.nbytes)
        if spec.requires_grad:
            there = there + self._curves.table([_dual(t) for t in targets], [_dual(s) for s in sources], spec.nbytes).T
        return there

    def flat_seconds(self, nbytes: float, source: Placements, target: Placements) -> float:
        """Seconds to move a flat tensor of `nbytes` bytes, interpolated like `box_table`."""
        return float(self._curves.table([_flat(source)], [_flat(target)], nbytes)[0, 0])

    def flat(self, numel: float, itemsize: int, source: Placements, target: Placements) -> Boxing:
        """Cost of moving `numel` elements of parameters or gradients as one flat tensor: a bucket."""
        key = (source, target)
        if key not in self._rates_of_flat:
            whole = (1 << 20) * self.mesh.size
            self._rates_of_flat[key] = self.boxing((whole,), 1, _flat(source), _flat(target)).nbytes / whole
        nbytes = numel * itemsize
        return Boxing(self.flat_seconds(nbytes, source, target), 0.0, nbytes * self._rates_of_flat[key])

    @property
    def overlap(self) -> float:
        """Fraction of communication that hides behind compute on the least able device."""
        return min(place.device.overlap for place in self.places)


class _Curves:
    """Seconds of boxings as piecewise linear functions of bytes, one per pattern of placements.

    Two boxings have one curve if renaming dims other than the first makes them equal: S(2) -> R costs what S(1) -> R does for
    as many bytes, as long as pieces are even. A boxing of several steps costs what its steps do.
    """

    SIZES = np.array([2.0**k for k in (10, 15, 19, 23, 27, 31)])

    def __init__(self, cluster: Cluster, mesh: Mesh):
        self.cluster, self.mesh = cluster, mesh
        self._numbers: dict[Placements, int] = {}
        self._placements: list[Placements] = []
        self._index = np.full((64, 64), -1, np.int64)
        self._patterns: dict[tuple[Placements, Placements], int] = {}
        self._steps: dict[tuple[str, int, bool, tuple[int, ...]], NDArray[np.float64]] = {}
        self._recuts: dict[_Move, NDArray[np.float64]] = {}
        self._values = np.zeros((0, len(self.SIZES)))

    def table(self, sources: Sequence[Placements], targets: Sequence[Placements], nbytes: float) -> NDArray[np.float64]:
        """Seconds for a value of `nbytes` bytes from each source to each target."""
        rows, columns = [self._number(p) for p in sources], [self._number(p) for p in targets]
        grid = np.ix_(rows, columns)
        chosen = self._index[grid]
        if (chosen < 0).any():
            for i, j in np.argwhere(chosen < 0):
                self._index[rows[i], columns[j]] = self._curve(self._placements[rows[i]], self._placements[columns[j]])
            chosen = self._index[grid]
        return self._at(nbytes)[chosen]

    def _at(self, nbytes: float) -> NDArray[np.float64]:
        """Seconds of every curve for a size; beyond the last size in proportion."""
        high = int(np.clip(np.searchsorted(self.SIZES, nbytes), 1, len(self.SIZES) - 1))
        low_size, high_size = self.SIZES[high - 1], self.SIZES[high]
        share = max(0.0, (nbytes - low_size) / (high_size - low_size))
        return self._values[:, high - 1] * (1.0 - share) + self._values[:, high] * share

    def _number(self, placements: Placements) -> int:
        number = self._numbers.get(placements)
        if number is None:
            number = self._numbers[placements] = len(self._placements)
            self._placements.append(placements)
            if number >= len(self._index):
                grown = np.full((2 * number, 2 * number), -1, np.int64)
                grown[:number, :number] = self._index
                self._index = grown
        return number

    def _curve(self, source: Placements, target: Placements) -> int:
        """Number of the pair's curve, which is computed on a stand-in: a tensor with just the dims that the pair cuts."""
        pattern = stand_ins(source, target)
        if pattern not in self._patterns:
            values = self._measure(*pattern)
            self._patterns[pattern] = len(self._values)
            self._values = np.vstack([self._values, values])
        return self._patterns[pattern]

    def _measure(self, source: Placements, target: Placements) -> NDArray[np.float64]:
        """Seconds at every size of a pair of stand-ins: the sum over its steps."""
        total = np.zeros(len(self.SIZES))
        for step in _path(source, target):
            if step.kind == "recut":
                if step not in self._recuts:
                    self._recuts[step] = self._recut(step)
                total += self._recuts[step]
            else:
                others = tuple(axis for axis, p in enumerate(step.before) if axis != step.axis and isinstance(p, Shard))
                ends = (step.before[step.axis], step.after[step.axis])
                key = (step.kind, step.axis, any(isinstance(p, Shard) and p.dim > 0 for p in ends), others)
                if key not in self._steps:
                    self._steps[key] = self._step(*key)
                total += self._steps[key]
        return total

    def _step(self, kind: str, axis: int, strided: bool, others: tuple[int, ...]) -> NDArray[np.float64]:
        """A step along an axis of a value that is cut over the other axes, each on a dim of its own.

        `strided`: what the step cuts, or what it puts together, is not the first dim.
        """
        cut = Shard(int(strided))
        ends: dict[str, tuple[Placement, Placement]] = {
            "all_gather": (cut, Replicate()),
            "reduce_scatter": (Partial(), cut),
            "all_reduce": (Partial(), Replicate()),
            "all_to_all": (Shard(0), Shard(1)),
            "keep": (Replicate(), Partial()),
            "pad": (cut, Partial()),
            "scale": (Partial(), Partial("avg")),
        }
        pair: list[list[Placement]] = [[Replicate()] * self.mesh.ndim for _ in range(2)]
        for placements, end in zip(pair, ends[kind], strict=True):
            placements[axis] = end
            for dim, other in enumerate(others, start=2):
                placements[other] = Shard(dim)
        granule, ndim = 4 * self.mesh.size, 2 + len(others)  # every cut is even
        values = []
        for size in self.SIZES:
            rows = granule * max(1, round((size / granule**ndim) ** (1.0 / ndim)))
            shape, numel = (rows,) * ndim, float(rows) ** ndim
            cost = boxing_cost(tuple(pair[0]), tuple(pair[1]), shape, 1, self.mesh, self.cluster).seconds
            values.append((numel, cost))
        return np.interp(self.SIZES, *zip(*sorted(set(values)), strict=True))

    def _recut(self, step: _Move) -> NDArray[np.float64]:
        """As `boxing_cost` has it: an all-to-all that moves as much per device as the one that lacks most."""
        both = [p for p in (*step.before, *step.after) if isinstance(p, Shard)]
        shape = (16 * self.mesh.size,) * (1 + max(p.dim for p in both))
        axes = [axis for axis, p in enumerate(step.before) if isinstance(p, Shard)]
        here = [range(p) if axis in axes else (0,) for axis, p in enumerate(self.mesh.shape)]
        ranks = tuple(self.mesh.at(position) for position in itertools.product(*here))
        p = len(ranks)
        most = float(np.max(lacking(step.before, step.after, self.mesh, shape)))
        fraction = most / float(np.prod(shape)) * p * p / max(1, p - 1)
        lines = self.mesh.size // p  # at work at the same time, over the same links where those are shared
        wire = [collectives.all_to_all(self.cluster, ranks, size * fraction, concurrent=lines) for size in self.SIZES]
        return np.array(wire) + self.SIZES * fraction * in_memory("all_to_all", p, True, self.cluster, self.mesh)


@dataclass(frozen=True)
class _Move:
    """A step of a path of stand-ins; `axis` is -1 for a recut."""

    kind: str
    axis: int
    before: Placements
    after: Placements


def stand_ins(source: Placements, target: Placements) -> tuple[Placements, Placements]:
    """The pair with its dims but the first numbered in order of appearance, and units and blocks as small as tell them apart.

    The first dim stays what it is: its pieces are contiguous.
    """
    dims: dict[int, int] = {0: 0}
    cuts: dict[int, dict[tuple[int, int], int]] = {}

    def stand_in(p: Placement) -> Placement:
        if not isinstance(p, Shard):
            return p
        dim = dims.setdefault(p.dim, len(dims))
        kinds = cuts.setdefault(dim, {})
        kind = kinds.setdefault((p.unit, p.blocks), len(kinds))
        return Shard(dim, p.weights, *((1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2))[min(kind, 5)])

    return tuple(map(stand_in, source)), tuple(map(stand_in, target))


@lru_cache(maxsize=1 << 14)
def _path(source: Placements, target: Placements) -> tuple[_Move, ...]:
    """The steps of a boxing of stand-ins, those that cost nothing left out.

    Found on two devices per axis, for every mesh: which path has least bytes hardly depends on their number.
    """
    ndim = 1 + max((p.dim for p in (*source, *target) if isinstance(p, Shard)), default=0)
    mesh = Mesh((2,) * len(source))
    granule = 16 * mesh.size
    shape = (granule * max(1, round(2 ** (22 / ndim) / granule)),) * ndim

    def plain(placements: Placements) -> Placements:
        return tuple(Shard(p.dim, None, p.unit, p.blocks) if isinstance(p, Shard) else p for p in placements)

    path = steps(plain(source), plain(target), mesh, shape)
    return tuple(
        _Move(step.kind, step.axis, step.before, step.after) for step in path if step.elements or step.kind in LOCAL
    )


def _dual(placements: Placements) -> Placements:
    return tuple(dual(p) for p in placements)


def _flat(placements: Placements) -> Placements:
    return tuple(Shard(0, p.weights) if isinstance(p, Shard) else p for p in placements)


def _cut_of(signature: Signature) -> tuple[str, int] | None:
    for number, placement in enumerate(signature.outputs):
        if isinstance(placement, Shard):
            return "out", number
    for number, placement in enumerate(signature.inputs):
        if isinstance(placement, Shard):
            return "in", number
    return None


def _cuts_link(signature: Signature, link) -> bool:
    ends = [(signature.inputs, p) for p in link.inputs] + [(signature.outputs, p) for p in link.outputs]
    return bool(ends) and all(
        isinstance(side[p.operand], Shard) and side[p.operand].dim == p.dim for side, p in ends if p.operand < len(side)
    )


def _places(cluster: Cluster, mesh: Mesh) -> tuple[Place, ...]:
    """Classes of devices: by kind and rates, and by position where pieces may differ from the first one's."""
    positions = mesh.positions()
    devices = {rank: cluster.devices[rank] for rank in mesh.ranks}
    kinds = {(d.kind, d.memory, d.overlap, d.offload, d.step, repr(d.rates)) for d in devices.values()}
    if len(kinds) == 1 and not any(mesh.weights):
        return (Place(mesh.at(positions[0]), positions[0], devices[mesh.at(positions[0])], mesh.ranks),)
    groups: dict[tuple, list[tuple[int, ...]]] = {}
    for position in positions:
        device = devices[mesh.at(position)]
        shares = tuple(w[i] if w else None for w, i in zip(mesh.weights, position, strict=True))
        alike = (device.kind, device.memory, device.offload, device.step, repr(device.rates), shares)
        groups.setdefault(alike, []).append(position)
    return tuple(
        Place(mesh.at(group[0]), group[0], devices[mesh.at(group[0])], tuple(mesh.at(p) for p in group))
        for group in groups.values()
    )
