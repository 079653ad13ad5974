"""Which cuts of each dim the operators of a graph can carry on, and the signatures that follow.

Problem    a dim of n elements can be cut in units and blocks (see `layout`). After `view(b, t, heads, 8)` a cut is only usable
           if heads stay whole (unit 8); a projection that `split(3)` takes apart must be cut in each third (blocks 3); the
           b * t rows that `view(-1, d)` makes can be cut by b (unit t) or by t (blocks b).
Method     every link of every row ties dims of a node's operands and outputs to one index. Start from the plain cut
           (1, 1) of every dim and carry cuts along links, both ways, until nothing new appears:        `find_cuts`
               cut (blocks b, unit u) of a dim seen as outer x m x inner is a cut (b / outer, u / inner) of m, where both divide
           then keep, per dim, only the coarsest that still give every device something:               `_keep`
           A signature of a node cuts one of its links by a cut that all the link's dims kept:          `signatures`
Guarantee  a cut found for a value is legal for each node whose row it came through; pieces of a cut are the same indices
           on both sides of a link, so that no communication is needed between nodes that agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from weft.errors import UnknownOperators
from weft.graph.graph import Graph, Node, Ref
from weft.placement.layout import Mesh, Placements, Replicate, Shard, deal, intervals
from weft.placement.probe import TooManyToProbe, probed_row
from weft.placement.rows import row_of
from weft.placement.signature import Call, Link, Position, Row, Signature, linear_signature, link_signature

__all__ = ["Cut", "Cuts", "find_cuts", "nests", "signatures"]

Cut = tuple[int, int]  # (blocks, unit)
_MOST_CUTS = 6  # per dim; the coarsest are kept. Real models need one or two.


@dataclass(frozen=True)
class Cuts:
    """Rows of a graph's calls, and the cuts worth considering for each dim of each value."""

    rows: Mapping[str, Row]
    table: Mapping[tuple[Ref, int], tuple[Cut, ...]]
    _cache: dict[tuple, tuple[Signature, ...]] = field(default_factory=dict, compare=False, repr=False)

    def of(self, ref: Ref, dim: int) -> tuple[Cut, ...]:
        """Kept cuts (blocks, unit) of a dim, best first; `((1, 1),)` where nothing constrains it, `()` for size 1."""
        return self.table.get((ref, dim), ())

    def shard(self, ref: Ref, dim: int, weights: tuple[float, ...] | None = None) -> Shard:
        """A user's `Shard(dim)` of a value, completed with the unit and blocks that the value's readers can carry on."""
        blocks, unit = (self.of(ref, dim) or ((1, 1),))[0]
        return Shard(dim, weights, unit, blocks)


def find_cuts(
    graph: Graph,
    finest: int = 2,
    *,
    allow_replicated: bool | Iterable[str] = False,
    rows: Mapping[str, Row] | None = None,
    probe: bool = True,
) -> Cuts:
    """The cuts that the operators of `graph` can carry on.

    Args:
        graph: a captured model.
        finest: number of pieces that a dim should still give (the size of the mesh): coarser cuts with fewer units do
            not displace finer ones.
        allow_replicated: operators without a row run whole on every device: True for all, or their names.
        rows: rows of some calls by node name, in place of the table's.
        probe: look for signatures of operators without a row by trying them (`probe.probed_row`; cached on disk).
    Raises:
        UnknownOperators: operators without a row that probing found no way to split, all of them at once, unless allowed.
    """
    found = _rows(graph, rows or {}, allow_replicated, probe)
    ends = [
        [(Ref(node.name, p.operand) if is_output else node.inputs[p.operand], p) for is_output, p in _positions(link)]
        for node in graph.calls
        for link in found[node.name].links
    ]
    touching: dict[tuple[Ref, int], list[int]] = {}
    for number, link_ends in enumerate(ends):
        for ref, position in link_ends:
            touching.setdefault((ref, position.dim), []).append(number)
    size = {key: graph.spec(key[0]).shape[key[1]] for key in touching}
    cuts: dict[tuple[Ref, int], dict[Cut, None]] = {key: {(1, 1): None} for key, n in size.items() if n > 1}
    pending = [(key, (1, 1)) for key in cuts]
    while pending:
        key, cut = pending.pop()
        for number in touching[key]:
            for ref, position in ends[number]:
                if (ref, position.dim) != key:
                    continue
                index_cut = _through(cut, position)
                if index_cut is None:
                    continue
                for other, there in ends[number]:
                    there_key = (other, there.dim)
                    carried = (index_cut[0] * there.outer, index_cut[1] * there.inner)
                    known = cuts.get(there_key)
                    if known is None or carried in known or len(known) > 4 * _MOST_CUTS:
                        continue
                    if size[there_key] % (carried[0] * carried[1]) == 0 and size[there_key] > carried[0] * carried[1]:
                        known[carried] = None
                        pending.append((there_key, carried))
    return Cuts(found, {key: _keep(size[key], tuple(known), finest) for key, known in cuts.items()})


def _rows(
    graph: Graph, given: Mapping[str, Row], allow_replicated: bool | Iterable[str], probe: bool
) -> dict[str, Row]:
    """The row of every call; a bare row (all Replicate) for unknown operators that the user allows."""
    allowed = allow_replicated if isinstance(allow_replicated, bool) else set(allow_replicated)
    found: dict[str, Row] = {}
    unknown: list[Node] = []
    for node in graph.calls:
        call = Call(node, tuple(graph.spec(ref) for ref in node.inputs))
        row = given.get(node.name) or row_of(call)
        if row is None and probe:
            row = _probed(call)
        if row is None:
            if not (allowed is True or (allowed is not False and {node.op, node.target} & allowed)):
                unknown.append(node)
            row = Row()
        found[node.name] = row
    if unknown:
        raise UnknownOperators(
            [
                (node.name, node.target, ", ".join(str(list(graph.spec(ref).shape)) for ref in node.inputs), node.where)
                for node in unknown
            ]
        )
    return found


def _probed(call: Call) -> Row | None:
    """What probing finds, or None where it finds no way to split the call (or may not try that many)."""
    try:
        row = probed_row(call)
    except (
        TooManyToProbe,
        ValueError,
        RuntimeError,
    ):  # the operator does not run on made-up operands, or says nothing there
        return None
    return row if row.links or row.extra else None


def _positions(link: Link) -> Iterator[tuple[bool, Position]]:
    for position in link.inputs:
        yield False, position
    for position in link.outputs:
        yield True, position


def _through(cut: Cut, position: Position) -> Cut | None:
    """A dim's cut as a cut of the link's index, or None where the cut is not one of that index alone."""
    blocks, unit = cut
    if blocks % position.outer or unit % position.inner:
        return None
    return blocks // position.outer, unit // position.inner


def _keep(size: int, cuts: tuple[Cut, ...], finest: int) -> tuple[Cut, ...]:
    """Cuts not displaced by one that more nodes can carry on, largest units first.

    A cut goes if another with the same blocks has a multiple of its unit and still `finest` units; the plain cut goes
    if any other has `finest` units.
    """

    def displaced(cut: Cut) -> bool:
        return any(
            other != cut
            and size // (other[0] * other[1]) >= finest
            and (cut == (1, 1) or (other[0] == cut[0] and other[1] > cut[1] and other[1] % cut[1] == 0))
            for other in cuts
        )

    kept = [cut for cut in cuts if not displaced(cut)]
    return tuple(sorted(kept, key=lambda cut: (-(size // (cut[0] * cut[1]) >= finest), cut[0], -cut[1]))[:_MOST_CUTS])


def signatures(
    graph: Graph,
    node: Node,
    parts: int,
    cuts: Cuts,
    weights: tuple[float, ...] | None = None,
    *,
    allow_empty: bool = False,
) -> tuple[Signature, ...]:
    """All signatures of a call along a mesh axis of `parts` devices; the first is all Replicate.

    Args:
        graph, node: the call.
        parts: devices along the axis, >= 1.
        cuts: `find_cuts(graph)`.
        weights: the axis's weights, to leave out cuts that give a device nothing.
        allow_empty: keep cuts that leave some device without elements.
    """
    key = (node.name, parts, weights, allow_empty)
    if key not in cuts._cache:
        cuts._cache[key] = tuple(dict.fromkeys(_signatures(graph, node, parts, cuts, weights, allow_empty)))
    return cuts._cache[key]


def _signatures(
    graph: Graph, node: Node, parts: int, cuts: Cuts, weights: tuple[float, ...] | None, allow_empty: bool
) -> Iterator[Signature]:
    row = cuts.rows[node.name]
    call = Call(node, tuple(graph.spec(ref) for ref in node.inputs))
    yield Signature((Replicate(),) * len(node.inputs), (Replicate(),) * len(node.outputs))
    for link in row.links:
        for blocks, unit in _index_cuts(graph, node, link, cuts, parts, weights, allow_empty):
            yield link_signature(call, row, link, blocks, unit)
    for group in row.linear:
        yield linear_signature(call, row, group)
    yield from row.extra


def _index_cuts(
    graph: Graph, node: Node, link: Link, cuts: Cuts, parts: int, weights: tuple[float, ...] | None, allow_empty: bool
) -> Iterator[Cut]:
    """Cuts of a link's index that every dim it ties has kept, and that give every device something."""
    ends = [
        (Ref(node.name, p.operand) if is_output else node.inputs[p.operand], p) for is_output, p in _positions(link)
    ]
    ref, position = ends[0]
    extent = graph.spec(ref).shape[position.dim] // (position.outer * position.inner)
    for cut in cuts.of(ref, position.dim):
        index_cut = _through(cut, position)
        if index_cut is None or (link.contiguous and index_cut[0] > 1) or extent % (index_cut[0] * index_cut[1]):
            continue
        if link.contiguous and any(p.outer > 1 for _, p in ends):
            continue
        units = extent // (index_cut[0] * index_cut[1])
        if not allow_empty and min(deal(units, parts, weights)) == 0:
            continue
        b, u = index_cut
        if all((b * there.outer, u * there.inner) in cuts.of(other, there.dim) for other, there in ends):
            yield index_cut


def nests(shape: tuple[int, ...], placements: Placements, mesh: Mesh, *, allow_empty: bool = False) -> bool:
    """Whether placements that are legal axis by axis are legal together: cuts of one dim over several axes agree in unit
    and blocks, and leave every device something (unless `allow_empty`)."""
    cut: dict[int, list[Shard]] = {}
    for placement in placements:
        if isinstance(placement, Shard):
            cut.setdefault(placement.dim, []).append(placement)
    for dim, shards in cut.items():
        if len({(s.unit, s.blocks) for s in shards}) > 1:
            return False
        if len(shards) > 1 and not allow_empty:
            held = (intervals(shape[dim], dim, placements, mesh, position) for position in mesh.positions())
            if any(start == stop for ranges in held for start, stop in ranges):
                return False
    return True
