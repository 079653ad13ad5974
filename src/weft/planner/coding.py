"""Gradients by an exchange of `weft.comm`, priced.

Problem    a code saves seconds on the wire and costs seconds of the processor; whether data parallelism with it beats a placement
           that sends less, the search can only know if a bucket of gradients has its coded price.
Method     a bucket of tensors travels as one message over the link on which a ring of devices along the exchange's axes costs
           what an all-reduce does (`cluster.costs.ring_link`), in the slowest of the groups side by side: latencies and bytes
           as the exchange says (`Exchange.wire`), to whole results or to pieces (ZeRO). Codec seconds are compute, and memories
           bytes that stay, both as tried on this machine's processor (`comm.automatic.tried`) and taken in proportion to the
           elements that are coded.                                                                              `Coding.price`
Guarantee  priced so is exactly what `weft.run` sends so: gradients that are all summed along some mesh axes. Where a plan has
           others, an exchange is refused there, and none of its buckets is priced as coded here.       `carries`, `Coding.axes`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, final

from weft.cluster.costs import ring_link
from weft.graph.graph import Graph, TensorSpec
from weft.placement.boxing_cost import unlike_lines
from weft.placement.layout import Mesh

if TYPE_CHECKING:
    from weft.cluster import Cluster, Link
    from weft.comm import Exchange, Spec

__all__ = ["Coded", "Coding", "carries", "described"]

Owed = tuple[tuple[int, ...], tuple[int, ...]]
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

    def axes(self, owed: Iterable[Owed | None], mesh: Mesh) -> tuple[int, ...]:
        """Mesh axes over which this exchange carries gradients that are owed so, () if it cannot; see `carries`."""
        found = carries(owed)
        whole = math.prod(mesh.shape[axis] for axis in found) == mesh.size
        return found if whole or not self.exchange.one_group else ()

    def price(self, specs: Sequence[Spec], mesh: Mesh, axes: tuple[int, ...], scatter: bool) -> Coded:
        """Of local tensors that travel together along some mesh axes; `scatter`: each device wants a piece."""
        n = math.prod(mesh.shape[axis] for axis in axes)
        hops, nbytes = self.exchange.wire(specs, n, scatter)
        seconds, kept = self._per_element(n)
        coded = sum(spec.numel for spec in specs if self.exchange.select(spec))
        wire = max(hops * link.latency + nbytes / link.bandwidth for link in self._along(mesh, axes))
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


def carries(owed: Iterable[Owed | None]) -> tuple[int, ...]:
    """Mesh axes over which an exchange may carry gradients that are owed so (None: to nobody); () if it cannot.

    They are those along which each of the gradients is summed, so that one exchange takes them all; along the rest of its own
    axes a gradient is summed as it is, before. It must be wanted whole, or in pieces along just these axes.

    >>> carries([((), (0,)), ((), (0, 1))]), carries([((), (0,)), ((), (1,))])  # data x tensor parallel; nothing in common
    ((0,), ())
    """
    found = {one or ((), ()) for one in owed}
    axes = tuple(sorted(set.intersection(*({*cut, *summed} for cut, summed in found)))) if found else ()
    return axes if all(cut in ((), axes) for cut, _ in found) else ()


def described(options: str) -> str:
    """An exchange's options (`Exchange.options`, one a line) in one line: what of them says something."""
    words = dict(line.split(" ", 1) for line in options.splitlines() if " " in line)
    said = [
        words[key]
        for key in ("codec", "memory", "combine", "topology", "controller")
        if words.get(key, "None") != "None"
    ]
    return ", ".join(word for word in said if word not in ("NoMemory()", "Mean()"))
