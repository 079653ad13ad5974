"""A graph as JSON and back, and the fingerprint by which a plan knows its model.

The file is an object with `format`, `nodes` (in order), `loss`, `batch`, `aliases`, `repeats`, `train` and `constants`. What JSON
lacks is written as an object with one key: {"ref": [node, output]}, {"dtype": "float32"}, {"device": "cpu"}, {"layout": ...},
{"memory_format": ...}, {"tuple": [...]}, {"float": "inf"}. Constants are written with all their numbers (base 64, little endian).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.graph.graph import Cost, Graph, Node, Ref, Repeat, TensorSpec
from weft.graph.rewrite import dim_arguments
from weft.paths import to_file

__all__ = ["from_json", "graph_fingerprint", "load", "save", "to_json"]

FORMAT = "weft-graph-1"


def to_json(graph: Graph) -> dict[str, Any]:
    """The graph as a value that `json.dumps` takes."""
    return {
        "format": FORMAT,
        "train": graph.train,
        "loss": list(graph.loss),
        "batch": graph.batch,
        "aliases": dict(graph.aliases),
        "repeats": [[r.start, r.length, r.count] for r in graph.repeats],
        "constants": {name: _encode_tensor(value) for name, value in graph.constants.items()},
        "nodes": [_encode_node(node) for node in graph.nodes],
    }


def from_json(data: Any) -> Graph:
    """The graph that `to_json` wrote.

    Raises:
        ValueError: not a graph file, of another format version, or incomplete.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"not a graph file of this version of weft: format must be {FORMAT!r}, got {found!r}; capture the model again"
        )
    try:
        return Graph(
            nodes=tuple(_decode_node(item) for item in data["nodes"]),
            loss=Ref(*data["loss"]),
            batch=data["batch"],
            aliases=data["aliases"],
            constants={name: _decode_tensor(value) for name, value in data["constants"].items()},
            repeats=tuple(Repeat(*item) for item in data["repeats"]),
            train=data["train"],
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"graph file is damaged: {type(error).__name__} {error}; capture the model again") from error


def save(graph: Graph, path: str | Path) -> None:
    """Write the graph to a JSON file, in a folder that is there."""
    to_file("graph.save:", path)
    Path(path).write_text(json.dumps(to_json(graph)), encoding="utf-8")


def load(path: str | Path) -> Graph:
    """Read a graph from a JSON file.

    Raises:
        ValueError: the file is no graph, or cut short.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON (line {error.lineno}: {error.msg}); the file may be cut short") from error
    return from_json(data)


def graph_fingerprint(graph: Graph) -> str:
    """16 hexadecimal digits, equal for captures of one model with any batch sizes, different for other models.

    Covers parameters and buffers (names, shapes, dtypes, ties), operators, wiring, dims, flags, modules and the structure of
    the batch; leaves out sizes and numbers among the arguments, which may follow from the batch.
    """
    digest = hashlib.sha256()
    number = {node.name: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        spec = node.outputs[0] if node.outputs else None
        fixed = spec.shape if spec and node.role in ("parameter", "buffer") else [len(s.shape) for s in node.outputs]
        wiring = [(number[ref.node], ref.index) for ref in node.inputs]
        dtypes = [(str(s.dtype), s.requires_grad) for s in node.outputs]
        digest.update(repr((node.role, node.target, fixed, dtypes, wiring, _structure(node), node.module)).encode())
    digest.update(
        repr(
            (
                number[graph.loss.node],
                graph.loss.index,
                sorted(graph.aliases.items()),
                _tuples(graph.batch),
                graph.train,
            )
        ).encode()
    )
    return digest.hexdigest()[:16]


def _tuples(structure: Any) -> Any:
    """The structure of a batch with lists as tuples: they are the same to `check_batch`."""
    ((kind, content),) = structure.items()
    if kind == "dict":
        return {kind: {key: _tuples(value) for key, value in content.items()}}
    return {"tuple": [_tuples(value) for value in content]} if kind in ("list", "tuple") else structure


def _structure(node: Node) -> list[Any]:
    """A call's arguments without the numbers that may depend on the batch's sizes."""
    if node.role != "call":
        return []
    dims = {position for position, _ in dim_arguments(node.target)}
    names = {name for _, name in dim_arguments(node.target)}

    def keep(item: Any, is_dim: bool) -> Any:
        if isinstance(item, (list, tuple)) and not isinstance(item, Ref):
            return [keep(value, is_dim) for value in item] if is_dim else "list"
        if isinstance(item, Ref) or (type(item) in (int, float) and not is_dim):
            return type(item).__name__
        return str(item)

    positional = [keep(item, i in dims) for i, item in enumerate(node.args)]
    return positional + [(name, keep(item, name in names)) for name, item in node.kwargs.items() if name != "device"]


# -- nodes -----------------------------------------------------------------------------------------------------------


def _encode_node(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": node.name,
        "role": node.role,
        "target": node.target,
        "outputs": [_encode_spec(s) for s in node.outputs],
    }
    if node.role == "call":
        data |= {
            "args": [_encode(item) for item in node.args],
            "kwargs": {name: _encode(item) for name, item in node.kwargs.items()},
            "module": node.module,
            "where": node.where,
            "kind": node.kind,
            "cost": asdict(node.cost),
        }
    if node.mutates:
        data["mutates"] = [list(ref) for ref in node.mutates]
    return data


def _decode_node(data: dict[str, Any]) -> Node:
    cost = dict(data.get("cost", {}))
    cost["keeps_inputs"] = tuple(cost.get("keeps_inputs", ()))
    return Node(
        name=data["name"],
        role=data["role"],
        target=data["target"],
        args=tuple(_decode(item) for item in data.get("args", ())),
        kwargs={name: _decode(item) for name, item in data.get("kwargs", {}).items()},
        outputs=tuple(_decode_spec(item) for item in data["outputs"]),
        module=data.get("module", ""),
        where=data.get("where", ""),
        kind=data.get("kind", "none"),
        cost=Cost(**cost),
        mutates=tuple(Ref(*item) for item in data.get("mutates", ())),
    )


def _encode_spec(spec: TensorSpec) -> list[Any]:
    return [list(spec.shape), _torch_name(spec.dtype), spec.requires_grad]


def _decode_spec(data: list[Any]) -> TensorSpec:
    shape, dtype, requires_grad = data
    return TensorSpec(tuple(shape), _torch_value("dtype", dtype), requires_grad)


# -- arguments -------------------------------------------------------------------------------------------------------


def _torch_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


_TORCH_TYPES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def _torch_value(kind: str, name: str) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, _TORCH_TYPES[kind]):
        raise ValueError(f"graph file is damaged: {name!r} is not a torch {kind}")
    return value


def _encode(item: Any) -> Any:
    if isinstance(item, Ref):
        return {"ref": list(item)}
    if item is None or isinstance(item, (bool, int, str)):
        return item
    if isinstance(item, float):
        return item if math.isfinite(item) else {"float": str(item)}
    if isinstance(item, complex):
        return {"complex": [item.real, item.imag]}
    if isinstance(item, list):
        return [_encode(value) for value in item]
    if isinstance(item, tuple):
        return {"tuple": [_encode(value) for value in item]}
    if isinstance(item, torch.device):
        return {"device": str(item)}
    for kind, cls in _TORCH_TYPES.items():
        if isinstance(item, cls):
            return {kind: _torch_name(item)}
    raise TypeError(f"a graph argument must be a plain value, got {type(item).__name__}")


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "ref": lambda value: Ref(*value),
    "float": float,
    "complex": lambda value: complex(*value),
    "tuple": lambda value: tuple(_decode(item) for item in value),
    "device": torch.device,
    **{kind: (lambda value, kind=kind: _torch_value(kind, value)) for kind in _TORCH_TYPES},
}


def _decode(item: Any) -> Any:
    if isinstance(item, list):
        return [_decode(value) for value in item]
    if isinstance(item, dict):
        ((kind, value),) = item.items()
        return _DECODERS[kind](value)
    return item


def _encode_tensor(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return {"shape": list(tensor.shape), "dtype": _torch_name(tensor.dtype), "data": base64.b64encode(raw).decode()}


def _decode_tensor(data: dict[str, Any]) -> Tensor:
    dtype = _torch_value("dtype", data["dtype"])
    raw = bytearray(base64.b64decode(data["data"]))
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(data["shape"]).clone()
