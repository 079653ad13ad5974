"""Find the signatures of an operator that has no row, by trying them.

Problem    which placements of an operator's operands make its local outputs the pieces of a placement? An operator from
           elsewhere says nothing about itself.
Method     enumerate Replicate, Shard(d) and Partial for every tensor operand; run the bare operator on the pieces; test which
           placements its local outputs form; keep what holds forward, then what `verify` confirms backward:   `discover`
           Operands are random numbers, drawn twice, over 2 and 3 parts and unequal weights. Sizes are made small, odd and
           different from each other if the operator still runs with them (even sizes make strided pooling look
           splittable); else they stay as they are. A combination on which the operator fails is not splittable. Operands
           on which every result is one and the same number (a hinge that is not active) prove nothing, and are drawn anew.
Guarantee  as good as a numeric test can be; what it finds needs no communication inside the operator, and holds for whole
           indices (no blocks). Operators whose combinations are more than `limit` are refused: they need a row.
           It is tried in a child process: shapes it was not meant for may crash it.                    `apart.each_apart`
Cache      `$WEFT_CACHE` or `~/.cache/weft`, by operator, shape pattern (which sizes are equal), dtypes, other arguments
           and torch version; only of torch's own operators, for a user's may change under the same name.
                                                                           `discover_call`, `probed_row`
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.graph.graph import map_refs
from weft.graph.rewrite import operator
from weft.placement.apart import each_apart
from weft.placement.layout import Mesh, Partial, Placement, Replicate, Shard, local_shape, parse
from weft.placement.signature import Call, Link, Position, Row, Signature
from weft.placement.verify import VerificationError, call_of, deal_out, put_together, verify

__all__ = ["TooManyToProbe", "discover", "discover_call", "probed_row"]

TORCH_LIBRARIES = ("aten", "prims", "quantized", "fbgemm")  # operators that change with torch's version only
_ODD_SIZES = (5, 7, 9, 11, 13, 15, 17, 19)


class TooManyToProbe(WeftError, ValueError):
    """An operator with more combinations of placements than probing tries: `target`, `combinations`, `limit`."""

    def __init__(self, target: str, combinations: int, limit: int):
        super().__init__(target, combinations, limit)
        self.target, self.combinations, self.limit = target, combinations, limit

    def __str__(self) -> str:
        return (
            f"{self.target} has {self.combinations} combinations of placements, probing tries at most {self.limit}. "
            "Declare its row in weft.placement.rows, or raise the limit."
        )


def discover(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    parts: Sequence[int] = (2, 3),
    limit: int = 2000,
    cache: bool = True,
) -> set[Signature]:
    """All signatures over one mesh axis that hold for a call, the one that is all Replicate included.

    Args:
        target: the operator (`aten.linear.default`).
        args, kwargs: the call's, with tensors as operands. Floating point values are replaced by random ones.
        parts: numbers of devices over which a signature must hold; the last also with unequal weights.
        limit: most combinations of operand placements to try.
        cache: read and write the disk cache.
    Raises:
        TooManyToProbe: more combinations than `limit`.
    """
    call, operands = call_of(target, args, kwargs)
    options = [_placements(x) for x in operands]
    combinations = math.prod(map(len, options))
    if combinations > limit:
        raise TooManyToProbe(target, combinations, limit)
    file = _cache_file(call, parts) if cache and target.split(".")[0] in TORCH_LIBRARIES else None
    known = _read(file)
    if known is not None:
        return known
    unequal = (2.5, *(1.0 for _ in range(parts[-1] - 1)))
    meshes = [*(Mesh((p,)) for p in parts), Mesh((parts[-1],), weights=(unequal,))]
    samples = [_sample(call, operands, seed) for seed in (0, 1)]

    def holding(inputs: Sequence[Placement]) -> list[Signature]:
        candidates = _formed(samples[0], inputs, meshes[0])
        return [s for s in candidates if all(_holds(sample, s, mesh) for mesh in meshes for sample in samples)]

    found = {s for held in each_apart(holding, list(itertools.product(*options))) for s in held or ()}
    _write(file, found)
    return found


def discover_call(call: Call, **options: Any) -> set[Signature]:
    """`discover` for a node of a graph, whose operands are known by shape and dtype only."""
    generator = torch.Generator().manual_seed(0)
    operands = iter([_values(spec.shape, spec.dtype, generator) for spec in call.inputs])
    args, kwargs = map_refs((call.node.args, dict(call.node.kwargs)), lambda _: next(operands))
    return discover(call.node.target, args, kwargs, **options)


def probed_row(call: Call, **options: Any) -> Row:
    """A row with what probing finds for a call: pass it to `find_cuts(rows={node.name: ...})`, or use it as a starting point."""
    links, extra = [], []
    for number, signature in enumerate(sorted(discover_call(call, **options), key=str)):
        inside = tuple(Position(i, p.dim) for i, p in enumerate(signature.inputs) if isinstance(p, Shard))
        outside = tuple(Position(i, p.dim) for i, p in enumerate(signature.outputs) if isinstance(p, Shard))
        owed = tuple((i, p) for i, p in enumerate(signature.inputs) if isinstance(p, Partial))
        due = tuple((i, p) for i, p in enumerate(signature.outputs) if isinstance(p, Partial))
        if inside or outside:
            links.append(Link(f"probed{number}", inside, outside, others=owed, whole=due, contiguous=True))
        elif owed or due:
            extra.append(signature)
    return Row(tuple(links), extra=tuple(extra))


def _placements(x: Tensor) -> list[Placement]:
    """What an operand may be: sizes below 2 are not cut, only numbers are Partial."""
    found: list[Placement] = [Replicate(), *(Shard(dim) for dim, size in enumerate(x.shape) if size > 1)]
    return [*found, Partial()] if x.is_floating_point() or x.is_complex() else found


class _Sample:
    """One set of random operands, and what the operator makes of them whole."""

    def __init__(self, call: Call, operands: list[Tensor]):
        given = iter(operands)
        self.args, self.kwargs = map_refs((call.node.args, dict(call.node.kwargs)), lambda _: next(given))
        self.kwargs = dict(self.kwargs)
        self.call, _ = call_of(call.node.target, self.args, self.kwargs)
        self.operands = operands
        self.outputs = _run(self.call, operands)


def _run(call: Call, operands: Sequence[Tensor]) -> list[Tensor]:
    given = iter([x.clone() for x in operands])
    args, kwargs = map_refs((call.node.args, dict(call.node.kwargs)), lambda _: next(given))
    with torch.no_grad():
        outputs = operator(call.node.target)(*args, **kwargs)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _sample(call: Call, operands: Sequence[Tensor], seed: int) -> _Sample:
    """Operands on which the operator gives finite numbers, not all of them alike.

    Of odd sizes if it accepts them, else of its own; normal numbers, or some between 0 and 1, or else the values given.
    """
    sizes = sorted({n for x in operands for n in x.shape if n > 1})
    odd = dict(zip(sizes, _ODD_SIZES, strict=False)) if len(sizes) <= len(_ODD_SIZES) else {}
    last = "its results are not finite"
    for resize, domain in itertools.product((odd, {}), ("normal", "unit", "given")):
        generator = torch.Generator().manual_seed(seed)
        if domain == "given" and resize:
            continue
        drawn = [_like(x, [resize.get(n, n) for n in x.shape], generator, domain) for x in operands]
        try:
            sample = _Sample(call, drawn)
        except Exception as error:
            last = str(error)
            continue
        ranks = [out.dim() for out in sample.outputs]
        if ranks != [len(spec.shape) for spec in call.outputs]:
            continue  # unbind and the like make another number of outputs of another size
        numbers = [out for out in sample.outputs if out.is_floating_point()]
        if not all(bool(out.isfinite().all()) for out in numbers):
            continue
        if any(bool((out != (out.flatten()[0] if out.numel() > 1 else 0)).any()) for out in numbers) or not numbers:
            return sample
        last = "its results are constant, which would agree with any placement"
    raise ValueError(f"probing {call.node.target}: random operands of its own shapes do not do: {last}")


def _like(x: Tensor, shape: Sequence[int], generator: torch.Generator, domain: str) -> Tensor:
    """Random values of a shape; whole numbers and truth values are drawn from those of `x`, which it surely accepts."""
    if x.is_floating_point() or x.is_complex():
        if domain == "given":
            return x.to(torch.promote_types(x.dtype, torch.float64))
        drawn = _values(shape, x.dtype, generator)
        return drawn.abs() % 0.8 + 0.1 if domain == "unit" else drawn
    if tuple(shape) == tuple(x.shape) or not x.numel():
        return x
    return x.flatten()[torch.randint(x.numel(), tuple(shape), generator=generator)]


def _values(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(shape), dtype=torch.promote_types(dtype, torch.float64), generator=generator)
    return torch.randint(2, tuple(shape), generator=generator).to(dtype)


def _formed(sample: _Sample, inputs: Sequence[Placement], mesh: Mesh) -> Iterator[Signature]:
    """Signatures with these input placements whose outputs the local results form over one mesh."""
    generator = torch.Generator().manual_seed(2)
    dealt = [deal_out(x, (p,), mesh, generator) for x, p in zip(sample.operands, inputs, strict=True)]
    try:
        made = {at: _run(sample.call, [pieces[at] for pieces in dealt]) for at in mesh.positions()}
    except Exception:
        return
    if any(len(outputs) != len(sample.outputs) for outputs in made.values()):
        return
    forms = []
    for i, whole in enumerate(sample.outputs):
        pieces = {at: outputs[i] for at, outputs in made.items()}
        found = [p for p in _placements(whole) if _forms(pieces, whole, p, mesh)]
        terms = [Partial("max"), Partial("min")] if whole.is_floating_point() else [Partial()]
        if Replicate() not in found and whole.dtype != torch.bool:
            found += [p for p in terms if _forms(pieces, whole, p, mesh)]
        forms.append(found)
    for outputs in itertools.product(*forms):
        yield Signature(tuple(inputs), outputs)


def _forms(pieces: Mapping[tuple[int, ...], Tensor], whole: Tensor, placement: Placement, mesh: Mesh) -> bool:
    """Whether local outputs are the pieces, copies or terms of the whole output."""
    if any(tuple(piece.shape) != local_shape(whole.shape, (placement,), mesh, at) for at, piece in pieces.items()):
        return False
    if any(piece.dtype != whole.dtype for piece in pieces.values()):
        return False
    together, spread = put_together(pieces, whole.shape, (placement,), mesh)
    if not (whole.is_floating_point() or whole.is_complex()):
        return spread == 0 and torch.equal(together, whole)
    scale = max(1.0, float(whole.abs().max())) if whole.numel() else 1.0
    return spread <= 1e-9 * scale and torch.allclose(together, whole, rtol=0, atol=1e-9 * scale, equal_nan=True)


def _holds(sample: _Sample, signature: Signature, mesh: Mesh) -> bool:
    """Whether forward and backward agree with the operator run whole."""
    target = sample.call.node.target
    try:
        verify(target, sample.args, sample.kwargs, signatures=[signature], mesh=mesh, row=Row())
    except (VerificationError, ValueError):
        return False
    return True


def _cache_file(call: Call, parts: Sequence[int]) -> Path:
    """Where the result for calls of this pattern is kept."""
    ranks: dict[int, int] = {}
    pattern = [[n if n <= 1 else ranks.setdefault(n, len(ranks) + 2) for n in spec.shape] for spec in call.inputs]
    args, kwargs = map_refs((call.node.args, dict(call.node.kwargs)), str)
    key = repr(
        (call.node.target, pattern, [str(s.dtype) for s in call.inputs], args, sorted(kwargs.items()), tuple(parts))
    )
    name = hashlib.sha256(f"{torch.__version__} {key}".encode()).hexdigest()[:32]
    root = os.environ.get("WEFT_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "weft"
    return folder / "probes" / f"{name}.json"


def _read(file: Path | None) -> set[Signature] | None:
    """Signatures from the cache; None if there is no readable file."""
    if file is None:
        return None
    try:
        rows = json.loads(file.read_text())
        return {Signature(tuple(map(parse, inputs)), tuple(map(parse, outputs))) for inputs, outputs in rows}
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path | None, found: set[Signature]) -> None:
    """Keep signatures in the cache, all or nothing; a folder that cannot be written is no error."""
    if file is None:
        return
    rows = sorted(([str(p) for p in s.inputs], [str(p) for p in s.outputs]) for s in found)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as handle:
            json.dump(rows, handle)
        os.replace(handle.name, file)
    except OSError:
        return
