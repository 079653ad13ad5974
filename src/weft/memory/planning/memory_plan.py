"""The value that planning gives out: what one step does to fit into a budget, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from weft.memory.core.core import MOVE_RATE
from weft.memory.planning.check import Checked, Tier, check
from weft.memory.record import Trace
from weft.memory.schedule import Action, Schedule
from weft.memory.stored import read, write

__all__ = ["MemoryPlan", "Part", "size"]

FORMAT = 1  # of the JSON


@final
@dataclass(frozen=True, slots=True)
class Part:
    """What a plan repeats, or moves away and back, in one place of the model.

    Attributes:
        module: path of the module, numbers of repeated layers written as `*`.
        what: operators ("gelu 6x, mul 12x"), or how many values.
        nbytes: of what comes back; seconds: what that costs.
    """

    module: str
    what: str
    nbytes: int
    seconds: float


@final
@dataclass(frozen=True)
class MemoryPlan:
    """How one step runs within a budget. Made by `plan`.

    Attributes:
        trace: the step, as it runs (`Trace.as_run`).
        budget: bytes that it may take, 0 if no limit was given.
        schedule: what to do, with addresses in an arena.
        checked: what the judge says that it costs.
        method: how it was found.
        tier: the lower tier that it moves activations to, if any.
        policies: what published policies would cost at this budget: (name, overhead), overhead -1 where they find no way.
    """

    trace: Trace
    budget: int
    schedule: Schedule
    checked: Checked
    method: str
    tier: Tier | None = None
    policies: tuple[tuple[str, float], ...] = ()

    @property
    def peak(self) -> int:
        """Most bytes at once, counted: parameters, gradients, optimizer state, inputs, activations, workspace."""
        return self.checked.peak

    @property
    def reserved(self) -> int:
        """Bytes that the step needs with an arena: the arena, and the most that lies outside of it."""
        return self.checked.reserved

    @property
    def seconds(self) -> float:
        """Predicted seconds of the step."""
        return self.checked.seconds

    @property
    def overhead(self) -> float:
        """Predicted seconds over those of the step as traced, less 1."""
        return self.checked.overhead

    @cached_property
    def least(self) -> int:
        """The least budget, in bytes, for which `plan` finds a way. Found when asked for: takes about as long as a plan."""
        from weft.memory.planning.choose import least  # planning makes plans, and so imports this module

        return least(self.trace, self.tier)

    @cached_property
    def recomputed(self) -> tuple[Part, ...]:
        """What is run again, by module, the dearest first."""
        ops, values = self.trace.ops, self.trace.values
        again = [ops[action.index] for action in self.schedule.actions if action.kind == "again"]
        return _parts(
            (_family(op.module), _short(op.name), sum(values[v].nbytes for v in op.makes), op.seconds) for op in again
        )

    @cached_property
    def offloaded(self) -> tuple[Part, ...]:
        """What is copied to the lower tier, by module, the largest first; seconds are those of the copies there and back."""
        ops, values = self.trace.ops, self.trace.values
        rows = []
        for action in self.schedule.actions:
            if action.kind in ("save", "load"):
                value = values[action.index]
                op = ops[value.born] if value.born >= 0 else None
                seconds = self.tier.seconds(value.nbytes) if self.tier else 0.0
                nbytes = value.nbytes if action.kind == "save" else 0
                rows.append(
                    (_family(op.module if op else value.name), _short(op.name) if op else "value", nbytes, seconds)
                )
        return _parts(rows)

    def __str__(self) -> str:
        trace, checked = self.trace, self.checked
        slower = f"{100 * self.overhead:.1f} % slower" if self.overhead > 5e-5 else "no slower"
        fits = f"fits in {size(self.budget)}" if self.budget else f"takes {size(self.reserved)}"
        lines = [f"{fits}, {slower}, least possible {size(self.least)}"]
        lines.append(
            f"  memory    {size(self.reserved)}: arena {size(self.schedule.arena)}, outside of it "
            f"{size(self.reserved - self.schedule.arena)}; as traced {size(trace.peak)}"
        )
        lines.append(
            f"  seconds   {self.seconds:.4g} a step (as traced {trace.seconds:.4g}, "
            f"{'measured' if trace.measured else 'predicted'} for {trace.device})"
        )
        if checked.repeated:
            lines.append(f"  recompute {checked.repeated} operators, {checked.repeated_seconds:.4g} s")
            lines += _table(self.recomputed)
        if checked.moved_bytes:
            lines.append(
                f"  move      {size(checked.moved_bytes)} within the arena, {checked.moved_bytes / MOVE_RATE:.4g} s"
            )
        if checked.saved_bytes:
            lines.append(
                f"  offload   {size(checked.saved_bytes)} to {self.tier.name if self.tier else 'the lower tier'}, "
                f"{checked.waited_seconds:.4g} s of waiting"
            )
            lines += _table(self.offloaded)
        if self.policies:
            rows = (
                f"{name} {100 * cost:.1f} %" if cost >= 0 else f"{name} does not fit" for name, cost in self.policies
            )
            lines.append("  policies  " + ", ".join(rows))
        lines.append(f"  found by  {self.method}")
        lines += [f"  note      {note}" for note in trace.notes]
        return "\n".join(lines)

    # -- JSON ---------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able value, the trace included; `from_dict` reads it."""
        actions = [[a.kind, a.index, [list(p) for p in a.places], a.workspace] for a in self.schedule.actions]
        tier = asdict(self.tier) if self.tier else None
        if tier and tier["capacity"] == float("inf"):
            tier["capacity"] = None  # JSON has no infinity
        return {
            "format": FORMAT,
            "trace": self.trace.to_dict(),
            "budget": self.budget,
            "arena": self.schedule.arena,
            "actions": actions,
            "method": self.method,
            "tier": tier,
            "policies": [list(row) for row in self.policies],
            "result": {
                **{k: v for k, v in asdict(self.checked).items() if k != "live"},
                "least": self.__dict__.get("least", 0),
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPlan:
        """The plan that `to_dict` wrote, judged again.

        Raises:
            ValueError: another format, a damaged trace, or a schedule that does not run it.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"MemoryPlan: this weft reads format {FORMAT}, got {data.get('format')!r}; plan again with it"
            )
        trace = Trace.from_dict(data["trace"])
        actions = tuple(Action(k, i, tuple((v, at) for v, at in places), w) for k, i, places, w in data["actions"])
        schedule = Schedule(actions, data["arena"])
        given = data["tier"]
        tier = (
            Tier(**{**given, "capacity": float("inf" if given["capacity"] is None else given["capacity"])})
            if given
            else None
        )
        policies = tuple((name, float(cost)) for name, cost in data["policies"])
        return cls(trace, data["budget"], schedule, check(trace, schedule, tier), data["method"], tier, policies)

    def save(self, path: str | Path) -> None:
        """Write JSON, compressed if the name ends in `.z`, in a folder that is there."""
        write(self.to_dict(), path, "plan.save:")

    @classmethod
    def load(cls, path: str | Path) -> MemoryPlan:
        """Read what `save` wrote.

        Raises:
            Unreadable: there is no such file, or it holds no plan that runs.
        """
        return read(path, cls.from_dict, "weft.memory.MemoryPlan")


def size(nbytes: float) -> str:
    """Bytes for people: `80.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.{1 if nbytes >= 10 else 2}f} {unit}"


def _family(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _short(name: str) -> str:
    return name.split(".")[1] if name.startswith("aten.") else name


def _parts(rows: Iterable[tuple[str, str, int, float]]) -> tuple[Part, ...]:
    modules: dict[str, tuple[dict[str, int], list[float]]] = {}
    for module, what, nbytes, seconds in rows:
        counts, sums = modules.setdefault(module, ({}, [0, 0.0]))
        counts[what] = counts.get(what, 0) + 1
        sums[0] += nbytes
        sums[1] += seconds
    found = []
    for module, (counts, (nbytes, seconds)) in modules.items():
        often = sorted(counts.items(), key=lambda item: -item[1])
        found.append(Part(module, ", ".join(f"{name} {count}x" for name, count in often), int(nbytes), seconds))
    return tuple(sorted(found, key=lambda part: (-part.seconds, -part.nbytes)))


def _table(parts: Sequence[Part], most: int = 8) -> list[str]:
    width = max((len(part.module) for part in parts[:most]), default=0)
    lines = [
        f"            {part.module:<{width}}  {size(part.nbytes):>9}  {1e3 * part.seconds:8.2f} ms  {part.what[:60]}"
        for part in parts[:most]
    ]
    return lines + ([f"            and {len(parts) - most} more"] if len(parts) > most else [])
