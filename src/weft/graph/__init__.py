"""A model as an operator graph: operators, FLOPs, bytes, parameters, dependencies.

    capture        the graph of an `nn.Module` with its loss on one batch
    Graph, Node    what it is made of
    save, load     as a JSON file; graph_fingerprint tells models apart whatever the batch sizes
    reprice        with costs of another type of device; unpriced lists calls whose cost is a guess
    call           how a batch reaches model and loss; flatten_batch, check_batch take one apart and compare it
    interpret      run a graph operator by operator on one device: the oracle of tests

Imports nothing of weft but `names` and `errors`.
"""

from weft.graph.batch import call, check_batch, flatten_batch, unflatten_batch
from weft.graph.capture import capture
from weft.graph.cost import reprice, unpriced
from weft.graph.graph import Cost, Graph, Node, Ref, Repeat, TensorSpec, map_refs, refs_in
from weft.graph.interpret import interpret
from weft.graph.rewrite import operator
from weft.graph.serial import from_json, graph_fingerprint, load, save, to_json

__all__ = [
    "Cost", "Graph", "Node", "Ref", "Repeat", "TensorSpec", "call", "capture", "check_batch", "flatten_batch", "from_json",
    "graph_fingerprint", "interpret", "load", "map_refs", "operator", "refs_in", "reprice", "save", "to_json",
    "unflatten_batch", "unpriced",
]  # fmt: skip
