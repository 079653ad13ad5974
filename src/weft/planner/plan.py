"""The plan: what the planner decides and the runtime carries out. Frozen, serialisable, checkable without devices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cluster import Cluster
from weft.errors import DoesNotFit, PlanMismatch
from weft.graph.graph import Graph
from weft.paths import to_file
from weft.placement.assignment import Assignment
from weft.placement.layout import Mesh, Shard
from weft.planner.optimizer import OptimizerCost
from weft.planner.price import Prediction
from weft.planner.squeeze import Squeeze
from weft.planner.text import describe

if TYPE_CHECKING:
    from weft.comm import Exchange
    from weft.planner.constraints import Where

__all__ = ["Alternative", "Plan"]

FORMAT = 3  # of the JSON
READS = (1, 2, 3)  # 1 had no squeezes, 2 none that offload

REMEDY = {
    "parameters": "use more devices, or allow ZeRO-3 or tensor parallelism if you ruled them out",
    "gradients": "use more devices, or allow ZeRO-2 or ZeRO-3 if you ruled them out",
    "optimizer state": "use more devices, allow ZeRO if you ruled it out, or an optimizer with less state (SGD keeps none)",
    "gathered copies": "use more devices, or tensor parallelism instead of ZeRO-3",
    "activations": "use a smaller batch (and accumulate gradients), more devices, or a tier to offload to in the cluster file",
}


def _read(data: Mapping[str, Any], key: str, make: Callable[[Any], Any], default: Any = None) -> Any:
    """An entry of a plan's data.

    Raises:
        ValueError: it cannot be made of what is there.
    """
    try:
        return make(data.get(key, default))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the plan's {key} cannot be read ({type(error).__name__}: {error}); the data is damaged: plan again"
        ) from error


@dataclass(frozen=True)
class Alternative:
    """Another plan, priced by the same model; `repeated` and `waiting` are the seconds of recomputation and of offload that
    make it fit."""

    name: str
    mesh: tuple[int, ...]
    seconds: float
    exposed: float
    nbytes: float
    peak: float
    fits: bool
    repeated: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Placements of a whole model on a mesh, what a step should cost, and what else was considered.

    Attributes:
        assignment: a signature for every operator, a placement for every parameter and buffer.
        fingerprint: of the graph planned for; other batch sizes have the same one.
        cluster: planned for.
        optimizer: as the cost model sees it.
        prediction: seconds, bytes and memory of a step.
        alternatives: named strategies and other results of the search, fastest first.
        method: how the plan was found.
        lower_bound: seconds that no plan can beat under this cost model (`planner.bound`).
        name: "search", or the strategy asked for.
        planning_seconds: what finding it took.
        graph, loss: what was planned for, if this plan was made in this process; not part of the value.
        squeezes: for devices that would need more memory than they have: what they compute again, and move to a lower tier, to
            fit. Seconds and memory of `prediction` are those of the step that does so.
        exchange: options of the exchange that `prediction` has gradients sent by (`weft.comm.Exchange.options`); "" for
            all-reduce and reduce-scatter. `weft.run` is to be given the same.
    """

    assignment: Assignment
    fingerprint: str
    cluster: Cluster
    optimizer: OptimizerCost
    prediction: Prediction
    alternatives: tuple[Alternative, ...] = ()
    method: str = ""
    lower_bound: float = 0.0
    name: str = "search"
    planning_seconds: float = field(default=0.0, compare=False)
    graph: Graph | None = field(default=None, compare=False, repr=False)
    loss: Any = field(default=None, compare=False, repr=False)
    squeezes: tuple[Squeeze, ...] = ()
    exchange: str = ""

    @property
    def mesh(self) -> Mesh:
        return self.assignment.mesh

    @property
    def gap(self) -> float:
        """How far the prediction is above the lower bound, as a fraction of the bound."""
        return self.prediction.seconds / self.lower_bound - 1.0 if self.lower_bound > 0 else float("inf")

    def budget(self, rank: int) -> int | None:
        """Bytes within which a device must be kept, by its rank; None if its step fits as it is."""
        return next((squeeze.budget for squeeze in self.squeezes if rank in squeeze.ranks), None)

    def __str__(self) -> str:
        return describe(self)

    # ---- making by hand

    @classmethod
    def manual(
        cls,
        model: Any,
        batch: Any = None,
        *,
        cluster: Cluster,
        mesh: Mesh | Sequence[int] | None = None,
        strategy: str | Sequence[str] = "any",
        parameters: Mapping[str, Where] | None = None,
        inputs: Mapping[str, Where] | None = None,
        loss: Any = None,
        optimizer: Any = "AdamW",
        memory: int | str | Sequence[int | str] | None = None,
        weights: Sequence[float] | None = None,
        allow_replicated: bool | Sequence[str] = False,
        recompute: bool = True,
        offload: bool = True,
        exchange: Exchange | None = None,
    ) -> Plan:
        """A plan of your own: fix what you know, the search chooses the rest at least cost.

        Args:
            model: an `nn.Module`, or a `Graph` already captured (then without `batch`).
            batch, loss: as for `weft.plan`.
            cluster: devices and links.
            mesh: a `Mesh` or its shape; by default one axis over all devices, or as many axes as `strategy` names.
            strategy: one of `planner.constraints.STRATEGIES`, or one per mesh axis: `("dp", "tp")`.
            parameters: patterns of parameter names -> placement per mesh axis in which they are used (`Shard(0)`, `"R S(1)"`),
                or a whole `ParameterPlacement`.
            inputs: patterns of leaf paths of the batch -> placement in which their readers want them.
            optimizer, memory, weights, allow_replicated, recompute, offload, exchange: as for `weft.plan`. A plan that does not
                fit is no error here: `check` says so.
        Raises:
            ImpossibleConstraint: some operator cannot do what is asked; the error lists what it can.
            MeshTooLarge: data parallelism over more devices than the batch has entries.
            UnknownOperators: operators without a placement rule.

        >>> plan = Plan.manual(model, batch, cluster=cluster, strategy="zero-3")                       # doctest: +SKIP
        >>> plan = Plan.manual(model, batch, cluster=cluster, mesh=(2, 2), strategy=("dp", "tp"))      # doctest: +SKIP
        >>> plan = Plan.manual(model, batch, cluster=cluster, parameters={"head.weight": Shard(0)})    # doctest: +SKIP
        """
        from weft.planner.choose import make_plan
        from weft.planner.constraints import Constraints
        from weft.planner.squeeze import Moves

        strategy = strategy if isinstance(strategy, str) else tuple(strategy)
        if mesh is None and isinstance(strategy, str):
            mesh = (len(cluster),)
        return make_plan(
            model, batch, cluster=cluster, loss=loss, optimizer=optimizer, memory=memory, mesh=mesh, weights=weights,
            constraints=Constraints(strategy, dict(parameters or {}), dict(inputs or {})),
            allow_replicated=allow_replicated, must_fit=False, moves=Moves(recompute, offload),
            exchange=exchange,
        )  # fmt: skip

    # ---- checking

    def check(self, cluster: Cluster | None = None) -> None:
        """See whether the plan can run on a cluster (by default the one it was made for); needs no devices.

        Raises:
            PlanMismatch: the cluster has fewer devices than the plan's mesh names.
            DoesNotFit: a device has less memory than the plan needs there.
            ValueError: a shard's weights are not one per device of its axis.
        """
        cluster = cluster or self.cluster
        if max(self.mesh.ranks) >= len(cluster):
            raise PlanMismatch(
                "cluster", f"for {self.mesh.size} devices (ranks up to {max(self.mesh.ranks)})", f"{len(cluster)} devices",
                "Plan again for this cluster.",
            )  # fmt: skip
        for name, placement in self.assignment.parameters.items():
            for axis, p in enumerate(placement.used):
                if isinstance(p, Shard) and p.weights is not None and len(p.weights) != self.mesh.shape[axis]:
                    raise ValueError(
                        f"parameter {name!r}: {p} has {len(p.weights)} weights, but mesh axis {self.mesh.names[axis]!r} has "
                        f"{self.mesh.shape[axis]} devices"
                    )
        for memory in self.prediction.memory:
            have = (
                memory.have if cluster is self.cluster else min(cluster.devices[rank].memory for rank in memory.ranks)
            )
            if memory.use.peak > have:
                largest = memory.use.largest
                raise DoesNotFit(memory.device, memory.use.peak, have, largest, REMEDY[largest])

    def check_graph(self, graph: Graph) -> None:
        """See whether the plan is for this model; batch sizes may differ.

        Raises:
            PlanMismatch: the graph has other operators or parameters than the one planned for.
        """
        from weft.graph import graph_fingerprint

        found = graph_fingerprint(graph)
        if found != self.fingerprint:
            planned, given = set(self.assignment.parameters), set(graph.parameters)
            lacking, extra = sorted(planned - given), sorted(given - planned)
            difference = f"; it lacks {lacking[:3]} and has {extra[:3]} besides" if lacking or extra else ""
            raise PlanMismatch(
                "model", f"graph {self.fingerprint[:12]}", f"graph {found[:12]}{difference}",
                "Plan again for this model, loss and structure of batch.",
            )  # fmt: skip

    # ---- JSON

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "format": FORMAT,
            "name": self.name,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "lower_bound": self.lower_bound,
            "planning_seconds": self.planning_seconds,
            "optimizer": dict(self.optimizer.__dict__),
            "alternatives": [{**a.__dict__, "mesh": list(a.mesh)} for a in self.alternatives],
            "prediction": self.prediction.to_dict(),
            "assignment": self.assignment.to_dict(),
            "cluster": self.cluster.to_dict(),
            "squeezes": [squeeze.to_dict() for squeeze in self.squeezes],
            "exchange": self.exchange,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the data is no plan, a damaged one, or one of another format.
        """
        if data.get("format") not in READS:
            known = " or ".join(map(str, READS))
            found = data.get("format")
            raise ValueError(f"not a plan of format {known}: format is {found!r}; plan again with this version of weft")
        missing = [
            key for key in ("assignment", "fingerprint", "cluster", "optimizer", "prediction") if key not in data
        ]
        if missing:
            raise ValueError(f"the plan lacks {', '.join(missing)}; the file is damaged or no plan")
        read = partial(_read, data)
        return cls(
            read("assignment", Assignment.from_dict),
            read("fingerprint", str),
            read("cluster", Cluster.from_dict),
            read("optimizer", lambda fields: OptimizerCost(**fields)),
            read("prediction", Prediction.from_dict),
            read("alternatives", lambda all: tuple(Alternative(**{**a, "mesh": tuple(a["mesh"])}) for a in all), ()),
            read("method", str, ""),
            read("lower_bound", float, 0.0),
            read("name", str, "search"),
            read("planning_seconds", float, 0.0),
            squeezes=read("squeezes", lambda all: tuple(Squeeze.from_dict(squeeze) for squeeze in all), ()),
            exchange=read("exchange", str, ""),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is no JSON, or no plan.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a plan: {error}; the file is damaged or no JSON") from error
        if not isinstance(data, dict):
            raise ValueError("not a plan: the JSON is not an object")
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            ValueError: nothing can be written there: no such folder, say.
        """
        to_file("plan.save:", path)
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: there is no such file, or it is no plan.
        """
        if Path(path).is_dir():
            raise ValueError(f"{path}: not a plan but a folder; name the file that was saved")
        if not Path(path).exists():
            raise ValueError(f"{path}: there is no such file; plan.save writes one, and so does `weft plan`")
        try:
            return cls.from_json(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    # ---- looking

    def show(self, path: str | Path) -> Path:
        """Write one self-contained HTML page (no network): layers by placement, bytes moved, memory, timeline, alternatives.

        Raises:
            ValueError: nothing can be written there: no such folder, say.
        """
        to_file("plan.show:", path)
        from weft.planner.page import page

        target = Path(path)
        target.write_text(page(self), encoding="utf-8")
        return target
