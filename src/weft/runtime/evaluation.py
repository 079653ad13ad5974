"""Placements for the model in evaluation mode, from a plan made for training.

In evaluation a graph lacks the dropouts and the counters of batch norms, and is otherwise the same: `without_training` takes
those out of the planned graph, and the plan's decisions carry over operator by operator. A model that computes something
else altogether when it is evaluated runs whole on every process: slower, and right.
"""

from __future__ import annotations

from dataclasses import replace

from weft.graph.graph import Graph, Ref, map_refs
from weft.placement.assignment import Assignment, refit, replicated

__all__ = ["for_evaluation", "without_training"]

DROPOUTS = frozenset(
    {"dropout", "dropout_", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"}
)


def for_evaluation(assignment: Assignment, planned: Graph, graph: Graph) -> Assignment:
    """An assignment for `graph`, captured in evaluation mode, of the model that `planned` is the training graph of."""
    try:
        return refit(assignment, without_training(planned), graph)
    except ValueError:
        whole = replicated(graph, assignment.mesh)
        return replace(whole, parameters=assignment.parameters, buffers=assignment.buffers)


def without_training(graph: Graph) -> Graph:
    """The graph without what only training does: dropout passes its input on, and buffers are not counted up."""
    passed: dict[Ref, Ref] = {}
    nodes = []
    for node in graph.nodes:
        if node.role == "call" and node.op in DROPOUTS:
            passed[Ref(node.name)] = passed.get(node.inputs[0], node.inputs[0])
        elif node.role == "call" and node.mutates and node.op in ("add_", "copy_"):
            continue
        else:
            args, kwargs = map_refs((node.args, dict(node.kwargs)), lambda ref: passed.get(ref, ref))
            nodes.append(replace(node, args=args, kwargs=kwargs))
    return replace(graph, nodes=tuple(nodes), loss=passed.get(graph.loss, graph.loss), repeats=())
