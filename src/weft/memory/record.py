"""A step as memory sees it: which operators ran, which bytes each read and made, how long the bytes were wanted.

`Trace` is the frozen value that the tracer writes and everything else reads: planner, simulator, picture, replay. It is in
static single assignment form: a `Value` is one content of one allocation. An operator that writes in place makes a new value
in the same `storage` and ends the old one; a view makes no value at all, since it only looks at one.

Indices: `ops[i]` ran i-th; `values[v]` are numbered in the order in which they came to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from weft.memory.stored import read, write

__all__ = ["CATEGORIES", "Category", "Op", "Phase", "Trace", "Value"]

Category = Literal["parameter", "gradient", "optimizer", "buffer", "input", "activation"]
Phase = Literal["forward", "backward", "optimizer"]

CATEGORIES: tuple[Category, ...] = ("parameter", "gradient", "optimizer", "buffer", "input", "activation")

FORMAT = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class Value:
    """One content of one allocation.

    Attributes:
        nbytes: of the allocation, as asked for (no rounding).
        storage: which allocation; values of one storage follow each other and never overlap in time.
        category: what it is to the user. Only activations may be dropped.
        name: for people: a parameter's name, or the path of the module that made it (`h.3.mlp`), "" where unknown.
        born: index of the operator that made it; -1 if it was there before the step.
        dies: index of the operator after which eager execution gives its bytes back (its last reference, the user's or
            autograd's, is gone) or, for a value that is overwritten, of the operator that overwrites it; `len(ops)` if it
            outlives the step.
    """

    nbytes: int
    storage: int
    category: Category
    name: str
    born: int
    dies: int


@dataclass(frozen=True, slots=True)
class Op:
    """One operator call.

    Attributes:
        name: the operator (`aten.addmm.default`).
        module: path of the module whose forward, or whose forward's backward, made the call.
        phase: "forward", "backward" or "optimizer".
        reads: values whose bytes it needs, each once, those it overwrites included.
        makes: values it makes: outputs in storages of their own, and new contents of overwritten ones.
        overwrites: (old value, new value) for each storage it writes in place; old is in `reads`, new in `makes`.
        workspace: bytes it takes and gives back while it runs.
        seconds: what it costs, from a frozen table (see `weft.memory.costs`).
        repeatable: may run again and give the same bits. False for what has effects besides its outputs: collectives,
            reads to the host (`item`), writes to parameters, buffers and optimizer state.
        random: draws from a generator, whose state must be put back to run it again.
        dense: does many operations per byte (matrix products, convolutions): Coop keeps such outputs apart.
        over: name of the overload that may write the result over the first read, a gradient that nobody wants after it; "" if
            there is none.
    """

    name: str
    module: str
    phase: Phase
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    overwrites: tuple[tuple[int, int], ...] = ()
    workspace: int = 0
    seconds: float = 0.0
    repeatable: bool = True
    random: bool = False
    dense: bool = False
    over: str = ""


@dataclass(frozen=True)
class Trace:
    """One step of one model on one device.

    Attributes:
        ops, values: see above.
        device: for what the costs hold (`cpu`, or the name of a `weft.cluster.Device`).
        model: class of the traced model, for people and for errors.
        measured: seconds were measured on the device; else they come from its rates.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    device: str = "cpu"
    model: str = ""
    measured: bool = False
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def seconds(self) -> float:
        """Cost of the step without recomputing anything."""
        return sum(op.seconds for op in self.ops)

    @cached_property
    def fixed(self) -> int:
        """Bytes that are there before, during and after the step whatever is planned: the least that any budget must hold."""
        end = len(self.ops)
        seen: dict[int, int] = {}
        for value in self.values:
            if value.born < 0 and (value.dies >= end or value.category != "activation"):
                seen[value.storage] = value.nbytes
        return sum(seen.values())

    @cached_property
    def live(self) -> tuple[int, ...]:
        """Live bytes while each operator runs (inputs, outputs and workspace), executed eagerly."""
        end, change = len(self.ops), [0] * (len(self.ops) + 2)
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for value in self.values:
            first[value.storage] = min(first.get(value.storage, end), max(value.born, 0))
            last[value.storage] = max(last.get(value.storage, -1), min(value.dies, end))
        size = {value.storage: value.nbytes for value in self.values}
        for storage, nbytes in size.items():
            change[first[storage]] += nbytes
            change[last[storage] + 1] -= nbytes
        total, result = 0, []
        for index, op in enumerate(self.ops):
            total += change[index]
            result.append(total + op.workspace)
        return tuple(result)

    @property
    def peak(self) -> int:
        """Most bytes that eager execution holds at any moment, workspace included."""
        return max(self.live, default=self.fixed)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each value, the operators that read it, in order."""
        found: list[list[int]] = [[] for _ in self.values]
        for index, op in enumerate(self.ops):
            for value in op.reads:
                found[value].append(index)
        return tuple(map(tuple, found))

    def without(self, *categories: Category) -> Trace:
        """The same step where bytes of some categories count nothing (they are held elsewhere). Values keep their numbers."""
        values = tuple(replace(v, nbytes=0) if v.category in categories else v for v in self.values)
        return replace(self, values=values)

    @cached_property
    def as_run(self) -> Trace:
        """The step as weft runs it: results lie over gradients that nobody wants any more (`Op.over`)."""
        marked = [index for index, op in enumerate(self.ops) if op.over]
        if not marked:
            return self
        ops, values = list(self.ops), list(self.values)
        contents: dict[int, list[int]] = {}  # of each storage
        for number, value in enumerate(values):
            contents.setdefault(value.storage, []).append(number)
        for index in marked:
            op = ops[index]
            (new,), old = op.makes, op.reads[0]
            ops[index] = replace(op, name=op.over, overwrites=((old, new),), over="")
            storage, moved = values[old].storage, contents.pop(values[new].storage)
            for number in moved:
                values[number] = replace(values[number], storage=storage)
            contents[storage] += moved
        return replace(self, ops=tuple(ops), values=tuple(values))

    def __str__(self) -> str:
        from weft.memory.tracing.moments import table  # it reads this file

        return table(self)

    def show(self, path: str | Path, plan: Any = None) -> Path:
        """Write a self-contained HTML page: live bytes over the step, largest tensors by name, and a plan's curve if given."""
        from weft.memory.tracing.picture import show

        return show(self, path, plan)

    def check(self) -> None:
        """Raise `ValueError` naming the first inconsistency: a value read before it is born or after it dies, ..."""
        for problem in self._problems():
            raise ValueError(f"Trace: {problem}")

    def _problems(self) -> Iterator[str]:
        end = len(self.ops)
        for number, value in enumerate(self.values):
            if value.nbytes < 0 or not -1 <= value.born < max(end, 1) or value.dies < value.born:
                yield f"value {number} has impossible bytes or lifetime: {value}"
        for index, op in enumerate(self.ops):
            for v in op.reads:
                if not 0 <= v < len(self.values) or not self.values[v].born < index <= self.values[v].dies:
                    yield f"op {index} ({op.name}) reads value {v}, which does not live then"
            for v in op.makes:
                if not 0 <= v < len(self.values) or self.values[v].born != index:
                    yield f"op {index} ({op.name}) makes value {v}, which says otherwise"
            for old, new in op.overwrites:
                if old not in op.reads or new not in op.makes or self.values[old].storage != self.values[new].storage:
                    yield f"op {index} ({op.name}) overwrites value {old} by {new}, which are not of one storage"
                elif self.values[old].dies != index:
                    yield f"op {index} ({op.name}) overwrites value {old}, which lives on"

    # -- JSON ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able value; `from_dict` reads it."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """The trace that `to_dict` wrote.

        Raises:
            ValueError: another format, or an inconsistent trace.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"Trace: this weft reads format {FORMAT}, got {data.get('format')!r}; trace the model again with this version"
            )
        ops = tuple(
            Op(
                **{
                    **o,
                    **{k: tuple(o[k]) for k in ("reads", "makes")},
                    "overwrites": tuple(map(tuple, o["overwrites"])),
                }
            )
            for o in data["ops"]
        )
        rest = {k: data[k] for k in ("device", "model", "measured")}
        found = cls(ops, tuple(Value(**v) for v in data["values"]), notes=tuple(data.get("notes", ())), **rest)
        found.check()
        return found

    def save(self, path: str | Path) -> None:
        """Write JSON, compressed if the name ends in `.z`, in a folder that is there."""
        write(self.to_dict(), path, "trace.save:")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            Unreadable: there is no such file, or it holds no trace.
        """
        return read(path, cls.from_dict, "weft.memory.Trace")
