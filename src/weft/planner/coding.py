"""Gradients by an exchange of `weft.comm`, priced.

Problem    a code saves seconds on the wire and costs seconds of the processor; whether data parallelism with it beats a placement
           that sends less, the search can only know if a bucket of gradients has its coded price.
Method     a bucket of tensors travels as one message over the link on which a ring of devices along the exchange's axes costs
           what an all-reduce does (`cluster.costs.ring_link`), in the slowest of the groups side by side: latencies and bytes
           as the exchange says (`Exchange.wire`), to whole results or to pieces (ZeRO). Codec seconds are compute, and memories
           bytes that stay, both as tried on this machine's processor (`comm.automatic.tried`) and taken in proportion to the
           elements that are coded.                                                                              `Coding.price`
           The search's tables are made for some axes at a time, with a bucket's share of latencies for a parameter, and without
           storage that the exchange could not carry along them: its plans are those that it carries.    `fits`, `Coding.choices`
Guarantee  priced so is exactly what `weft.run` sends so: gradients that are all summed along some mesh axes. Where a plan has
           others, an exchange is refused there, and none of its buckets is priced as coded here.       `carries`, `Coding.axes`
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, final

import numpy as np

from weft.cluster.costs import ring_link
from weft.graph.graph import Graph, TensorSpec
from weft.placement.boxing_cost import unlike_lines
from weft.placement.layout import Mesh, Partial, Placements, Replicate, Shard, local_shape
from weft.placement.parameters import Owed

if TYPE_CHECKING:
    from weft.cluster import Cluster, Link
    from weft.comm import Exchange, Spec
    from weft.placement.assignment import ParameterPlacement
    from weft.planner.costs import Costs

__all__ = ["Coded", "Coding", "Summed", "carries", "described", "fits", "in_pieces"]

Summed = tuple[tuple[int, ...], tuple[int, ...]]
"""Mesh axes over which a gradient is summed and cut, and over which it is summed and kept whole."""


@dataclass(frozen=True)
class Coded:
    """A bucket's price: seconds on the wire, of codecs, bytes on the wire over all links, bytes kept between steps."""

    wire: float
    codec: float
    nbytes: float
    kept: float


@final
@dataclass(eq=False)
class Coding:
    """An exchange as the cost model sees it, for the gradients of one graph.

    Attributes:
        exchange: of the user.
        specs: all gradients, whole.
        cluster: that they travel through.
        link: in place of what the cluster says.
    """

    exchange: Exchange
    specs: tuple[Spec, ...]
    cluster: Cluster
    link: Link | None = None
    _links: dict[tuple[Mesh, tuple[int, ...]], list[Link]] = field(default_factory=dict)
    _tried: dict[int, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, exchange: Exchange, graph: Graph, cluster: Cluster, link: Link | None = None) -> Coding:
        nodes = {name: node.outputs[0] for name, node in graph.parameters.items()}
        return cls(exchange, gradients(nodes.items()), cluster, link)

    def axes(self, owed: Iterable[Summed | None], mesh: Mesh) -> tuple[int, ...]:
        """Mesh axes over which this exchange carries gradients that are owed so, () if it cannot; see `carries`."""
        found = carries(owed)
        return found if self._may(found, mesh) else ()

    def choices(self, mesh: Mesh) -> list[tuple[int, ...]]:
        """All sets of axes over which it may carry gradients on a mesh."""
        long = [axis for axis, size in enumerate(mesh.shape) if size > 1]
        sets = (axes for count in range(len(long), 0, -1) for axes in itertools.combinations(long, count))
        return [axes for axes in sets if self._may(axes, mesh)]

    def _may(self, axes: tuple[int, ...], mesh: Mesh) -> bool:
        return math.prod(mesh.shape[axis] for axis in axes) == mesh.size or not self.exchange.one_group

    def name_of(self, spec: TensorSpec) -> str:
        """Of the first parameter of a shape and dtype."""
        return next(own.name for own in self.specs if (own.shape, own.dtype) == (tuple(spec.shape), spec.dtype))

    def reduce(
        self,
        specs: Mapping[str, TensorSpec],
        placements: Sequence[ParameterPlacement],
        axes: tuple[int, ...],
        costs: Costs,
        share: float = 1.0,
    ) -> Coded:
        """Of parameters whose gradients travel together: along some mesh axes by the exchange, along the others before as ever.

        Args:
            specs, placements: by name, and in the same order; they are owed the same.
            axes: that fit.
            share: of what travels together that these are; latencies count in proportion.
        """
        mesh, used, cut = costs.mesh, placements[0].used, in_pieces(placements[0])
        scattered = Owed.of(placements[0], mesh.shape).scatter_axes
        cut_first = bool(scattered) and scattered != axes
        nbytes = sum(
            s.nbytes * costs.fraction(s.shape, p.used) for s, p in zip(specs.values(), placements, strict=True)
        )
        fullest = costs.places[int(np.argmax(nbytes))].position
        held = [in_pieces(p) if cut_first else p.used for p in placements]
        local = [local_shape(s.shape, p, mesh, fullest) for s, p in zip(specs.values(), held, strict=True)]
        price = self.price(gradients(specs.items(), local), mesh, axes, scattered == axes, share)
        rest: Placements = tuple(
            Partial() if isinstance(u, Replicate) and axis not in axes else u for axis, u in enumerate(used)
        )
        numel, size = sum(spec.numel for spec in specs.values()), next(iter(specs.values())).dtype.itemsize
        first = costs.flat(numel / share, size, rest, cut if cut_first else used)
        return Coded(price.wire + share * first.forward, price.codec, price.nbytes + share * first.nbytes, price.kept)

    def price(
        self, specs: Sequence[Spec], mesh: Mesh, axes: tuple[int, ...], scatter: bool, share: float = 1.0
    ) -> Coded:
        """Of local tensors that travel together along some mesh axes; `scatter`: each device wants a piece."""
        n = math.prod(mesh.shape[axis] for axis in axes)
        hops, nbytes = self.exchange.wire(specs, n, scatter)
        seconds, kept = self._per_element(n)
        coded = sum(spec.numel for spec in specs if self.exchange.select(spec))
        wire = max(hops * share * link.latency + nbytes / link.bandwidth for link in self._along(mesh, axes))
        return Coded(wire, seconds * coded, mesh.size * nbytes, kept * coded + 2 * nbytes)

    def _along(self, mesh: Mesh, axes: tuple[int, ...]) -> list[Link]:
        if self.link is not None:
            return [self.link]
        if (mesh, axes) not in self._links:
            lines = unlike_lines(mesh, axes, self.cluster)
            self._links[mesh, axes] = [ring_link(self.cluster, line, concurrent=together) for line, together in lines]
        return self._links[mesh, axes]

    def _per_element(self, ranks: int) -> tuple[float, float]:
        """Codec seconds and bytes kept per coded element, tried once per number of ranks."""
        from weft.comm.automatic import tried

        if ranks not in self._tried:
            coded = sum(spec.numel for spec in self.specs if self.exchange.select(spec))
            seconds, kept = tried(self.exchange, self.specs, ranks)
            self._tried[ranks] = (seconds / max(coded, 1), kept / max(coded, 1))
        return self._tried[ranks]


def gradients(
    named: Iterable[tuple[str, TensorSpec]], local: Iterable[Sequence[int] | None] = repeat(None)
) -> tuple[Spec, ...]:
    """What an exchange is told of the gradients of some parameters; `local`: shapes of the parts that a device has."""
    from weft.comm import Spec

    return tuple(
        Spec(name, tuple(spec.shape if shape is None else shape), spec.dtype)
        for (name, spec), shape in zip(named, local, strict=False)
        if spec.requires_grad
    )


def carries(owed: Iterable[Summed | None]) -> tuple[int, ...]:
    """Mesh axes over which an exchange may carry gradients that are owed so (None: to nobody); () if it cannot.

    Each of the gradients must be summed along all of them, so that one exchange takes them all, and be wanted

        whole, or in pieces along just these axes    then along the rest of its own axes it is summed as it is, before
        in pieces along other axes alone             then it is cut along those before, and each piece is carried by itself

    Of the sets of axes that will do it is the largest, and of equally large ones the first: outer axes have the slower links.

    >>> carries([((), (0,)), ((), (0, 1))]), carries([((), (0,)), ((), (1,))])  # data x tensor parallel; nothing in common
    ((0,), ())
    >>> carries([((1,), (0,)), ((), (0, 1))])  # data parallel x ZeRO: pieces along the first
    (0,)
    """
    found = {one or ((), ()) for one in owed}
    common = sorted(set.intersection(*({*cut, *summed} for cut, summed in found))) if found else []
    for count in range(len(common), 0, -1):
        for axes in itertools.combinations(common, count):
            if all(fits(one, axes) for one in found):
                return axes
    return ()


def fits(owed: Summed, axes: tuple[int, ...]) -> bool:
    """Whether an exchange along these axes may carry a gradient that is owed so."""
    cut, summed = owed
    return {*axes} <= {*cut, *summed} and (cut == axes or not {*cut} & {*axes})


def in_pieces(placement: ParameterPlacement) -> Placements:
    """As used, but cut where the optimizer's state is."""
    return tuple(
        s if isinstance(u, Replicate) and isinstance(s, Shard) else u
        for u, s in zip(placement.used, placement.state, strict=True)
    )


def described(options: str) -> str:
    """An exchange's options (`Exchange.options`, one a line) in one line: what of them says something."""
    words = dict(line.split(" ", 1) for line in options.splitlines() if " " in line)
    said = [
        words[key]
        for key in ("codec", "memory", "combine", "topology", "controller")
        if words.get(key, "None") != "None"
    ]
    return ", ".join(word for word in said if word not in ("NoMemory()", "Mean()"))
