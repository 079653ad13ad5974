"""Gradients by an exchange of `weft.comm`, priced.

Problem    a code saves seconds on the wire and costs seconds of the processor; whether data parallelism with it beats a placement
           that sends less, the search can only know if a bucket of gradients has its coded price.
Method     a bucket of tensors travels as one message over the link on which a ring of the mesh's devices costs what an all-reduce
           does (`cluster.costs.ring_link`): latencies and bytes as the exchange says (`Exchange.wire`), to whole results or to
           pieces (ZeRO). Codec seconds are compute, and memories bytes that stay, both as tried on this machine's processor
           (`comm.automatic.tried`) and taken in proportion to the elements that are coded.                      `Coding.price`
Guarantee  priced so is exactly what `weft.run` sends so: gradients that all devices of the mesh sum. Where a plan has others,
           an exchange is refused there, and none of its buckets is priced as coded here.                        `carries`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from weft.cluster.costs import ring_link
from weft.graph.graph import Graph, TensorSpec

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
    _links: dict[tuple[int, ...], Link] = field(default_factory=dict)
    _tried: dict[int, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, exchange: Exchange, graph: Graph, cluster: Cluster, link: Link | None = None) -> Coding:
        nodes = {name: node.outputs[0] for name, node in graph.parameters.items()}
        return cls(exchange, gradients(nodes.items()), cluster, link)

    def price(self, specs: Sequence[Spec], ranks: tuple[int, ...], scatter: bool) -> Coded:
        """Of tensors that travel together between devices of the cluster; `scatter`: each wants a piece."""
        n, link = len(ranks), self._link(ranks)
        hops, nbytes = self.exchange.wire(specs, n, scatter)
        seconds, kept = self._per_element(n)
        coded = sum(spec.numel for spec in specs if self.exchange.select(spec))
        return Coded(
            hops * link.latency + nbytes / link.bandwidth, seconds * coded, n * nbytes, kept * coded + 2 * nbytes
        )

    def _link(self, ranks: tuple[int, ...]) -> Link:
        if self.link is None and ranks not in self._links:
            self._links[ranks] = ring_link(self.cluster, ranks)
        return self.link or self._links[ranks]

    def _per_element(self, ranks: int) -> tuple[float, float]:
        """Codec seconds and bytes kept per coded element, tried once per number of ranks."""
        from weft.comm.automatic import tried

        if ranks not in self._tried:
            coded = sum(spec.numel for spec in self.specs if self.exchange.select(spec))
            seconds, kept = tried(self.exchange, self.specs, ranks)
            self._tried[ranks] = (seconds / max(coded, 1), kept / max(coded, 1))
        return self._tried[ranks]


def gradients(named: Iterable[tuple[str, TensorSpec]]) -> tuple[Spec, ...]:
    """What an exchange is told of the gradients of some parameters."""
    from weft.comm import Spec

    return tuple(Spec(name, tuple(spec.shape), spec.dtype) for name, spec in named if spec.requires_grad)


def carries(owed: Iterable[Owed | None], shape: Sequence[int]) -> bool:
    """Whether an exchange may carry gradients that are owed so (None: to nobody) on a mesh: all devices sum each of them."""
    everybody = tuple(axis for axis, size in enumerate(shape) if size > 1)
    found = set(owed)
    return bool(everybody) and bool(found) and found <= {((), everybody), (everybody, ())}


def described(options: str) -> str:
    """An exchange's options (`Exchange.options`, one a line) in one line: what of them says something."""
    words = dict(line.split(" ", 1) for line in options.splitlines() if " " in line)
    said = [
        words[key]
        for key in ("codec", "memory", "combine", "topology", "controller")
        if words.get(key, "None") != "None"
    ]
    return ", ".join(word for word in said if word not in ("NoMemory()", "Mean()"))
