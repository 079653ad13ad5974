"""Rows of recurrent layers: the batch. Every step mixes all hidden units through all weights, so that these stay whole.

lstm(x, [h0, c0], weights, has_biases, num_layers, dropout, train, bidirectional, batch_first), gru and rnn(x, h0, weights, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.graph.rewrite import operator
from weft.placement.rows.chance import seeded
from weft.placement.signature import Call, Link, Local, Position, Row

__all__ = ["RECURRENT"]


def recurrent(call: Call) -> Row:
    """The batch is dim 1 of states, dim 0 or 1 of inputs and outputs; unbatched inputs are not cut."""
    if call.node.target.endswith(".data") or len(call.inputs[0].shape) != 3:
        return Row()  # packed sequences
    batch = 0 if call.arg(8, "batch_first") else 1
    states = call.operands(1)
    inside = (Position(0, batch), *(Position(op, 1) for op in states))
    outside = (Position(0, batch), *(Position(o, 1) for o in range(1, len(call.outputs))))
    links = (Link("n", inside, outside),) if call.inputs[0].shape[batch] > 1 else ()
    draws = float(call.arg(5, "dropout", 0.0)) > 0 and bool(call.arg(6, "train")) and call.arg(4, "num_layers") > 1

    def local(here: Local) -> Callable[..., Any]:
        run = operator(call.node.target)
        return seeded(run, here.random_stream()) if draws else run

    return Row(links, local=local if draws else None)


def cell(call: Call) -> Row:
    """One step of lstm_cell(x, [h, c], weights ...), gru_cell(x, h, weights ...): dim 0 of the input, states and results."""
    batched = (0, *call.operands(1))
    outside = tuple(Position(o, 0) for o in range(len(call.outputs)))
    links = (Link("n", tuple(Position(op, 0) for op in batched), outside),)
    return Row(links if len(call.inputs[0].shape) == 2 and call.inputs[0].shape[0] > 1 else ())


RECURRENT: dict[str, Callable[[Call], Row]] = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
}
