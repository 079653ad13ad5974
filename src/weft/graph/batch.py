"""What a batch is, and how a model and a loss are called with it.

A batch is any nesting of dicts, lists and tuples with tensors (the *leaves*) and plain values (numbers, strings, booleans, None)
inside. Leaves are numbered depth first in the order of the containers; a leaf's *path* is its keys joined by dots (`labels`,
`0.pixel_values`). Later batches may have lists where the captured one has tuples, and the other way round.
One convention says how the batch reaches the model; capture, runtime and tests all use `call`:

    batch              loss   value that is minimised
    dict               None   scalar in model(**batch)
    dict               given  loss(model(**(entries that model.forward accepts)), batch)
    list or tuple      None   scalar in model(*batch)
    list or tuple      given  loss(model(*batch[:-1]), batch[-1])
    tensor             None   scalar in model(batch)
    tensor             given  loss(model(batch), batch)

The scalar of an output is the output itself, its `.loss`, its ["loss"], or its first item.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from weft.graph.graph import Graph

__all__ = ["call", "check_batch", "flatten_batch", "unflatten_batch"]

_PLAIN = (bool, int, float, str, type(None))


def flatten_batch(batch: Any) -> tuple[list[Tensor], list[str], Any]:
    """Leaves, their paths, and the batch's structure as a JSON-able value with leaf numbers in place of tensors.

    Raises:
        ValueError: something in the batch is neither a tensor, a plain value, nor a dict, list or tuple of such; or its tensors
            have no rows.
    """
    leaves: list[Tensor] = []
    paths: list[str] = []

    def describe(item: Any, path: tuple[str, ...]) -> Any:
        if isinstance(item, Tensor):
            leaves.append(item)
            paths.append(".".join(path) or "batch")
            return {"leaf": len(leaves) - 1}
        if isinstance(item, Mapping):
            for key in item:
                if not isinstance(key, str):
                    raise ValueError(f"batch: keys must be strings, got {key!r} at {'.'.join(path) or 'the top'}")
            return {"dict": {key: describe(value, (*path, key)) for key, value in item.items()}}
        if isinstance(item, (list, tuple)):
            kind = "list" if isinstance(item, list) else "tuple"
            return {kind: [describe(value, (*path, str(i))) for i, value in enumerate(item)]}
        if isinstance(item, _PLAIN):
            return {"value": item}
        raise ValueError(
            f"batch: {'.'.join(path) or 'it'} is a {type(item).__name__}; a batch is made of tensors, numbers, strings and None "
            "in dicts, lists and tuples"
        )

    structure = describe(batch, ())
    if not max((leaf.shape[0] for leaf in leaves if leaf.dim()), default=1):
        raise ValueError("batch: it is empty: its tensors have no rows")
    return leaves, paths, structure


def unflatten_batch(structure: Any, leaves: Collection[Any]) -> Any:
    """The batch that `flatten_batch` took apart, with other leaves; mappings come back as dicts, named tuples as tuples."""
    leaves = list(leaves)

    def build(item: Any) -> Any:
        ((kind, content),) = item.items()
        if kind == "leaf":
            return leaves[content]
        if kind == "dict":
            return {key: build(value) for key, value in content.items()}
        if kind == "value":
            return content
        return [build(value) for value in content] if kind == "list" else tuple(build(value) for value in content)

    return build(structure)


def call(
    model: Callable[..., Any], batch: Any, loss: Callable[..., Any] | None = None, *, scalar: bool = True
) -> Tensor:
    """Run the model on a batch and return the value that is minimised: a tensor with one element.

    With `scalar=False` a model without a loss may also return its first tensor, whatever its shape.

    Raises:
        ValueError: there is no scalar to minimise, the loss does not take two arguments, or the batch is an empty list.
    """
    if loss is not None:
        _check_loss(loss)
    if isinstance(batch, Mapping):
        batch = dict(batch)
        output = model(**(batch if loss is None else _accepted(model, batch)))
        value = output if loss is None else _loss_of(loss, output, batch)
    elif isinstance(batch, (list, tuple)):
        if loss is not None and len(batch) < 2:
            raise ValueError(
                f"batch: with a loss, a {type(batch).__name__} needs inputs and a target, got {len(batch)} items"
            )
        output = model(*(batch if loss is None else batch[:-1]))
        value = output if loss is None else _loss_of(loss, output, batch[-1])
    else:
        output = model(batch)
        value = output if loss is None else _loss_of(loss, output, batch)
    return _scalar_of(value, loss is not None, scalar)


def _loss_of(loss: Callable[..., Any], output: Any, target: Any) -> Any:
    """The loss, in a frame by which `diagnose` tells its errors from the model's."""
    return loss(output, target)


def _check_loss(loss: Callable[..., Any]) -> None:
    """Said before the model runs: the error of the call itself would look like one of the model's."""
    if not callable(loss):
        raise ValueError(f"loss: must be a function of (output, target) or None, got {loss!r}")
    try:
        signature = inspect.signature(loss)
    except ValueError:  # a builtin without one
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"loss: must take (output, target) or, for a dict batch, (output, batch), got one of {signature}: {error}. "
            "Leave loss out if the model returns its loss"
        ) from None


def _accepted(model: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Any]:
    """Entries of the batch that the model's forward takes by keyword; all of them if it takes **kwargs."""
    forward = getattr(model, "forward", model)
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return batch
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in batch.items() if key in names}


def _scalar_of(output: Any, from_loss: bool, scalar: bool) -> Tensor:
    candidates = [output]
    if isinstance(output, Mapping):
        candidates.append(output.get("loss"))
    candidates.append(getattr(output, "loss", None))
    if isinstance(output, (list, tuple)) and output:
        candidates.append(output[0])
    for value in candidates:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
    if not scalar:
        values = (
            output.values()
            if isinstance(output, Mapping)
            else output
            if isinstance(output, (list, tuple))
            else (output,)
        )
        for value in values:
            if isinstance(value, Tensor):
                return value
    what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if from_loss:
        raise ValueError(f"loss: must return a scalar tensor, got {what}; reduce it with .mean() or .sum()")
    raise ValueError(
        f"model: without loss= the output must be a scalar, have .loss or ['loss'], or be a tuple that starts with a scalar; got "
        f"{what}. Pass loss=, a function of (output, target) or, for dict batches, of (output, batch)"
    )


def check_batch(graph: Graph, batch: Any, *, vary: Collection[int] | None = ()) -> list[Tensor]:
    """The leaves of a batch that fits the captured graph.

    Args:
        graph: from `capture`.
        batch: of the same structure, dtypes and shapes as the captured one.
        vary: dims whose size may differ from the captured one (0 for a shorter last batch); None for all.
    Raises:
        ValueError: names the first entry that differs, and how.
    """
    found, paths, structure = flatten_batch(batch)
    order: dict[int, int] = {}  # captured leaf number -> leaf number in this batch (the order of a dict's keys is free)
    _same_structure(graph.batch, structure, (), order)
    leaves = []
    for number, node in enumerate(graph.of("input")):
        leaf, path = found[order[number]], paths[order[number]]
        leaves.append(leaf)
        want = node.outputs[0]
        if leaf.dtype != want.dtype:
            raise ValueError(
                f"batch: {path} must be {_name(want.dtype)} as in the captured batch, got {_name(leaf.dtype)}"
            )
        fits = leaf.dim() == len(want.shape) and (
            vary is None
            or all(a == b or dim in vary for dim, (a, b) in enumerate(zip(leaf.shape, want.shape, strict=True)))
        )
        if not fits:
            may = "" if not vary or leaf.dim() != len(want.shape) else f" (only dims {sorted(vary)} may differ)"
            raise ValueError(
                f"batch: {path} must have shape {want.shape} as in the captured batch, got {tuple(leaf.shape)}{may}"
            )
    return leaves


def _same_structure(want: Any, got: Any, path: tuple[str, ...], order: dict[int, int]) -> None:
    where = ".".join(path) or "batch"
    ((kind, old),), ((other, new),) = want.items(), got.items()
    if kind != other and {kind, other} != {"list", "tuple"}:  # a DataLoader makes lists of tuples
        said = {"leaf": "tensor", "value": "plain value"}
        raise ValueError(
            f"batch: {where} must be a {said.get(kind, kind)} as in the captured batch, got a {said.get(other, other)}"
        )
    if kind == "leaf":
        order[old] = new
    elif kind == "dict":
        if set(old) != set(new):
            missing, extra = sorted(set(old) - set(new)), sorted(set(new) - set(old))
            raise ValueError(
                f"batch: {where} differs from the captured batch: missing {missing or 'nothing'}, extra {extra or 'nothing'}"
            )
        for key in old:
            _same_structure(old[key], new[key], (*path, key), order)
    elif kind in ("list", "tuple"):
        if len(old) != len(new):
            raise ValueError(f"batch: {where} must have {len(old)} items as in the captured batch, got {len(new)}")
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            _same_structure(a, b, (*path, str(i)), order)
    elif kind == "value" and old != new:
        raise ValueError(
            f"batch: {where} was {old!r} when the model was captured and is part of the program, got {new!r}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
