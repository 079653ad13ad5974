"""What a cut means to people: the batch, the sequence, or the model itself.

The batch is dim 0 of every leaf of the batch that has as many entries there as the others. The sequence is dim 1 of leaves of
token ids (batch, sequence) and of features (batch, sequence, d), and dim 2 of images (batch, channels, height, width). Both are
followed through the graph along signatures: one that shards a followed dim of any operand shards the same index everywhere.

    role of a signature      batch | sequence | tensor (another index) | partial | whole
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from weft.graph.graph import Graph, Node, Ref
from weft.placement.layout import Partial, Shard
from weft.placement.signature import Signature
from weft.planner.prepared import Call, Prepared

__all__ = ["Role", "Roles", "batch_size"]

Role = Literal["batch", "sequence", "tensor", "partial", "whole"]
_Cut = tuple[Ref, int, int, int]  # a value, dim, unit, blocks


def batch_size(graph: Graph) -> int:
    """Entries of dim 0 that most leaves of the batch share; 0 if there is no such dim."""
    sizes = Counter(node.outputs[0].shape[0] for node in graph.of("input") if node.outputs[0].shape)
    return sizes.most_common(1)[0][0] if sizes else 0


class Roles:
    """Which cuts belong to the batch and which to the sequence, in one graph.

    Followed through the signatures for two devices: cuts that are legal for more are among those.
    """

    def __init__(self, prepared: Prepared):
        ties: dict[_Cut, list[tuple[_Cut, ...]]] = {}
        for call in prepared.calls:
            for signature in prepared.signatures(call, 2, None)[0]:
                tied = _cuts_in(call, signature)
                for cut in tied:
                    ties.setdefault(cut, []).append(tied)
        size = batch_size(prepared.graph)
        leaves = [
            node for node in prepared.graph.of("input") if node.outputs[0].shape and node.outputs[0].shape[0] == size
        ]
        wanted = {Ref(node.name): _sequence_dim(node) for node in leaves}
        self.batch = _follow([cut for cut in ties if cut[0] in wanted and cut[1] == 0], ties)
        self.sequence = _follow([cut for cut in ties if wanted.get(cut[0]) == cut[1]], ties) - self.batch
        self._known: dict[tuple[str, int], tuple[Signature, Role]] = {}

    def of_signature(self, call: Call, signature: Signature) -> Role:
        """What a signature of a call cuts. Known ones are found by identity."""
        key = (call.node.name, id(signature))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = (signature, self._role(call, signature))
        return found[1]

    def _role(self, call: Call, signature: Signature) -> Role:
        cuts = _cuts_in(call, signature)
        if any(cut in self.batch for cut in cuts):
            return "batch"
        if any(cut in self.sequence for cut in cuts):
            return "sequence"
        if cuts:
            return "tensor"
        return "partial" if any(isinstance(p, Partial) for p in (*signature.inputs, *signature.outputs)) else "whole"


def _cuts_in(call: Call, signature: Signature) -> tuple[_Cut, ...]:
    found = [(ref, p) for ref, p in zip(call.inputs, signature.inputs, strict=True)]
    found += [(ref, p) for ref, p in zip(call.values, signature.outputs, strict=True)]
    return tuple(dict.fromkeys((ref, p.dim, p.unit, p.blocks) for ref, p in found if isinstance(p, Shard)))


def _sequence_dim(node: Node) -> int:
    spec = node.outputs[0]
    if len(spec.shape) == 4:
        return 2
    return 1 if len(spec.shape) in (2, 3) and (len(spec.shape) == 3 or not spec.dtype.is_floating_point) else -1


def _follow(start: list[_Cut], ties: dict[_Cut, list[tuple[_Cut, ...]]]) -> set[_Cut]:
    found, pending = set(start), list(start)
    while pending:
        for tied in ties.get(pending.pop(), ()):
            for cut in tied:
                if cut not in found:
                    found.add(cut)
                    pending.append(cut)
    return found
